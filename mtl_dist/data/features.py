"""Windows of the features of videos, and whole videos: how sequence models are trained, and how they are evaluated.

Features of several extractors stand side by side in a row. A window's rows are a slice of a mapped tar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from mtl_dist.data.index import FEATURE_BYTES, FeatureShard
from mtl_dist.data.labels import NO_ROW, make_table, split_table
from mtl_dist.data.mapped import MappedShards
from mtl_dist.data.reader import Names
from mtl_dist.data.sidecar import FeatureSidecar, check_feature_places, parse_feature_sidecar
from mtl_dist.data.windows import Windows
from mtl_dist.errors import InputError
from mtl_dist.tasks import Batch, LabelCounts


class _OpenFeatures(NamedTuple):
    """A mapped shard of features."""

    videos: list[np.ndarray]  # (rows, D) float16 of every video
    table: np.ndarray  # (n, TABLE_WIDTH) float64
    starts: list[int]  # of every video in the table


class FeatureReader(MappedShards[_OpenFeatures]):
    """Reads rows of videos of one set. Safe to share between threads."""

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The shard of every video of the set, and its place there."""
        return [(shard, place) for shard, e in enumerate(self.index.shards) for place in range(len(e.videos))]

    def features(self, video: int, begin: int, end: int) -> np.ndarray:
        """Return (end - begin, D) float16: rows of a video, by their places in it."""
        shard, place = self.places[video]
        return self.shard(shard).videos[place][begin:end]

    def table(self, video: int, begin: int, end: int) -> np.ndarray:
        """Return the row numbers and labels of these rows, (end - begin, TABLE_WIDTH) float64."""
        shard, place = self.places[video]
        opened = self.shard(shard)
        return opened.table[opened.starts[place] + begin : opened.starts[place] + end]

    def parse(self, data: bytes, entry: FeatureShard) -> FeatureSidecar:
        sidecar, width = parse_feature_sidecar(data), self.index.extractor.width
        check_feature_places(sidecar, videos=entry.videos, width=width, tar_bytes=entry.tar_bytes)
        return sidecar

    def opened(self, tar: memoryview, sidecar: FeatureSidecar, entry: FeatureShard) -> _OpenFeatures:
        """Check every video's bytes, once a time that the shard is opened."""
        width, videos = self.index.extractor.width, []
        for number, (begin, rows) in enumerate(zip(sidecar.begin.tolist(), entry.videos)):
            data = tar[begin : begin + rows * width * FEATURE_BYTES]
            if crc32(data) != int(sidecar.checksum[number]):
                raise self.damage_of(entry, f"video {number}", "its bytes do not match their checksum")
            videos.append(np.frombuffer(data, "<f2").reshape(rows, width))
        return _OpenFeatures(videos, make_table(sidecar), list(accumulate(entry.videos, initial=0)))


@dataclass(frozen=True)
class _OfVideos:
    """What windows and whole videos have in common. All readers are of the same rows."""

    readers: Sequence[FeatureReader]
    sha256: str

    @property
    def counts(self) -> LabelCounts:
        return self.readers[0].index.labels

    @property
    def max_open(self) -> int:
        return sum(reader.max_open for reader in self.readers)

    def give_back(self, batch: Batch) -> None:
        """Its memory is its own."""

    def warm(self, groups: Iterable[int]) -> None:
        warm_videos(self.readers, groups)

    def keep_open(self, count: int) -> None:
        for reader in self.readers:
            reader.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        raise InputError(
            "data.sampling is per_task, and which window has a label of a task is another in every epoch; "
            "give data.sampling masked"
        )

    def names(self) -> Names:
        return read_names(self.readers[0])


@dataclass(frozen=True)
class FeatureWindows(_OfVideos):
    """The windows of one epoch as samples (`samples.Samples`)."""

    windows: Windows
    context: int = 0  # rows before a window that the model sees, and whose labels are other windows'
    epoch: int = 0
    frames: None = None

    @cached_property
    def group_sizes(self) -> np.ndarray:
        return _sum_up(self.windows.counts, self.readers[0])

    def at_epoch(self, epoch: int) -> FeatureWindows:
        return replace(self, epoch=epoch)

    def whole(self) -> FeatureVideos:
        return FeatureVideos(self.readers, self.sha256)

    def read(self, samples: np.ndarray) -> Batch:
        spans = self.windows.spans(samples, epoch=self.epoch).tolist()
        return read_spans(self.readers, spans, samples, context=self.context)


