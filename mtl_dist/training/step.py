"""One optimizer step: augmentation on the device, micro-batches, the loss of the global batch, the balancer's share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import TypeVar

import torch

from mtl_dist.config import Config
from mtl_dist.data.augment import Preparation
from mtl_dist.objective.gradients import total_gram
from mtl_dist.objective.losses import Sums, add_sums, global_losses, total_sums
from mtl_dist.objective.module import ObjectiveModule, StepLoss
from mtl_dist.tasks import Batch
from mtl_dist.training.draws import draw_passes, seed_dropout
from mtl_dist.training.memory import Memory, update_weights
from mtl_dist.training.micro_batches import split_batch
from mtl_dist.training.requests import is_due
from mtl_dist.transfer import pin_batch, send

Found = TypeVar("Found")


def train_step(
    engine,
    batch: Batch,
    config: Config,
    *,
    prepare: Preparation,
    epoch: int,
    step: int,
    rank: int,
    memory: Memory | None = None,
) -> StepLoss:
    """Take one optimizer step on this rank's part of the global batch, in micro-batches that fit into `memory`."""
    module: ObjectiveModule = engine.module
    turn = step if config.data.repeats_rows else epoch  # a row has other draws each time that it is read
    draws = draw_passes(prepare, batch.rows, seed=config.run.seed, epoch=turn, passes=module.passes)
    device = next(module.parameters()).device
    batch = pin_batch(batch, device).to(device)  # what the loader has pinned stays as it is
    batch = batch._replace(inputs=prepare(batch, send(draws, device)))
    passes = partial(_pass_batch, engine, batch, config, step=step, rank=rank)
    loss, parts = memory.fit(passes, step, rows=len(batch.samples)) if memory else passes(config.train.least_parts)
    update_weights(engine, step + 1)
    after = None
    if module.balancer.looks_after_steps:
        sums = _sum_up(module, parts, config, step=step, rank=rank)
        after = global_losses(module.objective, sums, sums, scale=1.0)
    module.balancer.stepped(loss.terms, loss.present, after)
    return loss._replace(total=loss.total.detach())


def _pass_batch(
    engine, batch: Batch, config: Config, num_parts: int, *, step: int, rank: int
) -> tuple[StepLoss, list[Batch]]:
    """Pass a batch forward and backward; return its loss, and its micro-batches. No weight changes."""
    module, parts = engine.module, split_batch(batch, parts=num_parts, passes=engine.module.passes)
    # The losses of the whole batch need the sums of the whole batch before the first backward: CCC is no mean.
    looks = is_due(step, config.loss.gradients_every)
    total = gram = None
    if len(parts) > 1:
        total = _sum_up(module, parts, config, step=step, rank=rank)
        if module.looks_at_gradients(looks):
            own = partial(module.gram, total=total, parts=len(parts))
            gram = total_gram(sum(_of_each(own, parts, config, step=step, rank=rank)))
    for number, part in enumerate(parts):
        if number:
            engine.step()  # counts the micro-batch before: the optimizer's step is after the last
        seed_dropout(config.run.seed, step, rank, number)
        loss = engine(part, total, gram, parts=len(parts), looks_at_gradients=looks)
        engine.backward(loss.total)
    return loss, parts


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
