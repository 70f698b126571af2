"""What the system computed and wrote when these files were made, for every later version to equal and to read.

    python -m tests.golden values     write values.json: losses, scores and weights of many tiny runs, and an ensemble
    python -m tests.golden formats    write formats/<date>.tar.xz: a set, runs, an export and an ensemble as made now
    python -m tests.golden spread     how far values move with the instructions that the processor is allowed

`tests/test_golden.py` compares. Values are written anew only where results are meant to change, and the commit says
why; archives of formats are added, and never replaced.
"""
