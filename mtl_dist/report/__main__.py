"""Report runs and ensembles as one page: tables, curves, intervals, calibration, attention and errors.

Examples:
    python -m mtl_dist.report runs/cropped runs/cropped_aligned --ensemble runs/ensemble --out report
    python -m mtl_dist.report s3://bucket/runs/cropped-seed0 s3://bucket/runs/cropped-seed1 --out s3://bucket/report

Each run is predicted with its best checkpoint on its validation set; runs that differ in their seed only are one
method. Writes to --out: report.html, which holds all it shows and opens anywhere; figures/ and tables/ with the PNG and
CSV behind it; data/ with the runs' predictions, which the next report of the same checkpoints reads.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers, plain_refusals, run_command

BOUNDS = OPTION_BOUNDS | {"draws": (1, 10**6), "faces": (0, 100), "errors": (0, 1000)}

PROG = "python -m mtl_dist.report"


@dataclass(frozen=True)
class ReportCommand:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs to compare: <storage>/<name> of each, as training printed it."""
    out: str
    """Directory or s3:// prefix to write to; what an earlier report wrote there is replaced."""
    ensemble: tuple[str, ...] = ()
    """What mtl_dist.ensemble wrote with --out; those of the same methods, combined in the same way, are one."""
    val: tuple[str, ...] = ()
    """Validation sets in the order of the runs, where they have moved since training."""
    title: str = "Valence and arousal, expressions, action units"
    """Heading of the page."""
    draws: int = 1000
    """Bootstrap draws of the videos."""
    faces: int = 3
    """Faces of the attention maps."""
    errors: int = 6
    """Pictures of the worst errors, of each task."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Loader threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def main(args: list[str] | None = None) -> None:
    with plain_refusals(PROG):
        command = tyro.cli(ReportCommand, args=args, prog=PROG, description=__doc__)
    _check(command)
    from mtl_dist.report.writing import write_report

    written = shlex.join(["python", "-m", "mtl_dist.report", *(sys.argv[1:] if args is None else args)])
    page = write_report(command, written=written)
    print(f"wrote {page}")


def _check(command: ReportCommand) -> None:
    if not command.runs:
        raise InputError("no run is named; expected <storage>/<name> of one at least")
    if command.val and len(command.val) != len(command.runs):
        raise InputError(f"--val names {len(command.val)} sets for {len(command.runs)} runs; expected one each")
    for what, uris in (("run", command.runs), ("ensemble", command.ensemble)):
        plain = [uri.rstrip("/") for uri in uris]
        if repeated := next((uri for uri in plain if plain.count(uri) > 1), None):
            raise InputError(f"{what} {repeated} is named twice; name it once")
    check_numbers(BOUNDS, **vars(command))


if __name__ == "__main__":
    run_command(main, interrupted="predictions are kept, and the same command makes the page")
