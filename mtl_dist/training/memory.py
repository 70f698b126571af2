"""A step that runs out of memory is taken again in micro-batches of half as many rows.

Its losses and gradients stay those of the whole batch: a step computes them from the sums of all its micro-batches.
Only BatchNorm's statistics, where they are learned, become those of fewer rows, which is said.

One rank that is alone, at ZeRO 0, takes the step again at once. Forward and backward passes change gradients and the
model's buffers, which are put back; weights, the optimizer and balancers change after them, and all that is drawn is
keyed by the step.

Of several ranks, one that runs out leaves the others waiting in the middle of a forward or backward pass for its part
of a sum. Nothing but ending the group sets them free: to ask all ranks after their passes whether these went well would
make every host wait for its device in every step. At ZeRO 1 and 2, DeepSpeed hands gradients over while backward runs,
and half of it cannot be taken back. There the change is stored, and the rank ends with `OutOfMemory`: whatever starts
ranks again, Ray, torchrun or the same command, continues from the last checkpoint, and the change comes at the same
step as here. It takes as long as any restart, and happens as often as a batch can be halved at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from mtl_dist.batchnorm import find_trained_norms
from mtl_dist.config import Config
from mtl_dist.device import MEMORY_REMEDY, free_memory, is_out_of_memory
from mtl_dist.errors import InputError, OutOfMemory
from mtl_dist.training.checks import check_parts, note_batchnorm
from mtl_dist.training.engine import set_accumulation
from mtl_dist.training.micro_batches import MicroBatches

Made = TypeVar("Made")


class Memory:
    """Has the passes of steps fit into this rank's memory: in more micro-batches, where they do not."""

    def __init__(self, engine, config: Config, micro_batches: MicroBatches, *, rank: int, num_ranks: int):
        self._engine, self._config, self._micro_batches = engine, config, micro_batches
        self._rank, self._num_ranks = rank, num_ranks
        self._takes_again = num_ranks == 1 and not config.engine.zero_stage
        self._buffers = list(engine.module.model.buffers()) if self._takes_again else []
        self._before = [buffer.clone() for buffer in self._buffers]  # a step's passes

    def fit(self, passes: Callable[[int], Made], step: int, *, rows: int) -> Made:
        """Return what `passes` return, in as many micro-batches as fit of a batch of `rows`; `step`: completed before.

        Raises `OutOfMemory` where ranks must be started again for it, and `InputError` where one row does not fit.
        """
        parts = self._micro_batches.at(step + 1)
        set_accumulation(self._engine, parts)
        _copy(self._before, self._buffers)
        while True:
            try:
                return passes(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the handler: the exception holds the frames, and these what the passes have made.
            parts = self._halve(parts, step + 1, rows)

    def _halve(self, parts: int, step: int, rows: int) -> int:
        """Store that steps have twice as many micro-batches from this one on; return how many."""
        if parts * self._engine.module.passes >= rows:
            raise InputError(f"out of memory at step {step}, with a micro-batch of one row: {MEMORY_REMEDY}")
        more, config, model = 2 * parts, self._config, self._engine.module.model
        check_parts(config, self._num_ranks, more)
        note = note_batchnorm(model, config, self._num_ranks, parts=more)  # raises where one row is too few
        text = (
            f"out of memory at step {step}: {describe_parts(more, rows)} instead of {_size(parts, rows)} from here on"
        )
        if config.engine.batchnorm != "frozen" and find_trained_norms(model):
            text += "; losses stay those of the whole batch, BatchNorm's statistics are of these fewer rows"
        self._micro_batches.write(step, more, f"{text}; rank {self._rank}")
        if not self._takes_again:
            raise OutOfMemory(
                f"rank {self._rank}: {text}. Ranks that are started again, or the same command, continue from the last "
                "checkpoint"
            )
        self._micro_batches.take(step, more)
        print("\n".join(filter(None, [text, note])), flush=True)
        _copy(self._buffers, self._before)
        self._engine.zero_grad()
        set_accumulation(self._engine, more)
        free_memory()
        return more


def update_weights(engine, step: int) -> None:
    """Take the optimizer's step of this number. Raises `InputError` where it runs out of memory, as another try would.

    Some weights are of after it then, others of before, and micro-batches have no part in what it needs.
    """
    try:
        engine.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory while the optimizer updated the weights in step {step}; none of these is stored, and "
            "smaller micro-batches do not help. The same command continues from the last checkpoint: on several ranks "
            "with --engine.zero-stage 1, or on a device with more memory. A new run may take optim.name sgd, or a "
            "smaller model"
        ) from error


def describe_parts(parts: int, rows: int) -> str:
    """Say how large micro-batches are."""
    return f"micro-batches of {_size(parts, rows)}"


def _size(parts: int, rows: int) -> int:
    return math.ceil(rows / parts)


@torch.no_grad()
def _copy(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)
