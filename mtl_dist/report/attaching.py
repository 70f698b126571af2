"""Attach the page to the runs that its runs are in MLflow and W&B."""

from __future__ import annotations

from mtl_dist import storage
from mtl_dist.errors import InputError
from mtl_dist.report.options import ReportCommand
from mtl_dist.runs.weights import open_best
from mtl_dist.training.sinks.opening import SERVICES, check_installed, check_tracked, describe_run
from mtl_dist.training.sinks.sending import tellable
from mtl_dist.training.tracking import rows_until

PLACE = "report/report.html"


def check_attachable(command: ReportCommand) -> None:
    """Raise `InputError` where a service is not installed, or a run was never tracked or has not ended.

    A run that trains has its service open, and both take what is attached for its end.
    """
    check_installed(command.attach, where="--attach")
    for uri in command.runs:
        check_tracked(uri)
        weights = open_best(uri)
        if not weights.is_finished:
            raise InputError(
                f"run {uri} has not ended: step {weights.newest_step} of {weights.total_steps}; --attach is for runs "
                "that have. The command that trained it continues it; or leave out --attach"
            )


def attach_page(command: ReportCommand, page_uri: str) -> None:
    """Attach a page, in the place of an earlier one, to every run that it is of. Raises `InputError`."""
    files = {PLACE: storage.read_bytes(page_uri)}
    for uri in command.runs:
        weights = open_best(uri)
        for name in dict.fromkeys(command.attach):
            try:
                service = SERVICES[name](describe_run(weights.config, uri))
                is_there = service.attach(rows_until(uri, weights.newest_step), files)
            except InputError:
                raise
            except Exception as error:  # of a client of others, which raises what it likes
                raise _refusal(name, uri, page_uri, tellable(f"{type(error).__name__}: {error}")) from None
            if not is_there:
                raise _refusal(name, uri, page_uri, "it has no such run")
            print(f"attached to {uri} in {name} as {PLACE}")


def _refusal(name: str, uri: str, page_uri: str, reason: str) -> InputError:
    return InputError(
        f"{name} did not take the page for run {uri} ({reason}); it is at {page_uri}. Check the variables that the run "
        "was tracked with, and give the same command again"
    )
