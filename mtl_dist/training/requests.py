"""What ranks are asked for while they train, a checkpoint or an end: the same on all of them at the same step."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from mtl_dist.spans import RANKS, span
from mtl_dist.training.setup import RunContext

ASK_EVERY_STEPS = 8


class AskedFor(NamedTuple):
    """What some rank was asked for."""

    stop: bool  # save and leave the loop
    now: bool  # save, and wait until it is stored
    late: bool  # save
    own_s: tuple[float, ...] = ()  # what each rank has said; nothing where they were not asked

    @property
    def any(self) -> bool:
        """Whether a checkpoint is wanted."""
        return self.stop or self.now or self.late


@span(RANKS)
def ask_ranks(context: RunContext, *, late: bool, step: int | None = None, own_s: float = 0.0) -> AskedFor:
    """What any rank was asked for: all ranks must save and leave the loop at the same step. Rank 0's clock counts.

    `own_s` is what this rank has to say to all: seconds of its own.

    Several ranks ask each other at some steps only, since the answer makes the host wait for the device. None: always.
    """
    if context.num_ranks == 1:
        return AskedFor(context.should_stop(), context.should_save(), late)
    if step is not None and step % ASK_EVERY_STEPS:
        return AskedFor(False, False, False)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = (context.should_stop(), context.should_save(), late and context.rank == 0)
    said = [own_s if rank == context.rank else 0.0 for rank in range(context.num_ranks)]
    added = torch.tensor([*mine, *said], dtype=torch.float32, device=device)
    dist.all_reduce(added)
    stop, now, late, *of_ranks = added.tolist()
    return AskedFor(bool(stop), bool(now), bool(late), tuple(of_ranks))


def is_due(count: int, every: int | None) -> bool:
    """Whether what comes every so many steps or epochs comes now."""
    return every is not None and count % every == 0


def is_late(saved_at: float, every_minutes: float | None) -> bool:
    """Whether the last save, at a time of the monotonic clock, is so long ago."""
    return every_minutes is not None and time.monotonic() - saved_at >= 60 * every_minutes