@dataclass(frozen=True)
class FeatureVideos(_OfVideos):
    """Whole videos as samples (`samples.Samples`): how every row is evaluated, once."""

    @cached_property
    def frames(self) -> np.ndarray:
        return self.readers[0].index.video_rows

    @cached_property
    def group_sizes(self) -> np.ndarray:
        return _sum_up(np.ones_like(self.frames), self.readers[0])

    def at_epoch(self, epoch: int) -> FeatureVideos:
        return self

    def whole(self) -> FeatureVideos:
        return self

    def read(self, samples: np.ndarray) -> Batch:
        spans = [(video, 0, int(self.frames[video])) for video in samples.tolist()]
        return read_spans(self.readers, spans, samples, context=0)


def read_spans(
    readers: Sequence[FeatureReader], spans: list[tuple[int, int, int]], samples: np.ndarray, *, context: int
) -> Batch:
    """Read rows [begin, end) of videos, with up to `context` rows before them, into a `Batch` of (B, T, D) float16.

    What stands before a span is seen and not learnt from: it is valid, and has neither labels nor row numbers.
    """
    seen = [(video, max(0, begin - context), begin, end) for video, begin, end in spans]
    longest = max((end - first for _, first, _, end in seen), default=1)
    width = sum(reader.index.extractor.width for reader in readers)
    inputs = np.zeros((len(seen), longest, width), np.float16)
    valid = np.zeros((len(seen), longest), bool)
    table = np.tile(NO_ROW, (len(seen), longest, 1))
    for place, (video, first, begin, end) in enumerate(seen):
        parts = [reader.features(video, first, end) for reader in readers]
        np.concatenate(parts, axis=1, out=inputs[place, : end - first])
        valid[place, : end - first] = True
        table[place, begin - first : end - first] = readers[0].table(video, begin, end)
    labels, rows = split_table(table)
    numbers = torch.from_numpy(np.array(samples, np.int64))
    return Batch(torch.from_numpy(inputs), torch.from_numpy(valid), labels, rows, numbers)


def warm_videos(readers: Sequence[FeatureReader], groups: Iterable[int]) -> None:
    """Fetch the shards that hold the videos of the first reader's shards `groups`."""
    first, *others = readers
    of_shards = list(pairwise(accumulate((len(entry.videos) for entry in first.index.shards), initial=0)))
    for group in groups:
        first.warm([group])
        for reader in others:
            reader.warm(sorted({reader.places[video][0] for video in range(*of_shards[group])}))


def read_names(reader: FeatureReader) -> Names:
    """Return what the rows of a set are called, in their order."""
    sidecars: list[FeatureSidecar] = list(reader.read_sidecars())
    images = [name for sidecar in sidecars for name in sidecar.image_names()]
    videos = [
        name
        for sidecar in sidecars
        for name, rows in zip(sidecar.video_names(), sidecar.num_rows.tolist())
        for _ in range(rows)
    ]
    return Names(np.concatenate([sidecar.row for sidecar in sidecars]), images, videos)


def _sum_up(of_videos: np.ndarray, reader: FeatureReader) -> np.ndarray:
    """Add up numbers of videos by shard."""
    return np.array([part.sum() for part in np.split(of_videos, _ends(reader))], np.int64)


def _ends(reader: FeatureReader) -> list[int]:
    return list(accumulate(len(entry.videos) for entry in reader.index.shards))[:-1]


class FeaturePreparation:
    """Hands features to the model as they are: it standardises them."""

    def draw(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Draw nothing: (B, T, 0)."""
        return torch.zeros(*rows.shape, 0)

    def __call__(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """Return (B, T, D) float32."""
        return batch.inputs.float()
