"""Enter a life of a run as a rank of torchrun, and print what comes of it; the first attempt of all fails.

    torchrun ... -m tests.starting RUN DAMAGED MARKER

DAMAGED is a run whose lives.json is none. MARKER is a file that says that an attempt has failed.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from mtl_dist.errors import InputError
from mtl_dist.runs.lives import begin_life
from mtl_dist.training.launch import LocalContext
from mtl_dist.training.torchrun import join_torchrun

if __name__ == "__main__":
    run, damaged, marker = sys.argv[1:]
    context = LocalContext()
    context.launcher = join_torchrun("gloo", timedelta(seconds=60))
    for uri in (damaged, run):
        try:
            begin_life(uri, launcher=context.launcher, num_ranks=context.num_ranks)
        except InputError as error:
            sys.stdout.write(f"rank {context.rank}: {error}\n")  # at once: ranks share the pipe
    sys.stdout.flush()
    is_first = not Path(marker).exists()
    if context.rank == 0:
        Path(marker).touch()
        os._exit(is_first)
