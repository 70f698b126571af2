"""What training, evaluation and an order need of any set of samples, and how a set is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtl_dist.config import DataConfig
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import FORMAT, Index
from mtl_dist.data.reader import Names, ShardReader
from mtl_dist.tasks import Batch, LabelCounts


class Samples(Protocol):
    """Samples by number, in groups that are fetched at once: shards, or videos. Safe to share between threads."""

    counts: LabelCounts
    sha256: str  # identity of the content
    group_sizes: np.ndarray  # (S,) samples of every group: what an order calls `shard_rows`
    max_open: int  # groups that are kept open, each with a file

    def read(self, samples: np.ndarray) -> Batch:
        """Read samples (n,) by number."""
        ...

    def give_back(self, batch: Batch) -> None:
        """Let the inputs of a batch be overwritten: nobody reads them any more. New memory costs time."""

    def warm(self, groups: Iterable[int]) -> None:
        """Fetch groups ahead of need."""

    def keep_open(self, count: int) -> None:
        """Keep so many groups open at least, where there are as many."""

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        """Return {task: (n,) ascending numbers of the samples with a label of it}; `progress` is told of groups."""
        ...

    def names(self) -> Names:
        """Return the names of all samples."""
        ...


@dataclass(frozen=True)
class ImageSamples:
    """The pictures of a shard set, decoded to `size` pixels a side."""

    reader: ShardReader
    size: int

    @property
    def counts(self) -> LabelCounts:
        return self.reader.index.labels

    @property
    def sha256(self) -> str:
        return self.reader.index.sha256

    @property
    def group_sizes(self) -> np.ndarray:
        return self.reader.index.shard_rows

    @property
    def max_open(self) -> int:
        return self.reader.max_open

    def read(self, samples: np.ndarray) -> Batch:
        return self.reader.read_batch(samples, self.size)

    def give_back(self, batch: Batch) -> None:
        self.reader.give_back(batch)

    def warm(self, groups: Iterable[int]) -> None:
        self.reader.warm(groups)

    def keep_open(self, count: int) -> None:
        self.reader.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        return self.reader.labelled_samples(progress)

    def names(self) -> Names:
        return self.reader.names()


def _open_images(uri: str, index: Index, config: DataConfig, cache: Cache) -> Samples:
    return ImageSamples(ShardReader(uri, index, cache), config.image_size)


KINDS: dict[str, Callable[[str, Index, DataConfig, Cache], Samples]] = {FORMAT: _open_images}  # by an index's format


def open_samples(uri: str, index: Index, config: DataConfig, cache: Cache) -> Samples:
    """Open a set, as what its index says it is."""
    return KINDS[index.format](uri, index, config, cache)
