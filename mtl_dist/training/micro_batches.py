"""How a rank's part of a step is cut into micro-batches, and into how many.

A run has as many as it was told, and more from the step on at which memory ran out. Each such change is a small object
of the run, micro_batches/step_000000012_parts_000004.txt: from step 12 on, 4. It is written at once, by whichever rank
it happened on. So a run that is killed then, and continues from a checkpoint before, does every step as it was done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl_dist import storage
from mtl_dist.ranks import on_rank_0
from mtl_dist.tasks import Batch

CHANGES = "micro_batches"
CHANGE = re.compile(r"step_(\d{9})_parts_(\d{7})\.txt")


def split_batch(batch: Batch, *, parts: int, passes: int) -> list[Batch]:
    """Cut a batch into micro-batches, each with its part of all `passes` equal parts of it (the samples of a task).

    By slices: an index that lies on the host would make it wait for the device.
    """
    if parts == 1:
        return [batch]
    tensors, spec = tree_flatten(batch)
    cut = [[own.tensor_split(parts) for own in tensor.tensor_split(passes)] for tensor in tensors]
    return [
        tree_unflatten([torch.cat([own[part] for own in of_passes]) for of_passes in cut], spec)
        for part in range(parts)
    ]


def plan_parts(told: int, changes: Iterable[tuple[int, int]], step: int) -> int:
    """Return how many micro-batches the step of this number, from 1, has: `changes` are (step, micro-batches)."""
    return max([told, *(parts for begin, parts in changes if begin <= step)])


def read_changes(run_uri: str) -> list[tuple[int, int]]:
    """Return the changes of a run, in order: (step, micro-batches from it on)."""
    names = [found.name for found in storage.list_objects(storage.join(run_uri, CHANGES))]
    return sorted((int(match[1]), int(match[2])) for name in names if (match := CHANGE.fullmatch(name)))


class MicroBatches:
    """How many micro-batches the steps of a run have; every rank has the same. `told`: so many at least."""

    def __init__(self, run_uri: str, told: int):
        self._run_uri, self._told = run_uri, told
        self.changes: list[tuple[int, int]] = on_rank_0(lambda: read_changes(run_uri))

    def at(self, step: int) -> int:
        """Return how many the step of this number has, from 1."""
        return plan_parts(self._told, self.changes, step)

    def write(self, step: int, parts: int, why: str) -> None:
        """Store a change. Any rank may, and two of the same one write the same object."""
        name = f"step_{step:09d}_parts_{parts:07d}.txt"
        storage.write_bytes(storage.join(self._run_uri, CHANGES, name), f"{why}\n".encode())

    def take(self, step: int, parts: int) -> None:
        """Take note of a change that is stored."""
        self.changes.append((step, parts))
