"""What training, evaluation and an order need of any set of samples, and how a set is opened."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import DataConfig
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import FORMAT, Index, Sets
from mtl_dist.data.reader import Names, ShardReader
from mtl_dist.tasks import PERSON, SET_BITS, Batch, LabelCounts, Labels


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


class Mixture:
    """Several sets as one: their samples and groups one behind the other.

    A row keeps its number in its own set, and has the set's number (from 0) in the bits above `SET_BITS`. A name begins
    with the set's number (from 1).
    """

    def __init__(self, parts: Sequence[Samples], sha256: str):
        self.parts, self.sha256 = parts, sha256
        self.counts = functools.reduce(LabelCounts.plus, (part.counts for part in parts))
        self.group_sizes = np.concatenate([part.group_sizes for part in parts])
        self._starts = np.cumsum([0, *(part.group_sizes.sum() for part in parts)])
        self._group_starts = np.cumsum([0, *(len(part.group_sizes) for part in parts)])

    @property
    def max_open(self) -> int:
        return sum(part.max_open for part in self.parts)

    def read(self, samples: np.ndarray) -> Batch:
        which = np.searchsorted(self._starts, samples, side="right") - 1
        read = [self._read_part(number, samples[which == number]) for number in np.unique(which).tolist() or [0]]
        columns = [torch.cat(column) for column in zip(*(_tensors(batch) for batch in read))]
        places = torch.from_numpy(np.argsort(np.argsort(which, kind="stable"), kind="stable"))
        inputs, valid, rows, *labels = (column[places] for column in columns)
        return Batch(inputs, valid, Labels(*labels), rows, torch.from_numpy(np.array(samples, np.int64)))

    def _read_part(self, number: int, samples: np.ndarray) -> Batch:
        batch = self.parts[number].read(samples - self._starts[number])
        return batch._replace(rows=torch.where(batch.valid, batch.rows + (number << SET_BITS), batch.rows))

    def give_back(self, batch: Batch) -> None:
        """Its memory is its own."""

    def warm(self, groups: Iterable[int]) -> None:
        for group in groups:
            number = int(np.searchsorted(self._group_starts, group, side="right")) - 1
            self.parts[number].warm([group - int(self._group_starts[number])])

    def keep_open(self, count: int) -> None:
        for part in self.parts:
            part.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        of_parts = [part.labelled(progress) for part in self.parts]
        return {
            task: np.concatenate([start + part[task] for start, part in zip(self._starts, of_parts)])
            for task in of_parts[0]
        }

    def names(self) -> Names:
        of_parts = [part.names() for part in self.parts]
        rows = [names.rows + (number << SET_BITS) for number, names in enumerate(of_parts)]
        images = [f"{number}/{image}" for number, names in enumerate(of_parts, 1) for image in names.images]
        videos = [_name_apart(video, number) for number, names in enumerate(of_parts, 1) for video in names.videos]
        return Names(np.concatenate(rows), images, videos)


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.inputs, batch.valid, batch.rows, *batch.labels]


def _name_apart(video: str | None, number: int) -> str | None:
    """Tell the videos of several sets apart; what stands for a person's pictures stays known as that."""
    if video is None:
        return None
    kind = PERSON if video.startswith(PERSON) else ""
    return f"{kind}{number}/{video.removeprefix(kind)}"


def _open_images(uri: str, index: Index, config: DataConfig, cache: Cache) -> Samples:
    return ImageSamples(ShardReader(uri, index, cache), config.image_size)


KINDS: dict[str, Callable[[str, Index, DataConfig, Cache], Samples]] = {FORMAT: _open_images}  # by an index's format


def open_samples(sets: Sets, config: DataConfig, cache: Cache) -> Samples:
    """Open one or several sets as one, each as what its index says it is."""
    parts = [KINDS[index.format](uri, index, config, cache) for uri, index in sets.pairs()]
    return parts[0] if len(parts) == 1 else Mixture(parts, sets.sha256)
