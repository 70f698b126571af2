"""An order that draws rows of rare classes more often (data.balance): a pure function, as `order.py`.

    weight    of a class of n rows: n to the power of -data.balance_power. 1: as many rows of each class (class-balanced
              sampling, Kang et al. 2020, arXiv 1910.09217); 1/2: as the square roots of their numbers (Mahajan et al.
              2018, arXiv 1805.00932). A row of several classes has the weight of the rarest (Gupta et al. 2019, arXiv
              1908.03195). A row of none has the mean of all others: it comes as often as it would without this
    expected  how often a row comes in an epoch: its part of all weights, times the rows that an epoch reads
    drawn     systematic resampling: rows lie end to end on a line, each as long as it is expected, sorted by the rarest
              class and shuffled in it once for all. A row comes as often as a tooth of a comb lies on it, whose teeth
              are at u, u + 1, u + 2, ...: floor or ceil of its expected number, and a class in all does so too
    epochs    u turns by the golden ratio from epoch to epoch: after E epochs a row's sum is off by O(log E) at most
    order     an `Order` over the rows that were drawn, each as often as it came, in the shards that they are in

Lengths are whole multiples of 2^-32, and made without floats: all machines draw the same rows. In a block of the order
the copies of a row are dealt to different steps, while there are as many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property

import numpy as np

from mtl_dist.data.classes import Classes
from mtl_dist.data.order import EpochPlan, Order, draw

BALANCE_KEY = 6  # keeps these draws apart from others
UNIT_BITS = 32
UNIT = 1 << UNIT_BITS  # of lengths: a row that comes once an epoch is so long
TURN = 0x9E3779B9  # of the comb from epoch to epoch, in units: the golden ratio's part after the point


@dataclass(frozen=True)
class BalancedOrder:
    """The order of a set, `of_set`, with rows drawn for every epoch."""

    of_set: Order  # whose epoch has as many steps, and reads every row once or not at all
    lengths: np.ndarray  # (N,) int64 how often a row is expected in an epoch, in 1 / UNIT; sums up to what one reads
    line: np.ndarray  # (N,) int64 the rows as they lie on the line

    def __post_init__(self):
        assert len(self.lengths) == len(self.line) == self.of_set.num_rows
        assert self.lengths.sum() == self.num_steps * self.of_set.global_batch * UNIT

    @property
    def num_steps(self) -> int:
        return self.of_set.num_steps

    @property
    def tasks(self) -> tuple[str, ...]:
        return ()

    @property
    def version(self) -> int:
        return self.of_set.version

    @property
    def expected(self) -> np.ndarray:
        """(N,) float64 how often an epoch has each row, in the mean of all."""
        return self.lengths / UNIT

    def of_version(self, version: int) -> BalancedOrder:
        return replace(self, of_set=self.of_set.of_version(version))

    def shards_in_hand(self, num_ranks: int, *, num_steps: int) -> int:
        """As `Order.shards_in_hand`. What an epoch reads is of all shards, also where that is a part of their rows."""
        of_set = self.of_set
        rows = -(-num_steps * of_set.num_rows // self.num_steps)  # in so many whole epochs of the set's rows
        return of_set.shards_in_hand(num_ranks, num_steps=-(-rows // of_set.global_batch))

    @cached_property
    def _ends(self) -> np.ndarray:
        """(N,) int64 where the rows of the line end, in units."""
        return np.cumsum(self.lengths[self.line])

    def counts(self, epoch: int) -> np.ndarray:
        """Return (N,) int64: how often every row comes in an epoch."""
        begin = int(draw(self.of_set.seed, 0, BALANCE_KEY).integers(UNIT))
        first = (begin + epoch * TURN) % UNIT
        before = (self._ends - first + UNIT - 1) >> UNIT_BITS  # teeth that lie before the end of each row
        counts = np.empty_like(before)
        counts[self.line] = np.diff(before, prepend=0)
        return counts

    def at_epoch(self, epoch: int) -> Order:
        """Return the order over the rows of an epoch."""
        counts, bounds = self.counts(epoch), np.concatenate([[0], np.cumsum(self.of_set.shard_rows)])
        shard_rows = np.diff(np.concatenate([[0], np.cumsum(counts)])[bounds])
        rows = np.repeat(np.arange(len(counts)), counts)
        return replace(self.of_set, shard_rows=shard_rows, samples=rows, epoch_steps=None)

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> BalancedPlan:
        """Return what a rank reads in an epoch."""
        return BalancedPlan(self.at_epoch(epoch), epoch=epoch, rank=rank, num_ranks=num_ranks)


def build_balanced_order(classes: Classes, of_set: Order, *, power: float) -> BalancedOrder:
    """Make an order of the set in which rare classes come more often, by `power` from 0 (as they are) to 1 (alike)."""
    num_rows, reads, counts = of_set.num_rows, of_set.num_steps * of_set.global_batch, classes.counts
    # Of a row's pairs the rarest class comes first; of two that are as rare the one of the lower number.
    by_row = np.lexsort((classes.classes, counts[classes.classes], classes.samples))
    rows, first = np.unique(classes.samples[by_row], return_index=True)
    rarest = np.full(num_rows, classes.num)  # a number of its own: none
    rarest[rows] = classes.classes[by_row][first]
    of_class = np.bincount(rarest, minlength=classes.num + 1)[:-1]  # rows that have it for their rarest
    lengths = _lengths_of_classes(counts, of_class, mean=Decimal(reads * UNIT) / num_rows, power=power)[rarest]
    line = np.lexsort((draw(of_set.seed, 0, BALANCE_KEY, 1).permutation(num_rows), rarest))
    left = reads * UNIT - int(lengths.sum())  # of rounding: less than a unit a row
    lengths[line[: abs(left)]] += np.sign(left)
    return BalancedOrder(of_set, lengths, line)


def _lengths_of_classes(counts: np.ndarray, of_class: np.ndarray, *, mean: Decimal, power: float) -> np.ndarray:
    """Return (K + 1,) int64 lengths, in units, of rows of every class and of none. Decimals are the same anywhere."""
    exponent = -Decimal(str(power))
    known = {count: Decimal(count) ** exponent for count in set(counts.tolist()) if count}
    weights = [known.get(count, Decimal(0)) for count in counts.tolist()]
    total = sum(count * weight for count, weight in zip(of_class.tolist(), weights))
    scale = mean * int(of_class.sum()) / total if total else Decimal(0)
    return np.array([*(round(scale * weight) for weight in weights), round(mean)], np.int64)


class BalancedPlan(EpochPlan):
    """One rank's part of one epoch of a `BalancedOrder`."""

    def arrange(self, samples: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> None:
        """As `deal_apart`, at random but for the copies of a row."""
        order = self.order
        steps = (places - self._begin) % order.num_rows % order.rows_per_stream * order.streams // order.global_batch
        samples[:] = samples[deal_apart(order.samples[samples], steps, rng)]


def deal_apart(rows: np.ndarray, steps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the numbers (n,) of the entries that come to n places, at random but for the copies of a row.

    `rows` (n,) of every entry, `steps` (n,) of every place. No step has a row twice if no row has more copies than
    there are steps, and all steps as many places. The places are taken in rounds, one of each step in a round, always
    in the same order of steps; rows come one after the other, those of the most copies first, with all their copies.
    """
    _, row, copies = np.unique(rows, return_inverse=True, return_counts=True)
    entries = np.lexsort((rng.permutation(len(copies))[row], -copies[row]))
    places = rng.permutation(len(steps))
    _, step, num_places = np.unique(steps[places], return_inverse=True, return_counts=True)
    rounds = np.empty_like(step)
    firsts = np.repeat(np.cumsum(num_places) - num_places, num_places)
    rounds[np.argsort(step, kind="stable")] = np.arange(len(step)) - firsts
    taken = places[np.lexsort((rng.permutation(len(num_places))[step], rounds))]
    dealt = np.empty_like(entries)
    dealt[taken] = entries
    return dealt
