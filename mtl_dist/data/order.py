"""Which rows every rank reads at every step: a pure function of (shard sizes, seed, epoch, step, rank, ranks).

No torch, no files, no clock. How it works:

    epoch     a seeded permutation of the shards, laid end to end: a line of N samples
    streams   the line's first steps * global_batch samples, cut into C canonical streams of equal length
    blocks    a stream is cut at every few shard boundaries; samples are shuffled within each block
    step      takes the next global_batch / C samples of every stream
    rank      r of R reads the streams c with c = r (mod R)

So the set of rows of a step does not depend on R (a stream belongs to exactly one rank), every rank has the same number
of steps, and the state to resume is (epoch, step): whole blocks before it are skipped unopened. At most
global_batch - 1 samples of an epoch are left out, others each epoch. Samples are numbered by their place in the index.

An epoch may read a part of the samples (`epoch_steps`): its line is a circle then and begins anywhere in it, so that
every sample is as likely to be in the part as any other. `TaskOrders` are several orders side by side, one a task, each
over the samples that carry its labels: a step takes a batch of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

# Keys that keep the random draws of different purposes apart.
_SHARDS, _BLOCK, _BEGIN, _TASK = 1, 2, 3, 4


@dataclass(frozen=True)
class Order:
    """The order of a training set. `shard_rows` (S,) rows of every shard, in index order; some may be 0."""

    shard_rows: np.ndarray
    global_batch: int
    streams: int
    block_shards: int
    seed: int
    epoch_steps: int | None = None  # None: as many as there are whole batches
    samples: np.ndarray | None = None  # (n,) ascending sample numbers that this order is over; None: all of the index

    def __post_init__(self):
        assert self.global_batch % self.streams == 0, (self.global_batch, self.streams)
        assert 0 < self.num_steps <= self.num_rows // self.global_batch, "a set smaller than what an epoch reads"
        assert self.samples is None or len(self.samples) == self.num_rows, (len(self.samples), self.num_rows)

    @property
    def num_rows(self) -> int:
        return int(self.shard_rows.sum())

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same for every rank."""
        return self.epoch_steps or self.num_rows // self.global_batch

    @property
    def rows_per_stream(self) -> int:
        return self.num_steps * (self.global_batch // self.streams)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that a step reads a batch of each; none: one batch with the labels of all."""
        return ()

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> EpochPlan:
        return EpochPlan(self, epoch=epoch, rank=rank, num_ranks=num_ranks)


@dataclass(frozen=True)
class TaskOrders:
    """An order a task, over the samples that carry its labels; all have the same number of steps."""

    orders: dict[str, Order]

    def __post_init__(self):
        assert len({order.num_steps for order in self.orders.values()}) == 1, self.orders

    @property
    def num_steps(self) -> int:
        return next(iter(self.orders.values())).num_steps

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.orders)

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> TaskPlans:
        plans = [order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks) for order in self.orders.values()]
        return TaskPlans(plans)


def build_task_orders(
    labelled: dict[str, np.ndarray],
    shard_rows: np.ndarray,
    *,
    global_batch: int,
    streams: int,
    block_shards: int,
    seed: int,
    epoch_steps: int,
) -> TaskOrders:
    """Make the order of every task from the ascending numbers of the samples that carry its labels."""
    bounds = np.concatenate([[0], np.cumsum(shard_rows)])
    orders = {}
    for number, (task, samples) in enumerate(labelled.items()):
        rows_here = np.diff(np.searchsorted(samples, bounds))
        # A seed of its own: else sets that carry the labels of two tasks alike would give both the same batches.
        own_seed = int(_rng(seed, _TASK, number).integers(1 << 62))
        orders[task] = Order(rows_here, global_batch, streams, block_shards, own_seed, epoch_steps, samples)
    return TaskOrders(orders)


