"""Batches of a training set in the order of `order.py`, and of a validation set in its own, made ahead by threads.

Threads, not processes: decoding, checksums and page faults release the interpreter lock, and nothing has to be copied
between address spaces or kept in shared memory. A loader closes within two seconds, whatever the store does: threads
that wait for it are left to end by themselves. All they do is to fill the cache, and a batch nobody waits for.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch

from mtl_dist.data.balanced import BalancedOrder
from mtl_dist.data.mixed import MixedOrder
from mtl_dist.data.order import Order, eval_range
from mtl_dist.data.samples import Samples
from mtl_dist.data.task_orders import TaskOrders
from mtl_dist.data.windows import eval_videos
from mtl_dist.tasks import Batch
from mtl_dist.threads import DaemonThreads
from mtl_dist.transfer import CPU, Event, mark, pin_batch

PLAN_STEPS = 16  # whose samples are found at once
FETCH_AHEAD_STEPS = 4 * PLAN_STEPS  # how far ahead of the loader shards are fetched from the store
FETCH_THREADS = 2
CLOSE_S = 1.0  # more than a batch takes; how long closing waits for loading threads, and for fetching ones

Loaded = TypeVar("Loaded")


def train_batches(
    samples: Samples,
    order: Order | BalancedOrder | MixedOrder | TaskOrders,
    *,
    epoch: int,
    start_step: int,
    rank: int,
    num_ranks: int,
    workers: int,
    prefetch: int,
    device: torch.device = CPU,
) -> Generator[Batch]:
    """Yield this rank's part of every step of an epoch from `start_step` on, in memory that `device` copies from.

    Of `TaskOrders` a `Batch` is as many samples of every task, one task behind the other, with the labels of it alone.
    """
    plan, samples = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks), samples.at_epoch(epoch)
    fetchers = DaemonThreads(FETCH_THREADS, "fetch")

    def load(numbers: np.ndarray) -> Batch:
        return pin_batch(keep_own_labels(samples.read(numbers), order.tasks), device)

    def loads() -> Iterator[Callable[[], Batch]]:
        for begin in range(start_step, order.num_steps, PLAN_STEPS):
            left = order.num_steps - begin
            if (begin - start_step) % FETCH_AHEAD_STEPS == 0:
                for group in plan.shards_ahead(begin, min(2 * FETCH_AHEAD_STEPS, left)):
                    fetchers.submit(functools.partial(samples.warm, [group]))  # a failure shows when it is read
            for numbers in plan.samples_of(begin, min(PLAN_STEPS, left)):
                yield functools.partial(load, numbers)

    try:
        yield from ahead(loads(), workers=workers, prefetch=prefetch)
    finally:
        fetchers.close(patience_s=CLOSE_S)


def keep_own_labels(batch: Batch, tasks: tuple[str, ...]) -> Batch:
    """Mask, in the i-th of as many equal parts of a fresh batch as there are `tasks`, labels of all but the i-th task.

    Without tasks the batch stays as it is.
    """
    for task, places in zip(tasks, np.split(np.arange(len(batch.rows)), max(len(tasks), 1))):
        batch.labels.keep_own(task, places)
    return batch


def eval_batches(
    samples: Samples,
    *,
    batch: int,
    rank: int,
    num_ranks: int,
    workers: int,
    prefetch: int,
    device: torch.device = CPU,
) -> Generator[Batch]:
    """Yield this rank's samples of a set, every row exactly once over all ranks; the last batch is smaller.

    Of videos a batch is as many as `eval_videos` says.
    """
    samples = samples.whole()
    if samples.frames is not None:
        batches = eval_videos(samples.frames, batch=batch, rank=rank, num_ranks=num_ranks)
    else:
        start, stop = eval_range(int(samples.group_sizes.sum()), rank=rank, num_ranks=num_ranks)
        batches = (np.arange(begin, min(begin + batch, stop)) for begin in range(start, stop, batch))

    def load(numbers: np.ndarray) -> Batch:
        return pin_batch(samples.read(numbers), device)

    loads = (functools.partial(load, numbers) for numbers in batches)
    yield from ahead(loads, workers=workers, prefetch=prefetch)


def lend(samples: Samples, batches: Generator[Batch], device: torch.device = CPU) -> Generator[Batch]:
    """Yield batches of which each is the caller's until it asks for the next one.

    Then its memory is used again, once `device` has done what it was given by then: it may still be copying.
    """
    lent: deque[tuple[Batch, Event]] = deque()  # that the caller is done with, and the device perhaps not
    with contextlib.closing(batches):
        try:
            for batch in batches:
                yield batch
                lent.append((batch, mark(device)))
                while lent and lent[0][1].query():
                    samples.give_back(lent.popleft()[0])
        finally:
            mark(device).synchronize()  # nothing is freed under a copy
        for batch, _ in lent:
            samples.give_back(batch)


def ahead(loads: Iterable[Callable[[], Loaded]], *, workers: int, prefetch: int) -> Generator[Loaded]:
    """Yield what `loads` return, in order: run by `workers` threads, at most `prefetch` ahead of what was taken."""
    if workers == 0:
        for load in loads:
            yield load()
        return
    pending: deque[Future[Loaded]] = deque()
    pool = DaemonThreads(workers, "loader")
    try:
        for load in loads:
            pending.append(pool.submit(load))
            if len(pending) > prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close(patience_s=CLOSE_S)
