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

from mtl_dist.errors import program, read_options, run_command
from mtl_dist.report.options import ReportCommand, check_command


def main(args: list[str] | None = None) -> None:
    """Read the command line, then write the report. Raises `InputError` for what the user can mend."""
    command = read_options(ReportCommand, args, prog=program("mtl_dist.report"), description=__doc__)
    check_command(command)
    from mtl_dist.report.attaching import attach_page, check_attachable
    from mtl_dist.report.writing import write_report  # torch and all, which --help does not wait for

    written = shlex.join(["python", "-m", "mtl_dist.report", *(sys.argv[1:] if args is None else args)])
    if command.attach:
        check_attachable(command)
    page = write_report(command, written=written)
    print(f"wrote {page}")
    if command.attach:
        attach_page(command, page)


def script() -> None:
    """Be `mtl-report`, or python -m mtl_dist.report."""
    run_command(main, interrupted="predictions are kept, and the same command makes the page")


if __name__ == "__main__":
    script()
