"""The order of several sets of which each gives a part of every step (data.mix): a pure function, as `order.py`.

Of a step's samples set i gives counts(epoch)[i], which add up to the global batch. Set i is one endless row of samples,
pass after pass: the samples of a pass are those of its own `Order`, of streams that give one sample each in turn, with
the number of the pass for the epoch. A step takes the next ones. So no sample comes twice in a pass, whatever the other
sets do and however their parts change; a pass leaves out fewer samples than the set has streams, others each time.

A stream belongs to one rank. Of every set a rank has its part of a step's samples, or one less or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_dist.config import Config
from mtl_dist.data.order import EpochPlan, Order, draw, in_turn

MIX_KEY = 5  # keeps these draws apart from others
MAX_STREAMS = 64  # of a set


@dataclass(frozen=True)
class MixedOrder:
    """An order a set, and what each gives of a step. Samples and groups are numbered through all sets."""

    orders: tuple[Order, ...]
    global_batch: int
    num_steps: int  # of an epoch
    counts: tuple[tuple[int, ...], ...]  # by epoch, of the last one also after it: samples of every set in a step

    def __post_init__(self):
        assert all(sum(of_epoch) == self.global_batch for of_epoch in self.counts), self.counts
        assert all(
            max(of_set) <= order.num_steps * order.streams for of_set, order in zip(zip(*self.counts), self.orders)
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return ()

    @property
    def version(self) -> int:
        return self.orders[0].version

    def of_version(self, version: int) -> MixedOrder:
        return replace(self, orders=tuple(order.of_version(version) for order in self.orders))

    def shards_in_hand(self, num_ranks: int, *, num_steps: int) -> int:
        """As `Order.shards_in_hand`, of all sets."""
        most = map(max, zip(*self.counts))
        steps = (-(-num_steps * count // order.streams) for count, order in zip(most, self.orders))
        return sum(order.shards_in_hand(num_ranks, num_steps=n) for n, order in zip(steps, self.orders))

    def counts_at(self, epoch: int) -> tuple[int, ...]:
        """Return how many samples every set gives to a step of an epoch."""
        return self.counts[min(epoch, len(self.counts) - 1)]

    def before(self, epoch: int) -> list[int]:
        """Return how many samples of every set all earlier epochs took."""
        known, rest = self.counts[:epoch], max(epoch - len(self.counts), 0)
        totals = np.sum([*known, [0] * len(self.orders)], axis=0) + rest * np.array(self.counts[-1])
        return (self.num_steps * totals).tolist()

    def passes(self, num_epochs: int) -> list[float]:
        """Return how often so many epochs read every set."""
        lengths = [order.num_steps * order.streams for order in self.orders]
        return [taken / length for taken, length in zip(self.before(num_epochs), lengths)]

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> MixedPlan:
        """Return what a rank reads in an epoch."""
        return MixedPlan(self, epoch=epoch, rank=rank, num_ranks=num_ranks)


def build_mixed_order(
    of_sets: Sequence[np.ndarray],
    shares: Sequence[Sequence[float]],
    *,
    global_batch: int,
    num_steps: int,
    block_shards: int,
    seed: int,
) -> MixedOrder:
    """Make an order of sets with these group sizes; `shares` of every epoch, which are divided by their sum."""
    orders = []
    for number, sizes in enumerate(of_sets):
        streams = min(MAX_STREAMS, int(sizes.sum()))
        own_seed = int(draw(seed, MIX_KEY, number).integers(1 << 62))
        orders.append(Order(sizes, streams, streams, block_shards, own_seed))
    counts = tuple(split_batch(global_batch, of_epoch) for of_epoch in shares)
    return MixedOrder(tuple(orders), global_batch, num_steps, counts)


def shares_of(config: Config) -> list[tuple[float, ...]]:
    """Return the shares of every set in a step, epoch by epoch; those of the last go on. Empty: the sets are one."""
    first, last = config.data.mix, config.data.mix_to
    if not last:
        return [first] if first else []
    span = max(config.train.epochs - 1, 1)
    scaled = [tuple(share / sum(shares) for share in shares) for shares in (first, last)]
    return [tuple(a + (b - a) * epoch / span for a, b in zip(*scaled)) for epoch in range(config.train.epochs)]


def pass_rows(num_rows: int) -> int:
    """Return how many samples a pass over a set of so many reads."""
    streams = max(min(MAX_STREAMS, num_rows), 1)  # a part of a set may have no rows
    return num_rows // streams * streams


def split_batch(batch: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Part a batch as these shares say, to whole samples: the largest remainders are rounded up."""
    exact = batch * np.asarray(shares, float) / np.sum(shares)
    counts = np.floor(exact + 1e-9).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]:
        counts[place] += 1
    return tuple(counts.tolist())


