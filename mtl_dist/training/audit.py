"""Which samples every step consumed, on request (`run.audit_dir`): what a failure lost or repeated can be counted.

Every process that trains has a file, with a line for every step it finished: life, step, epoch, rank, samples, time.
Samples are told by their place in the set, in one list named "all". With `data.sampling per_task` every task has a list
of its own; these may share samples. Where an epoch may read a sample several times (`data.balance`, `data.mix`), it
takes the run's order to tell what was lost or repeated.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtl_dist.errors import InputError

if TYPE_CHECKING:
    from mtl_dist.training.plan import AnyOrder


class Audit:
    """Writes one process's file, or none without a directory. Lines are not buffered: a killed process's are there."""

    def __init__(self, directory: Path | None, run_name: str, *, life: str, rank: int):
        self.life, self.rank, self._file = life, rank, None
        if directory is None:
            return
        try:
            (directory / run_name).mkdir(parents=True, exist_ok=True)
            path = directory / run_name / f"{life}-{rank:05d}-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise InputError(f"run.audit_dir {directory} cannot be written: {error.strerror}; choose another") from None

    def finished(self, step: int, epoch: int, samples: np.ndarray, tasks: tuple[str, ...] = ()) -> None:
        """Note that the optimizer took step `step` with this rank's samples (n,), as many of each task one by one."""
        if self._file is None:
            return
        batches = np.split(samples, max(len(tasks), 1))
        line = {
            "life": self.life,
            "step": step,
            "epoch": epoch,
            "rank": self.rank,
            "samples": {name: batch.tolist() for name, batch in zip(tasks or ("all",), batches)},
            "at": time.time(),
        }
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()


class Report(NamedTuple):
    """What the audit of a run says of its epochs."""

    samples_lost: int  # of those that the steps of the last lives should have read, never read
    samples_twice: int  # read more often in an epoch, by the steps that count, than they should have been
    steps_repeated: int  # done again, because they came after the checkpoint that a later life continued from
    finished_at: list[tuple[float, int]]  # (Unix time, step) whenever all ranks had finished a step, in order of time


def read_audit(
    directory: Path, run_name: str, *, global_batch: int, num_steps: int, order: AnyOrder | None = None
) -> Report:
    """Count over all processes of a run. A step counts as the last life did it: earlier attempts were undone.

    Samples are counted in each batch of a step by itself, and so for each task. `order`: that of the run, which every
    step is compared with; None: it reads no sample twice in an epoch.
    """
    lines = [
        json.loads(line)
        for path in sorted((directory / run_name).glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line.endswith("}")  # the last of a killed process may be torn
    ]
    lines.sort(key=lambda line: line["at"])
    batches = sorted({name for line in lines for name in line["samples"]}) or ["all"]
    attempts: dict[int, dict[str, list[dict]]] = {}  # step -> life -> the lines of its ranks
    for line in lines:
        attempts.setdefault(line["step"], {}).setdefault(line["life"], []).append(line)
    lost = twice = repeated = 0
    epochs: dict[tuple[int, str], list[int]] = {}
    finished = []
    for step, planned in zip(range(1, num_steps + 1), _plans(order)):
        lives = list(attempts.get(step, {"": []}).values())
        repeated += len(lives) - 1
        for name in batches:
            samples = [sample for line in lives[-1] for sample in line["samples"][name]]
            if planned:
                found, expected = Counter(samples), planned[name]
                lost, twice = lost + (expected - found).total(), twice + (found - expected).total()
                continue
            lost += max(global_batch - len(set(samples)), 0)
            if samples:
                epochs.setdefault((lives[-1][0]["epoch"], name), []).extend(samples)
        for ranks in lives:
            if all(sum(len(line["samples"][name]) for line in ranks) == global_batch for name in batches):
                finished.append((max(line["at"] for line in ranks), step))
    for samples in epochs.values():
        twice += len(samples) - len(set(samples))
    return Report(lost, twice, repeated, sorted(finished))


def _plans(order: AnyOrder | None) -> Iterator[dict[str, Counter[int]]]:
    """Yield what every step of a run reads over all ranks, from the first on: {name: how often each sample}."""
    for epoch in itertools.count():
        if order is None:
            yield {}
            continue
        for samples in order.plan(epoch=epoch, rank=0, num_ranks=1).samples_of(0, order.num_steps):
            names = order.tasks or ("all",)
            yield {name: Counter(part.tolist()) for name, part in zip(names, np.split(samples, len(names)))}
