"""One optimizer step: augmentation on the device, micro-batches, the loss of the global batch, the balancer's share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.augment import Preparation
from mtl_dist.objective.losses import Sums, add_sums, global_losses, total_sums
from mtl_dist.objective.module import ObjectiveModule, StepLoss
from mtl_dist.tasks import Batch


def train_step(
    engine, batch: Batch, config: Config, *, prepare: Preparation, epoch: int, step: int, rank: int
) -> StepLoss:
    """Take one optimizer step on this rank's part of the global batch, in `train.accumulation` micro-batches."""
    module: ObjectiveModule = engine.module
    draws = draw_passes(prepare, batch.rows, seed=config.run.seed, epoch=epoch, passes=module.passes)
    device = next(module.parameters()).device
    batch = batch.to(device)
    batch = batch._replace(inputs=prepare(batch, draws.to(device)))
    parts = split_batch(batch, parts=config.train.accumulation, passes=module.passes)

    # The losses of the whole batch need the sums of the whole batch before the first backward: CCC is no mean.
    total = _sum_up(module, parts, config, step=step, rank=rank) if len(parts) > 1 else None
    for number, part in enumerate(parts):
        seed_dropout(config.run.seed, step, rank, number)
        loss = engine(part, total, parts=len(parts))
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


def split_batch(batch: Batch, *, parts: int, passes: int) -> list[Batch]:
    """Cut a batch into micro-batches, each with its part of all `passes` equal parts of it (the samples of a task)."""
    if parts == 1:
        return [batch]
    of_passes = [places.tensor_split(parts) for places in torch.arange(len(batch.samples)).chunk(passes)]
    return [batch.take(torch.cat(places)) for places in zip(*of_passes)]


def _sum_up(module: ObjectiveModule, parts: list[Batch], config: Config, *, step: int, rank: int) -> Sums:
    """Return the sums of the whole step over all ranks, by forward passes without gradients and with its dropout."""
    total = None
    for number, part in enumerate(parts):
        seed_dropout(config.run.seed, step, rank, number)
        with torch.autocast(part.inputs.device.type, torch.bfloat16, enabled=config.engine.autocast == "bf16"):
            sums = module.sums(part)
        total = add_sums(total, sums)
    return total_sums(total)


def seed_dropout(seed: int, step: int, rank: int, part: int) -> None:
    """Key torch's generator, which only dropout draws from, by (seed, step, rank, part): there is no state to save."""
    (key,) = np.random.SeedSequence([seed, step, rank, part]).generate_state(1, np.uint64)
    torch.manual_seed(int(key >> np.uint64(1)))