class EpochPlan:
    """One rank's part of one epoch. Costs O(shards) to make; blocks are shuffled when first asked for."""

    def __init__(self, order: Order, *, epoch: int, rank: int, num_ranks: int):
        assert 0 <= rank < num_ranks <= order.streams, (rank, num_ranks, order.streams)
        self.order, self.epoch = order, epoch
        self.streams = range(rank, order.streams, num_ranks)
        # The line: shard s of the epoch's permutation covers places [starts[i], starts[i + 1]).
        self._shards = _rng(order.seed, epoch, _SHARDS).permutation(len(order.shard_rows))
        self._begin = 0  # the first place that is read
        if order.epoch_steps:
            self._shards = np.tile(self._shards, 2)  # a circle, unrolled: no sample comes twice in one round of it
            self._begin = int(_rng(order.seed, epoch, _BEGIN).integers(order.num_rows))
        self._starts = np.concatenate([[0], np.cumsum(order.shard_rows[self._shards])])
        self._index_starts = np.concatenate([[0], np.cumsum(order.shard_rows)[:-1]])
        self._shuffled: dict[int, tuple[int, int, np.ndarray]] = {}  # stream -> its block: start, stop, samples

    def samples(self, step: int) -> np.ndarray:
        """Return (n,) int64 sample numbers this rank reads at `step`, ordered by stream."""
        return self.samples_of(step, 1)[0]

    def samples_of(self, step: int, num_steps: int) -> np.ndarray:
        """Return (num_steps, n) int64: the samples of several steps, at little more than the cost of one."""
        assert 0 <= step < step + num_steps <= self.order.num_steps, (step, num_steps, self.order.num_steps)
        streams = [self.stream_samples(stream, step, num_steps).reshape(num_steps, -1) for stream in self.streams]
        found = np.concatenate(streams, axis=1)
        return found if self.order.samples is None else self.order.samples[found]

    def stream_samples(self, stream: int, step: int, num_steps: int = 1) -> np.ndarray:
        """Return the (num_steps * global_batch / streams,) samples that one stream gives to steps from `step` on.

        They count the rows of `order.shard_rows`: its `samples` are not looked up.
        """
        share = self.order.global_batch // self.order.streams
        begin = self._begin + stream * self.order.rows_per_stream
        at, end = begin + step * share, begin + (step + num_steps) * share
        parts = []
        while at < end:
            start, stop, samples = self._block(stream, at)
            upto = min(end, stop)
            parts.append(samples[at - start : upto - start])
            at = upto
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def shards_ahead(self, step: int, num_steps: int = 1) -> list[int]:
        """Return the shards (numbers in the index) of the blocks that steps [step, step + num_steps) read from.

        In the order of need: the first shards of all streams come before the later ones of any.
        """
        share = self.order.global_batch // self.order.streams
        found = []
        for stream in self.streams:
            begin = self._begin + stream * self.order.rows_per_stream
            first = self._block_around(stream, begin + step * share)[0]
            last_place = min((step + num_steps) * share, self.order.rows_per_stream) - 1
            stop = self._block_around(stream, begin + last_place)[1]
            low, high = np.searchsorted(self._starts, [first, stop - 1], side="right") - 1
            found.append(self._shards[low : high + 1].tolist())
        return [shard for shard in _in_turn(found) if self.order.shard_rows[shard]]

    def _block_around(self, stream: int, place: int) -> tuple[int, int]:
        """Return the places [start, stop) of the block of `stream` that holds `place`.

        Blocks are cut at every `block_shards`-th shard boundary of the line, and at the stream's own ends.
        """
        length = self.order.rows_per_stream
        begin, end = self._begin + stream * length, self._begin + (stream + 1) * length
        size = self.order.block_shards
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        low = shard // size * size
        high = min(low + size, len(self._starts) - 1)
        return max(begin, int(self._starts[low])), min(end, int(self._starts[high]))

    def _block(self, stream: int, place: int) -> tuple[int, int, np.ndarray]:
        """Return the block of `stream` that holds `place`, and its samples shuffled; the stream's latest is kept."""
        kept = self._shuffled.get(stream)
        if kept is None or not kept[0] <= place < kept[1]:
            start, stop = self._block_around(stream, place)
            places = np.arange(start, stop)
            shards = np.searchsorted(self._starts, places, side="right") - 1
            samples = self._index_starts[self._shards[shards]] + places - self._starts[shards]
            # Keyed by the stream too: a shard that two streams share is shuffled on its own in each.
            _rng(self.order.seed, self.epoch, _BLOCK, stream, start).shuffle(samples)
            kept = self._shuffled[stream] = (start, stop, samples)
        return kept


class TaskPlans:
    """One rank's part of one epoch of `TaskOrders`: the plans of all tasks side by side."""

    def __init__(self, plans: list[EpochPlan]):
        self.plans = plans

    def samples_of(self, step: int, num_steps: int) -> np.ndarray:
        """Return (num_steps, tasks * n) int64: every step's samples, those of the first task first, n of each."""
        return np.concatenate([plan.samples_of(step, num_steps) for plan in self.plans], axis=1)

    def shards_ahead(self, step: int, num_steps: int = 1) -> list[int]:
        """Return the shards that steps [step, step + num_steps) read from, in the order of need."""
        return _in_turn([plan.shards_ahead(step, num_steps) for plan in self.plans])


def _in_turn(lists: list[list[int]]) -> list[int]:
    """Merge lists: the first entries of all, then the second ones, each number once."""
    entries = chain.from_iterable(zip_longest(*lists))
    return list(dict.fromkeys(entry for entry in entries if entry is not None))


def eval_range(num_rows: int, *, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the samples [start, stop) a rank evaluates: over all ranks every sample exactly once."""
    return num_rows * rank // num_ranks, num_rows * (rank + 1) // num_ranks


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
