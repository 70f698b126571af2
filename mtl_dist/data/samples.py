"""What training, evaluation and an order need of any set of samples, and how a set is opened."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.cache import Cache
from mtl_dist.data.classes import By, Classes, join_classes, read_classes
from mtl_dist.data.features import FeatureReader, FeatureRows
from mtl_dist.data.image_videos import ImageRows
from mtl_dist.data.index import FEATURES, FORMAT, Sets
from mtl_dist.data.reader import Names, ShardReader
from mtl_dist.data.sequences import PartVideos, VideoSource, WindowSamples
from mtl_dist.data.windows import Windows
from mtl_dist.families import reads_videos
from mtl_dist.label_counts import LabelCounts
from mtl_dist.tasks import PERSON, SET_BITS, Batch, Labels


class Samples(Protocol):
    """Samples by number, in groups that are fetched at once: shards, or videos. Safe to share between threads."""

    counts: LabelCounts
    sha256: str  # identity of the content
    group_sizes: np.ndarray  # (S,) samples of every group: what an order calls `shard_rows`
    max_open: int  # groups that are kept open, each with a file
    frames: np.ndarray | None  # (N,) frames of every sample; None: one of each

    def at_epoch(self, epoch: int) -> Samples:
        """Return the samples of an epoch: what a number stands for may be another in each."""
        ...

    def whole(self) -> Samples:
        """Return the set as it is evaluated: every row in one sample."""
        ...

    def read(self, samples: np.ndarray) -> Batch:
        """Read samples (n,) by number."""
        ...

    def give_back(self, batch: Batch) -> None:
        """Let the inputs of a batch be overwritten: nobody reads them any more. New memory costs time."""

    def decode_for(self, device: torch.device) -> None:
        """Read into memory that a device copies from by itself, where that saves a copy on the host."""

    def warm(self, groups: Iterable[int]) -> None:
        """Fetch groups ahead of need."""

    def keep_open(self, count: int) -> None:
        """Keep so many groups open at least, where there are as many."""

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        """Return {task: (n,) ascending numbers of the samples with a label of it}; `progress` is told of groups."""
        ...

    def classes(self, by: By, progress: Callable[[int], None] = lambda count: None) -> Classes:
        """Return the classes of all samples; `progress` is told of groups."""
        ...

    def names(self) -> Names:
        """Return the names of all samples."""
        ...


@dataclass(frozen=True)
class ImageSamples:
    """The pictures of a shard set, decoded to `size` pixels a side."""

    reader: ShardReader
    size: int
    frames: None = None

    def at_epoch(self, epoch: int) -> ImageSamples:
        return self

    def whole(self) -> ImageSamples:
        return self

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

    def decode_for(self, device: torch.device) -> None:
        self.reader.decode_for(device)

    def warm(self, groups: Iterable[int]) -> None:
        self.reader.warm(groups)

    def keep_open(self, count: int) -> None:
        self.reader.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        return self.reader.labelled_samples(progress)

    def classes(self, by: By, progress: Callable[[int], None] = lambda count: None) -> Classes:
        return read_classes(by, self.reader.sidecars(progress))

    def names(self) -> Names:
        return self.reader.names()


@dataclass(frozen=True)
class PartSamples:
    """Some of the pictures of a set, numbered anew; groups are those of the set, some of them empty."""

    every: ImageSamples
    chosen: np.ndarray  # (n,) int64 ascending numbers in the set
    counts: LabelCounts
    sha256: str
    frames: None = None

    def at_epoch(self, epoch: int) -> PartSamples:
        return self

    def whole(self) -> PartSamples:
        return self

    @cached_property
    def group_sizes(self) -> np.ndarray:
        bounds = np.cumsum([0, *self.every.group_sizes])
        return np.diff(np.searchsorted(self.chosen, bounds))

    @property
    def max_open(self) -> int:
        return self.every.max_open

    def read(self, samples: np.ndarray) -> Batch:
        batch = self.every.read(self.chosen[samples])
        return batch._replace(samples=torch.from_numpy(np.array(samples, np.int64)))

    def give_back(self, batch: Batch) -> None:
        self.every.give_back(batch)

    def decode_for(self, device: torch.device) -> None:
        self.every.decode_for(device)

    def warm(self, groups: Iterable[int]) -> None:
        self.every.warm(groups)

    def keep_open(self, count: int) -> None:
        self.every.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        of_all = self.every.labelled(progress)
        return {task: np.flatnonzero(np.isin(self.chosen, numbers)) for task, numbers in of_all.items()}

    def classes(self, by: By, progress: Callable[[int], None] = lambda count: None) -> Classes:
        return self.every.classes(by, progress).of(self.chosen)

    def names(self) -> Names:
        rows, images, videos = self.every.names()
        places = self.chosen.tolist()
        return Names(rows[self.chosen], [images[place] for place in places], [videos[place] for place in places])


class Mixture:
    """Several sets as one: their samples and groups one behind the other.

    A row keeps its number in its own set, and has the set's number (from 0) in the bits above `SET_BITS`. A name begins
    with the set's number (from 1).
    """

    def __init__(self, parts: Sequence[Samples], sha256: str):
        self.parts, self.sha256 = parts, sha256
        self.counts = functools.reduce(LabelCounts.plus, (part.counts for part in parts))
        self.group_sizes = np.concatenate([part.group_sizes for part in parts])
        of_parts = [part.frames for part in parts]
        self.frames = None if any(frames is None for frames in of_parts) else np.concatenate(of_parts)
        self._starts = np.cumsum([0, *(part.group_sizes.sum() for part in parts)])
        self._group_starts = np.cumsum([0, *(len(part.group_sizes) for part in parts)])

    @property
    def max_open(self) -> int:
        return sum(part.max_open for part in self.parts)

    def at_epoch(self, epoch: int) -> Mixture:
        return Mixture([part.at_epoch(epoch) for part in self.parts], self.sha256)

    def whole(self) -> Mixture:
        return Mixture([part.whole() for part in self.parts], self.sha256)

    def read(self, samples: np.ndarray) -> Batch:
        which = np.searchsorted(self._starts, samples, side="right") - 1
        read = [self._read_part(number, samples[which == number]) for number in np.unique(which).tolist() or [0]]
        columns = [_join(column) for column in zip(*(_tensors(batch) for batch in read))]
        places = torch.from_numpy(np.argsort(np.argsort(which, kind="stable"), kind="stable"))
        inputs, valid, numbers, *labels = (column[places] for column in columns)
        return Batch(inputs, valid, Labels(*labels), numbers - 1, torch.from_numpy(np.array(samples, np.int64)))

    def _read_part(self, number: int, samples: np.ndarray) -> Batch:
        batch = self.parts[number].read(samples - self._starts[number])
        return batch._replace(rows=torch.where(batch.rows >= 0, batch.rows + (number << SET_BITS), batch.rows))

    def give_back(self, batch: Batch) -> None:
        """Its memory is its own."""

    def decode_for(self, device: torch.device) -> None:
        """What was read is put together in other memory."""

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

    def classes(self, by: By, progress: Callable[[int], None] = lambda count: None) -> Classes:
        return join_classes(by, [part.classes(by, progress) for part in self.parts], self._starts[:-1].tolist())

    def names(self) -> Names:
        of_parts = [part.names() for part in self.parts]
        rows = [names.rows + (number << SET_BITS) for number, names in enumerate(of_parts)]
        images = [f"{number}/{image}" for number, names in enumerate(of_parts, 1) for image in names.images]
        videos = [_name_apart(video, number) for number, names in enumerate(of_parts, 1) for video in names.videos]
        return Names(np.concatenate(rows), images, videos)


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.inputs, batch.valid, batch.rows + 1, *batch.labels]  # of padding every tensor has zeros


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Put (B, T, ...) tensors behind one another, padded to the longest T."""
    longest = max(tensor.shape[1] for tensor in tensors)
    if all(tensor.shape[1] == longest for tensor in tensors):
        return torch.cat(tensors)
    joined = tensors[0].new_zeros(sum(map(len, tensors)), longest, *tensors[0].shape[2:])
    for part, tensor in zip(joined.split([len(tensor) for tensor in tensors]), tensors):
        part[:, : tensor.shape[1]] = tensor
    return joined


