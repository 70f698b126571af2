"""Which rows every rank reads at every step: a pure function of (shard sizes, seed, epoch, step, rank, ranks).

No torch, no files, no clock. How it works:

    epoch     a seeded permutation of the shards, laid end to end: a circle of N samples
    blocks    the circle is cut at every few shard boundaries; samples are shuffled within each block
    streams   from anywhere in the circle on, steps * global_batch samples are cut into C canonical streams, all as long
    step      takes the next global_batch / C samples of every stream
    rank      r of R reads the streams c with c = r (mod R)

A stream belongs to exactly one rank. So the set of rows of a step does not depend on R, and every rank has the same
number of steps. The state to resume is (epoch, step): whole blocks before it are skipped unopened. An epoch leaves out
at most global_batch - 1 samples; with `epoch_steps`, all that these steps do not read. Every sample is as likely to be
left out as any other. Samples are numbered by their place in the index.

A set of up to `block_shards` shards is one block: any two samples of it share a batch as often as if all were shuffled.
In a set of many shards the streams lie far apart, and a step takes from all of them. Two samples of one block share a
batch only where a stream gives a step more than one sample, or where a stream is not longer than the block.

Runs continue with the order they were begun with. In the first `VERSIONS` a block ended where its stream did, and the
circle was a line, whose end was always left out, unless `epoch_steps` was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import numpy as np

# Keys that keep the random draws of different purposes apart.
_SHARDS, _BLOCK, _BEGIN = 1, 2, 3
TASK_KEY = 4
VERSIONS = (1, 2)


@dataclass(frozen=True)
class Order:
    """The order of a training set. `shard_rows` (S,) rows of every shard, in index order; some may be 0."""

    shard_rows: np.ndarray
    global_batch: int
    streams: int
    block_shards: int
    seed: int
    epoch_steps: int | None = None  # None: as many as there are whole batches
    samples: np.ndarray | None = None  # (n,) sample numbers that this order is over, ascending; None: all of the index
    version: int = VERSIONS[-1]

    def __post_init__(self):
        assert self.global_batch % self.streams == 0, (self.global_batch, self.streams)
        assert 0 < self.num_steps <= self.num_rows // self.global_batch, "a set smaller than what an epoch reads"
        assert self.version in VERSIONS, self.version
        assert self.samples is None or len(self.samples) == self.num_rows, (len(self.samples), self.num_rows)

    @property
    def num_rows(self) -> int:
        """Samples of the set; an epoch may read fewer."""
        return int(self.shard_rows.sum())

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same for every rank."""
        return self.epoch_steps or self.num_rows // self.global_batch

    @property
    def rows_per_stream(self) -> int:
        """Samples that one canonical stream gives in an epoch."""
        return self.num_steps * (self.global_batch // self.streams)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that a step reads a batch of each; none: one batch with the labels of all."""
        return ()

    def shards_in_hand(self, num_ranks: int, *, num_steps: int) -> int:
        """Shards that the blocks of `num_steps` steps of a rank have at most, where shards are about equally large."""
        used = int(np.count_nonzero(self.shard_rows))
        rows = num_steps * self.global_batch // self.streams
        of_stream = rows * used // self.num_rows + 2 * self.block_shards
        return min(-(-self.streams // num_ranks) * of_stream, used)

    def of_version(self, version: int) -> Order:
        """Return this order as another version of the algorithm makes it: an old run goes on with its own."""
        return replace(self, version=version)

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> EpochPlan:
        """Return what a rank reads in an epoch."""
        return EpochPlan(self, epoch=epoch, rank=rank, num_ranks=num_ranks)


class EpochPlan:
    """One rank's part of one epoch. Costs O(shards) to make; blocks are shuffled when first asked for."""

    def __init__(self, order: Order, *, epoch: int, rank: int, num_ranks: int):
        assert 0 <= rank < num_ranks <= order.streams, (rank, num_ranks, order.streams)
        self.order, self.epoch = order, epoch
        self.streams = range(rank, order.streams, num_ranks)
        self._shards, self._begin = draw(order.seed, epoch, _SHARDS).permutation(len(order.shard_rows)), 0
        if order.version > 1 or order.epoch_steps:
            self._begin = int(draw(order.seed, epoch, _BEGIN).integers(order.num_rows))  # the first place that is read
            if order.version == 1:
                self._shards = np.tile(self._shards, 2)  # unrolled: its blocks may lie over the circle's seam
        # Shard i of these covers places [starts[i], starts[i + 1]) of the circle.
        self._starts = np.concatenate([[0], np.cumsum(order.shard_rows[self._shards])])
        self._index_starts = np.concatenate([[0], np.cumsum(order.shard_rows)[:-1]])
        self._shuffled: dict[int, tuple[int, int, np.ndarray]] = {}  # stream -> its latest block: start, stop, samples

    def samples(self, step: int) -> np.ndarray:
        """Return (n,) int64 sample numbers this rank reads at `step`, ordered by stream."""
        return self.samples_of(step, 1)[0]

    def samples_of(self, step: int, num_steps: int) -> np.ndarray:
        """Return (num_steps, n) int64: the samples of several steps, at little more than the cost of one."""
        assert 0 <= step < step + num_steps <= self.order.num_steps, (step, num_steps, self.order.num_steps)
        streams = [self.stream_samples(stream, step, num_steps).reshape(num_steps, -1) for stream in self.streams]
        places = np.concatenate(streams, axis=1)
        return places if self.order.samples is None else self.order.samples[places]

    def stream_samples(self, stream: int, step: int, num_steps: int = 1) -> np.ndarray:
        """Return the (num_steps * global_batch / streams,) samples that one stream gives to steps from `step` on.

        They count the rows of `order.shard_rows`: its `samples` are not looked up.
        """
        parts = []
        for start, stop, place, count in self._pieces(stream, step, num_steps):
            parts.append(self._shuffle(stream, start, stop)[place - start : place - start + count])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def shards_ahead(self, step: int, num_steps: int = 1) -> list[int]:
        """Return the shards (numbers in the index) of the blocks that steps [step, step + num_steps) read from.

        In the order of need: the first shards of all streams come before the later ones of any.
        """
        of_streams = []
        for stream in self.streams:
            of_stream = []
            for start, stop, *_ in self._pieces(stream, step, min(num_steps, self.order.num_steps - step)):
                low, high = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
                of_stream += self._shards[low : high + 1].tolist()
            of_streams.append(of_stream)
        return [shard for shard in in_turn(of_streams) if self.order.shard_rows[shard]]

    def _pieces(self, stream: int, step: int, num_steps: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, stop, place, count): `count` samples from `place` on are read, of the block [start, stop)."""
        order, circle = self.order, int(self._starts[-1])
        share = order.global_batch // order.streams
        begin = self._begin + stream * order.rows_per_stream
        at, end = begin + step * share, begin + (step + num_steps) * share
        while at < end:
            place = at % circle
            shard = int(np.searchsorted(self._starts, place, side="right")) - 1
            low = shard // order.block_shards * order.block_shards
            high = min(low + order.block_shards, len(self._shards))
            start, stop = int(self._starts[low]), int(self._starts[high])
            if order.version == 1:
                start, stop = max(start, begin), min(stop, begin + order.rows_per_stream)
            count = min(end - at, stop - place)
            yield start, stop, place, count
            at += count

    def _shuffle(self, stream: int, start: int, stop: int) -> np.ndarray:
        """Return the samples of the block at places [start, stop), shuffled; the latest of every stream is kept.

        From version 2 on it is the same for all streams that read of it: of a set of one large shard, all of them do.
        """
        kept = self._shuffled.get(stream)
        if self.order.version > 1 and (kept is None or kept[:2] != (start, stop)):
            kept = next((block for block in self._shuffled.values() if block[:2] == (start, stop)), None)
        if kept is None or kept[:2] != (start, stop):
            places = np.arange(start, stop)
            shards = np.searchsorted(self._starts, places, side="right") - 1
            samples = self._index_starts[self._shards[shards]] + places - self._starts[shards]
            # In version 1 a block belongs to a stream: a shard that two share is shuffled on its own in each.
            key = (stream, start) if self.order.version == 1 else (start,)
            self.arrange(samples, places, draw(self.order.seed, self.epoch, _BLOCK, *key))
            kept = (start, stop, samples)
        self._shuffled[stream] = kept
        return kept[2]

    def arrange(self, samples: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> None:
        """Bring the samples (n,) of a block into the order in which they lie at its places (n,) of the circle."""
        rng.shuffle(samples)


def eval_range(num_rows: int, *, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the samples [start, stop) a rank evaluates: over all ranks every sample exactly once."""
    return num_rows * rank // num_ranks, num_rows * (rank + 1) // num_ranks


def in_turn(lists: list[list[int]]) -> list[int]:
    """Merge lists: the first entries of all, then the second ones, each number once."""
    entries = chain.from_iterable(zip_longest(*lists))
    return list(dict.fromkeys(entry for entry in entries if entry is not None))


def draw(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
