"""Reads sets of features: rows of whole videos, which are slices of mapped tars.

Features of several extractors of the same pictures stand side by side in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.index import FEATURE_BYTES, FeatureShard
from mtl_dist.data.labels import make_table
from mtl_dist.data.mapped import MappedShards
from mtl_dist.data.reader import Names
from mtl_dist.data.sequences import Layout
from mtl_dist.data.sidecar import FeatureSidecar, check_feature_places, parse_feature_sidecar
from mtl_dist.label_counts import LabelCounts
from mtl_dist.tasks import Batch


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
        return _OpenFeatures(videos, make_table(sidecar._asdict()), list(accumulate(entry.videos, initial=0)))


@dataclass(frozen=True)
class FeatureRows:
    """The rows of one or several sets side by side (`sequences.VideoSource`), all of the same pictures."""

    readers: Sequence[FeatureReader]

    @property
    def counts(self) -> LabelCounts:
        return self.readers[0].index.labels

    @property
    def max_open(self) -> int:
        return sum(reader.max_open for reader in self.readers)

    @cached_property
    def video_rows(self) -> np.ndarray:
        return self.readers[0].index.video_rows

    @cached_property
    def group_videos(self) -> list[int]:
        return [len(entry.videos) for entry in self.readers[0].index.shards]

    def read(self, layout: Layout) -> Tensor:
        """Return (B, T, D) float16."""
        width = sum(reader.index.extractor.width for reader in self.readers)
        inputs = np.zeros((len(layout.videos), layout.longest, width), np.float16)
        for own, video, first, end in zip(inputs, layout.videos, layout.firsts, layout.ends):
            parts = [reader.features(video, first, end) for reader in self.readers]
            np.concatenate(parts, axis=1, out=own[: end - first])
        return torch.from_numpy(inputs)

    def table(self, video: int, begin: int, end: int) -> np.ndarray:
        return self.readers[0].table(video, begin, end)

    def warm(self, groups: Iterable[int]) -> None:
        """Fetch shards of the first set, and those of the others that have the same videos."""
        first, *others = self.readers
        of_groups = list(pairwise(accumulate(self.group_videos, initial=0)))
        for group in groups:
            first.warm([group])
            for reader in others:
                reader.warm(sorted({reader.places[video][0] for video in range(*of_groups[group])}))

    def keep_open(self, count: int) -> None:
        for reader in self.readers:
            reader.keep_open(count)

    def names(self) -> Names:
        return read_names(self.readers[0])


def read_names(reader: FeatureReader) -> Names:
    """Return what the rows of a set are called, in their order."""
    return feature_names_of(list(reader.sidecars()))


def feature_names_of(sidecars: list[FeatureSidecar]) -> Names:
    """Return what the rows of sidecars are called, one sidecar's after another's."""
    images = [name for sidecar in sidecars for name in sidecar.image_names()]
    videos = [
        name
        for sidecar in sidecars
        for name, rows in zip(sidecar.video_names(), sidecar.num_rows.tolist())
        for _ in range(rows)
    ]
    return Names(np.concatenate([sidecar.row for sidecar in sidecars]), images, videos)


class FeaturePreparation:
    """Hands features to the model as they are: it standardises them."""

    def draw(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Draw nothing: (B, T, 0)."""
        return torch.zeros(*rows.shape, 0)

    def __call__(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """Return (B, T, D) float32."""
        return batch.inputs.float()


def build_feature_preparation(config: Config) -> FeaturePreparation:
    """Build what features are prepared by."""
    return FeaturePreparation()
