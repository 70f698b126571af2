"""Average the weights of checkpoints: the last of one run, or the best of several runs that began alike.

One model comes of it, which costs no more than one; an ensemble averages what several models predict. BatchNorm's
running statistics do not fit averaged weights: they are estimated anew, by a pass over the training set of the newest
checkpoint, as training reads it.

--greedy takes the checkpoints in the order of their scores, and keeps each with which the score of the validation set
does not fall. What is chosen on rows flatters on these rows. So it is also chosen on each half of the videos and scored
on the other half, and that score is printed beside it.

Examples:
    python -m mtl_dist.soup runs/cropped --last 5 --out soups/tail
    python -m mtl_dist.soup runs/cropped-1 runs/cropped-2 runs/cropped-3 --out soups/uniform
    python -m mtl_dist.soup s3://bucket/runs/a s3://bucket/runs/b s3://bucket/runs/c --greedy --bn-batches 200
        --out s3://bucket/soups/greedy

Writes to --out: soup.json (what was averaged, all scores), model.safetensors, README.md, and config.json last: an
export, which `python -m mtl_dist.predict --runs OUT`, --run.start and `python -m mtl_dist.ensemble --val` read.
"""

from __future__ import annotations

from mtl_dist.errors import program, read_options, run_command
from mtl_dist.soup.options import SoupCommand, check_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then average. Raises `InputError` for what the user can mend."""
    command = read_options(SoupCommand, args, prog=program("mtl_dist.soup"), description=__doc__)
    check_command(command)
    from mtl_dist.soup.job import make_soup  # torch and all, which --help does not wait for

    make_soup(command)


def script() -> None:
    """Be `mtl-soup`, or python -m mtl_dist.soup."""
    run_command(main, interrupted="nothing was written")


if __name__ == "__main__":
    script()