def _name_apart(video: str | None, number: int) -> str | None:
    """Tell the videos of several sets apart; what stands for a person's pictures stays known as that."""
    if video is None:
        return None
    kind = PERSON if video.startswith(PERSON) else ""
    return f"{kind}{number}/{video.removeprefix(kind)}"


def _open_images(sets: Sets, config: Config, cache: Cache) -> Samples:
    ((uri, index),) = sets.pairs()
    samples = ImageSamples(ShardReader(uri, index, cache), config.data.image_size)
    if not sets.part:
        return samples
    return PartSamples(samples, np.flatnonzero(sets.part.kept[0].rows), sets.labels, sets.sha256)


def _open_features(sets: Sets, config: Config, cache: Cache) -> Samples:
    source = FeatureRows([FeatureReader(uri, index, cache) for uri, index in sets.pairs()])
    return _windows(sets, source, sets.part and sets.part.kept[0].holds(source.video_rows), config)


def _open_image_windows(sets: Sets, config: Config, cache: Cache) -> Samples:
    ((uri, index),) = sets.pairs()
    source = ImageRows(ShardReader(uri, index, cache), config.data.image_size)
    return _windows(sets, source, sets.part and sets.part.kept[0].rows[source.rows.first_samples], config)


def _windows(sets: Sets, source: VideoSource, holds: np.ndarray | None, config: Config) -> WindowSamples:
    """Cut the videos of a source into windows, or those of them that a part `holds`, (V,) bool."""
    own = config.model.sequence
    if holds is not None:
        source = PartVideos(source, np.flatnonzero(holds), sets.labels)
    windows = Windows(source.video_rows, own.window, config.run.seed)
    return WindowSamples(source, sets.sha256, windows, own.context)


class Kind(NamedTuple):
    """How sets of a format are read."""

    open: Callable[[Sets, Config, Cache], Samples]  # of sets that are of the same pictures
    noun: str  # what a sample is


# By the format of the index, and whether the model reads videos.
KINDS = {
    (FORMAT, False): Kind(_open_images, "rows"),
    (FORMAT, True): Kind(_open_image_windows, "windows"),
    (FEATURES, True): Kind(_open_features, "windows"),
}


def _kind_of(sets: Sets, config: Config) -> Kind:
    return KINDS[sets.indexes[0].format, reads_videos(config.model.name)]


def noun_of(sets: Sets, config: Config) -> str:
    """Return what samples are called."""
    return _kind_of(sets, config).noun


def open_pictures(sets: Sets, size: int, cache: Cache) -> Samples:
    """Open sets of pictures, all of each, as single ones of `size` pixels a side, whatever a model makes of them."""
    parts = [ImageSamples(ShardReader(uri, index, cache), size) for uri, index in sets.pairs()]
    return parts[0] if len(parts) == 1 else Mixture(parts, sets.sha256)


def open_samples(sets: Sets, config: Config, cache: Cache) -> Samples:
    """Open one or several sets as one, each as what its index says it is."""
    parts = [_kind_of(sets, config).open(own, config, cache) for own in sets.each()]
    return parts[0] if len(parts) == 1 else Mixture(parts, sets.sha256)
