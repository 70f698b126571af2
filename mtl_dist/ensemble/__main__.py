"""The final job: ensemble runs of either view on the validation split and write the challenge score.

The score is the plain mean's of all members. What calibration adds is shown step by step beside it: temperatures,
weights of members for each task and dimension, thresholds of action units, smoothing of valence and arousal in time.
Videos are dealt into --folds; the parameters for a fold are fitted on the others, so that nothing is scored with
parameters that were fitted on it. What each step gains stands below with its interval over videos. With --calibrate
auto each task leaves out the steps that do not raise its score out of fold: which, is chosen for a fold on the others
alone, so that the calibrated score is not one that was chosen for. A test list is predicted with parameters fitted on
all validation rows, of the steps chosen on all folds.

Runs that each held out a fold of the same videos (data.fold 1/N to N/N) are one member: every row is predicted by the
run that has not seen its video, so that the score is of all of them, out of fold. A test list is predicted by their
mean.

Under `ray job submit`, or with RAY_ADDRESS, members are predicted in parallel on the cluster. What is predicted is kept
in --out/members: the same command continues.

Examples:
    python -m mtl_dist.ensemble --runs runs/cropped runs/cropped_aligned --out runs/ensemble
    python -m mtl_dist.ensemble --runs runs/fold-1 runs/fold-2 runs/fold-3 runs/fold-4 runs/fold-5 --out runs/ensemble
    ray job submit -- python -m mtl_dist.ensemble --runs s3://bucket/runs/cropped s3://bucket/runs/cropped_aligned
        --out s3://bucket/runs/ensemble --gpus-per-member 1
    python -m mtl_dist.ensemble --runs runs/cropped-1 runs/cropped-2 runs/aligned --out runs/submission
        --test-list DATA/test_set.txt --test-root DATA --half-windows 0 5 10 15 --calibrate auto

Writes to --out: predictions.parquet (the plain mean), calibrated.parquet (out of fold), table.txt, score.json; with a
test list also test_predictions.parquet and submission.txt, the challenge's file.
"""

from __future__ import annotations

from mtl_dist.ensemble.options import EnsembleCommand, check_command
from mtl_dist.errors import program, read_options, run_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then ensemble. Raises `InputError` for what the user can mend."""
    command = read_options(EnsembleCommand, args, prog=program("mtl_dist.ensemble"), description=__doc__)
    check_command(command)
    from mtl_dist.ensemble.job import make_ensemble  # torch and all, which --help does not wait for

    make_ensemble(command)


def script() -> None:
    """Be `mtl-ensemble`, or python -m mtl_dist.ensemble."""
    run_command(main, interrupted="what members were predicted is kept, and the same command continues")


if __name__ == "__main__":
    script()
