"""Run `mtl_dist.train` and kill -9 a rank of it at a chosen moment, once; started again it lives.

    python -m tests.dying PHASE STEP RANK MARKER -- TRAIN ARGUMENTS

Under torchrun too. MARKER is a file that says that it has happened; it holds the time. The code that runs is the
project's own: what is put around it only waits for the moment.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from mtl_dist import storage
from mtl_dist.errors import run_command
from mtl_dist.runs.checkpoint import COMMIT, TRAIN
from mtl_dist.train import main
from mtl_dist.training.saving import Saver
from mtl_dist.training.watchdog import Phase, Watchdog

PHASES = (
    "between steps",
    "in a step",
    "before the save",
    "in the middle of a file",
    "before COMMIT",
    "after COMMIT",
    "in retention",
    "in evaluation",
)


def arrange(phase: str, step: int, rank: int, marker: Path) -> None:
    """Put death around the function that the moment belongs to."""
    assert phase in PHASES, phase
    is_mine = int(os.environ.get("RANK", 0)) == rank

    def die() -> None:
        if is_mine and not marker.exists():
            marker.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    moved, save, upload, write_bytes, delete_all = (
        Watchdog.moved, Saver.save, storage.upload, storage.write_bytes, storage.delete_all
    )  # fmt: skip
    name_of_step = f"step_{step:09d}"

    def dying_moved(self, at: Phase, number: int = 0) -> None:
        wanted = {
            "between steps": (Phase.DATA, step + 1),
            "in a step": (Phase.STEP, step),
            "in evaluation": (Phase.EVALUATION, step),
        }
        if wanted.get(phase) == (at, number):
            die()
        moved(self, at, number)

    def dying_save(self, *args, state, **options) -> None:
        if phase == "before the save" and state["step"] == step:
            die()
        save(self, *args, state=state, **options)

    def dying_upload(path: Path, uri: str) -> None:
        if phase == "in the middle of a file" and name_of_step in uri and uri.endswith(TRAIN):
            if not storage.is_s3(uri):  # half of it is under its temporary name
                part = storage.local_path(uri).with_name(".part-half")
                shutil.copyfile(path, part)
                os.truncate(part, part.stat().st_size // 2)
            die()
        upload(path, uri)

    def dying_write(uri: str, data: bytes) -> None:
        is_commit = name_of_step in uri and uri.endswith(COMMIT)
        if phase == "before COMMIT" and is_commit:
            die()
        write_bytes(uri, data)
        if phase == "after COMMIT" and is_commit:
            die()

    def dying_delete(uri: str, *, first: str | None = None) -> None:
        if phase == "in retention" and first:
            storage.delete(storage.join(uri, first))
            die()
        delete_all(uri, first=first)

    Watchdog.moved, Saver.save = dying_moved, dying_save
    storage.upload, storage.write_bytes, storage.delete_all = dying_upload, dying_write, dying_delete


if __name__ == "__main__":
    split = sys.argv.index("--")
    phase, step, rank, marker = sys.argv[1:split]
    arrange(phase, int(step), int(rank), Path(marker))
    run_command(lambda: main(sys.argv[split + 1 :]))
