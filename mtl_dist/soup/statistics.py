"""BatchNorm's running statistics of averaged weights: estimated anew on the training set.

Those of the checkpoints are of other activations than averaged weights make, and so is their mean (Izmailov et al.
2018, arXiv 1803.05407, 3.2). As torch.optim.swa_utils.update_bn does: passes in training mode, with augmentation and
dropout, without gradients; the mean over all batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtl_dist.batchnorm import find_trained_norms, statistics_anew
from mtl_dist.config import Config
from mtl_dist.data.augment import Preparation, build_preparation
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.loader import FETCH_AHEAD_STEPS, lend, train_batches
from mtl_dist.data.samples import Samples, open_samples
from mtl_dist.errors import InputError
from mtl_dist.machine import allow_open_files
from mtl_dist.predicting.members import Member
from mtl_dist.runs.start import TRAINING_SET
from mtl_dist.soup.options import SoupCommand
from mtl_dist.training.draws import draw_passes, seed_dropout
from mtl_dist.training.plan import AnyOrder, build_order, open_data


class TrainingPass(NamedTuple):
    """The steps of training that statistics are estimated on: the first of the last epoch."""

    config: Config
    samples: Samples
    order: AnyOrder
    prepare: Preparation
    num_steps: int
    passes: int  # equal parts of a step, each a forward pass of its own
    batch: int  # samples of a forward pass: from so many on, less than twice as many
    workers: int

    @property
    def num_samples(self) -> int:
        return self.num_steps * self.config.train.global_batch * self.passes

    def inputs(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what forward passes read, on the device: inputs and which frames are valid. Dropout is seeded before
        each, as of a step of its own."""
        config, epoch = self.config, self.config.last_epoch - 1
        steps = train_batches(
            self.samples, self.order, epoch=epoch, start_step=0, rank=0, num_ranks=1, workers=self.workers,
            prefetch=config.data.prefetch)  # fmt: skip
        with contextlib.closing(lend(self.samples, steps)) as lent:
            for step, batch in enumerate(islice(lent, self.num_steps)):
                turn = step if config.data.mix else epoch
                draws = draw_passes(self.prepare, batch.rows, seed=config.run.seed, epoch=turn, passes=self.passes)
                batch = batch.to(device)
                inputs = self.prepare(batch, draws.to(device))
                for number, part in enumerate(zip(self._split(inputs), self._split(batch.valid))):
                    seed_dropout(config.run.seed, step, 0, number)
                    yield part

    def _split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Cut what a step has (B, ...) into that of forward passes."""
        for own in tensor.chunk(self.passes):
            yield from own.tensor_split(max(1, len(own) // max(self.batch, 2)))  # of one row there is no variance


def needs_statistics(model: nn.Module, configs: Iterable[Config]) -> bool:
    """Whether a model has layers of BatchNorm whose statistics any of these trainings changed."""
    return any(config.engine.batchnorm != "frozen" for config in configs) and bool(find_trained_norms(model))


def open_training_pass(member: Member, command: SoupCommand) -> TrainingPass:
    """Open the training set of a checkpoint, in the order in which it is read. Raises `InputError`."""
    weights = member.weights
    data_config = weights.config.data.model_copy(update={"val": member.val.uris, "cache_dir": command.cache_dir})
    if command.train:
        data_config = data_config.model_copy(update={"train": command.train})
    config = weights.config.model_copy(update={"data": data_config})
    try:
        data = open_data(config)
    except InputError as error:
        moved = "" if command.train else "; where the set has moved since training, say where it is with --train"
        raise InputError(
            f"BatchNorm's statistics are estimated anew on the training set of {member.run_uri}: {error}{moved}"
        ) from None
    if data.train.sha256 != weights.identity.get(TRAINING_SET):
        raise InputError(
            f"{data.train} is not the training set of {weights.uri}; give the right one with --train: BatchNorm's "
            "statistics are estimated on it"
        )
    cache = Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    samples = open_samples(data.train, config, cache)
    order = build_order(config, data, samples)
    samples.keep_open(order.shards_in_hand(1, num_steps=2 * FETCH_AHEAD_STEPS))
    allow_open_files(samples.max_open)
    num_steps = min(command.bn_batches or order.num_steps, order.num_steps)
    passes = max(len(data.tasks), 1)
    how = {"passes": passes, "batch": command.batch, "workers": command.workers}
    return TrainingPass(config, samples, order, build_preparation(config), num_steps, **how)


@torch.no_grad()
def estimate_statistics(
    model: nn.Module,
    training: TrainingPass,
    *,
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Replace BatchNorm's running statistics by the mean over the batches of a pass; `progress` is told of samples."""
    bf16 = training.config.engine.autocast == "bf16"
    with statistics_anew(model, find_trained_norms(model)):
        for inputs, valid in training.inputs(device):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model(inputs, valid)
            progress(len(inputs))
