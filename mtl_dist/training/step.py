"""One optimizer step: augmentation on the device, micro-batches, the loss of the global batch, the balancer's share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.augment import Preparation
from mtl_dist.objective.gradients import total_gram
from mtl_dist.objective.losses import Sums, add_sums, global_losses, total_sums
from mtl_dist.objective.module import ObjectiveModule, StepLoss
from mtl_dist.tasks import Batch
from mtl_dist.training.micro_batches import split_batch
from mtl_dist.training.requests import is_due
from mtl_dist.transfer import pin_batch, send

Found = TypeVar("Found")


def train_step(
    engine, batch: Batch, config: Config, *, prepare: Preparation, epoch: int, step: int, rank: int
) -> StepLoss:
    """Take one optimizer step on this rank's part of the global batch, in `train.accumulation` micro-batches."""
    module: ObjectiveModule = engine.module
    turn = step if config.data.repeats_rows else epoch  # a row has other draws each time that it is read
    draws = draw_passes(prepare, batch.rows, seed=config.run.seed, epoch=turn, passes=module.passes)
    device = next(module.parameters()).device
    batch = pin_batch(batch, device).to(device)  # what the loader has pinned stays as it is
    batch = batch._replace(inputs=prepare(batch, send(draws, device)))
    parts = split_batch(batch, parts=config.train.accumulation, passes=module.passes)

    # The losses of the whole batch need the sums of the whole batch before the first backward: CCC is no mean.
    looks = is_due(step, config.loss.gradients_every)
    total = gram = None
    if len(parts) > 1:
        total = _sum_up(module, parts, config, step=step, rank=rank)
        if module.looks_at_gradients(looks):
            own = partial(module.gram, total=total, parts=len(parts))
            gram = total_gram(sum(_of_each(own, parts, config, step=step, rank=rank)))
    for number, part in enumerate(parts):
        seed_dropout(config.run.seed, step, rank, number)
        loss = engine(part, total, gram, parts=len(parts), looks_at_gradients=looks)
        engine.backward(loss.total)
        engine.step()
    after = None
    if module.balancer.looks_after_steps:
        sums = _sum_up(module, parts, config, step=step, rank=rank)
        after = global_losses(module.objective, sums, sums, scale=1.0)
    module.balancer.stepped(loss.terms, loss.present, after)
    return loss._replace(total=loss.total.detach())


def draw_passes(prepare: Preparation, rows: Tensor, *, seed: int, epoch: int, passes: int) -> Tensor:
    """Draw what rows (B, T) are prepared with: (B, T, n).

    The batch is `passes` equal parts, such as one a task. A row that is in several has other draws in each.
    """
    parts = enumerate(rows.tensor_split(passes))
    return torch.cat([prepare.draw(part, seed=seed, epoch=epoch * passes + number) for number, part in parts])


def _sum_up(module: ObjectiveModule, parts: list[Batch], config: Config, *, step: int, rank: int) -> Sums:
    """Return the sums of the whole step over all ranks, by forward passes without gradients."""
    return total_sums(reduce(add_sums, _of_each(module.sums, parts, config, step=step, rank=rank)))


def _of_each(
    find: Callable[[Batch], Found], parts: list[Batch], config: Config, *, step: int, rank: int
) -> Iterator[Found]:
    """Yield what one more forward pass finds of every micro-batch, with its dropout."""
    for number, part in enumerate(parts):
        seed_dropout(config.run.seed, step, rank, number)
        with torch.autocast(part.inputs.device.type, torch.bfloat16, enabled=config.engine.autocast == "bf16"):
            yield find(part)


def seed_dropout(seed: int, step: int, rank: int, part: int) -> None:
    """Key torch's generator, which only dropout draws from, by (seed, step, rank, part): there is no state to save."""
    (key,) = np.random.SeedSequence([seed, step, rank, part]).generate_state(1, np.uint64)
    torch.manual_seed(int(key >> np.uint64(1)))
