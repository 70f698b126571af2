"""What a rank works with from its start to its end: device, data, its order, and whom it tells."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from mtl_dist.config import Config
from mtl_dist.data.augment import Preparation, build_preparation
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.loader import FETCH_AHEAD_STEPS
from mtl_dist.data.samples import Samples, open_samples
from mtl_dist.device import keep_freed_memory, pick_device
from mtl_dist.machine import allow_open_files
from mtl_dist.progress import progress_bar
from mtl_dist.training.checks import check_num_ranks, check_ranks_agree
from mtl_dist.training.plan import AnyOrder, Data, build_order, open_data
from mtl_dist.training.watchdog import Phase, Watchdog


class RunContext(Protocol):
    """Where a rank stands, and whom it tells. torch.distributed is initialised before `fit`."""

    rank: int
    num_ranks: int
    launcher: str  # names what started the ranks, the same when they are started again
    command_line: str  # of the launcher, as it was typed
    num_cpus: int  # that this rank may use
    has_gpu: bool  # whether this rank may use one

    def publish(self, metrics: dict[str, Any]) -> None:
        """Report an evaluation. Every rank calls it, with the same metrics."""

    def observe(self, **values: float | Mapping[str, float]) -> None:
        """Show `MEASUREMENTS` of this rank to whoever watches the cluster."""

    def should_stop(self) -> bool:
        """Whether this rank was asked to stop (a signal); ranks may disagree."""

    def should_save(self) -> bool:
        """Whether a checkpoint is wanted now: a machine of the run is about to go. All ranks ask at the same steps."""


class Setup(NamedTuple):
    """What a rank works with from its start to its end."""

    config: Config
    context: RunContext
    watchdog: Watchdog
    device: torch.device
    data: Data
    order: AnyOrder
    train: Samples
    val: Samples | None  # None: nothing is scored
    prepare: Preparation

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, all epochs."""
        return self.data.steps_per_epoch * self.config.train.epochs

    @property
    def reading(self) -> dict[str, Any]:
        """What this rank reads of every set, how far ahead, and for which device."""
        ranks = {"rank": self.context.rank, "num_ranks": self.context.num_ranks, "device": self.device}
        return ranks | {"workers": self.config.data.workers, "prefetch": self.config.data.prefetch}


def set_up(config: Config, context: RunContext, watchdog: Watchdog) -> Setup:
    """Choose the device, check the data, and plan its order."""
    device = pick_device(config, has_gpu=context.has_gpu)
    torch.set_num_threads(config.engine.threads or context.num_cpus)
    if device.type == "cpu":
        keep_freed_memory()
    data = open_data(config)
    check_ranks_agree(config, data)
    check_num_ranks(config, context.num_ranks)
    cache = Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    train, val = (sets and open_samples(sets, config, cache) for sets in (data.train, data.val))
    for samples in (train, val):
        if samples:
            samples.decode_for(device)
    shows = (data.tasks or config.data.balance != "none") and context.rank == 0
    with progress_bar("reading labels", len(data.train.shards)) if shows else contextlib.nullcontext() as advance:

        def moved(count: int) -> None:
            watchdog.moved(Phase.LABELS)
            if advance:
                advance(count)

        order = build_order(config, data, train, moved)
    train.keep_open(order.shards_in_hand(context.num_ranks, num_steps=2 * FETCH_AHEAD_STEPS))
    allow_open_files(train.max_open + (val.max_open if val else 0))
    return Setup(config, context, watchdog, device, data, order, train, val, build_preparation(config))
