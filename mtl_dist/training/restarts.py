"""How ranks of torchrun end: it starts them again whatever ended them, and no exit code tells it not to.

What only repeats itself (an `InputError`, wrong flags) is noted in the directory that torchrun makes for its ranks'
error files, drawn at random once a launch and node. Restarted ranks find the note and end at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mtl_dist.errors import InputError

NOTE = "mtl_dist-failed.txt"
BAD_INPUT = 2  # exit code


def is_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch_dir() -> str:
    """Return the directory of this node's torchrun, the same for all its restarts; empty where there is none."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")[0]


@contextlib.contextmanager
def ending_restarts() -> Iterator[None]:
    """End this rank at once where one of an earlier start failed for good; note it where this one does."""
    note = Path(launch_dir()) / NOTE if launch_dir() else None
    if note and note.exists():
        if os.environ.get("LOCAL_RANK") == "0":
            print(f"error, as before: {note.read_text()}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    try:
        yield
    except (InputError, SystemExit) as ended:
        if note and (isinstance(ended, InputError) or ended.code == BAD_INPUT):
            with contextlib.suppress(OSError):  # the restarted ranks say it again
                note.write_text(str(ended) if isinstance(ended, InputError) else "see above")
        raise


@contextlib.contextmanager
def leaving_standing() -> Iterator[None]:
    """Leave a rank of torchrun at the end of this block with its exit code, and tear nothing down.

    Gloo's threads abort a process now and then while it tears them down ("terminate called without an active
    exception", 2 of 15 runs of three ranks): torchrun then counts a rank that was done as one that failed.
    """
    status = 0
    try:
        yield
    except SystemExit as ended:
        if not is_torchrun():
            raise
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if is_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