class MixedPlan:
    """One rank's part of one epoch of a `MixedOrder`."""

    def __init__(self, order: MixedOrder, *, epoch: int, rank: int, num_ranks: int):
        self.order, self.rank, self.num_ranks = order, rank, num_ranks
        self._counts, self._before = order.counts_at(epoch), order.before(epoch)
        starts = [(order.num_rows, len(order.shard_rows)) for order in order.orders]
        self._starts = np.cumsum([(0, 0), *starts], axis=0)[:-1].tolist()  # of every set: its first sample and group
        self._plans: dict[tuple[int, int], EpochPlan] = {}  # set, pass

    def samples_of(self, step: int, num_steps: int) -> list[np.ndarray]:
        """Return the samples (n,) int64 that this rank reads at each of several steps; n is not always one."""
        of_steps: list[list[np.ndarray]] = [[] for _ in range(num_steps)]
        for number, count in enumerate(self._counts):
            begin = self._before[number] + step * count
            places = np.arange(begin, begin + num_steps * count).reshape(num_steps, count)
            mine = places % self.order.orders[number].streams % self.num_ranks == self._rank_of(number)
            samples = np.full(places.shape, -1)
            samples[mine] = self._read(number, places[mine])
            for of_step, row, is_mine in zip(of_steps, samples, mine):
                of_step.append(row[is_mine])
        return [np.concatenate(of_step) for of_step in of_steps]

    def shards_ahead(self, step: int, num_steps: int = 1) -> list[int]:
        """Return the groups (numbered through all sets) that steps [step, step + num_steps) read from, as needed."""
        of_sets = []
        for number, count in enumerate(self._counts):
            order = self.order.orders[number]
            begin, end = (self._before[number] + at * count for at in (step, step + num_steps))
            found, turn, last = [], begin // order.streams, -(-end // order.streams)
            while turn < last:
                which, first = divmod(turn, order.num_steps)
                length = min(last - turn, order.num_steps - first)
                found += self._plan(number, which).shards_ahead(first, length)
                turn += length
            of_sets.append([self._starts[number][1] + group for group in dict.fromkeys(found)])
        return in_turn(of_sets)

    def _rank_of(self, number: int) -> int:
        """The remainder of this rank's streams of a set: who has a stream more is another rank in each set."""
        return (self.rank - number) % self.num_ranks

    def _read(self, number: int, places: np.ndarray) -> np.ndarray:
        """Return the samples at places of the endless row of a set, all of this rank's streams."""
        order, samples = self.order.orders[number], np.empty(len(places), np.int64)
        turns, streams = np.divmod(places, order.streams)
        whichs, steps = np.divmod(turns, order.num_steps)
        for which in np.unique(whichs).tolist():
            plan = self._plan(number, which)
            for stream in np.unique(streams[whichs == which]).tolist():
                here = np.flatnonzero((whichs == which) & (streams == stream))
                first, last = int(steps[here].min()), int(steps[here].max())
                samples[here] = plan.stream_samples(stream, first, last - first + 1)[steps[here] - first]
        return samples + self._starts[number][0]

    def _plan(self, number: int, which: int) -> EpochPlan:
        """Return this rank's part of a pass; of a set the latest two are kept."""
        key = (number, which)
        if key not in self._plans:
            self._plans = {
                other: plan for other, plan in self._plans.items() if other[0] != number or which - other[1] == 1
            }
            order = self.order.orders[number]
            plan = EpochPlan(order, epoch=which, rank=0, num_ranks=1)
            plan.streams = range(self._rank_of(number), order.streams, self.num_ranks)
            self._plans[key] = plan
        return self._plans[key]
