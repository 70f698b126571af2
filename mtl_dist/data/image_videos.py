"""The pictures of a set, video by video: for models of sequences that are trained with their backbone, end to end.

A set of pictures was shuffled when it was made. So a window is as many reads as it has rows, from all over the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mtl_dist.data.labels import make_table
from mtl_dist.data.reader import Names, ShardReader
from mtl_dist.data.sequences import Layout
from mtl_dist.data.video_rows import VideoRows, read_rows
from mtl_dist.label_counts import LabelCounts


class ImageRows:
    """The pictures of a set in the order of their frames (`sequences.VideoSource`), decoded to `size` pixels a side."""

    def __init__(self, reader: ShardReader, size: int):
        self.reader, self.size = reader, size
        reader.keep_open(len(reader.index.shards))

    @cached_property
    def rows(self) -> VideoRows:
        """The rows by video. Reads all sidecars."""
        return read_rows(self.reader)

    @property
    def counts(self) -> LabelCounts:
        return self.reader.index.labels

    @property
    def max_open(self) -> int:
        return self.reader.max_open

    @property
    def video_rows(self) -> np.ndarray:
        return self.rows.num_rows

    @cached_property
    def group_videos(self) -> list[int]:
        """A video each: its pictures are all over the set, so there is no more to fetch at once."""
        return [1] * len(self.rows.num_rows)

    @cached_property
    def _table(self) -> np.ndarray:
        return make_table(self.rows.kept)

    @cached_property
    def _starts(self) -> list[int]:
        return self.rows.starts.tolist()

    def read(self, layout: Layout) -> Tensor:
        """Return (B, T, 3, S, S) uint8."""
        inputs = torch.zeros(len(layout.videos), layout.longest, 3, self.size, self.size, dtype=torch.uint8)
        for own, video, first, end in zip(inputs, layout.videos, layout.firsts, layout.ends):
            begin = self._starts[video]
            batch = self.reader.read_batch(self.rows.samples[begin + first : begin + end], self.size)
            own[: end - first] = batch.inputs[:, 0]
            self.reader.give_back(batch)
        return inputs

    def table(self, video: int, begin: int, end: int) -> np.ndarray:
        start = self._starts[video]
        return self._table[start + begin : start + end]

    def warm(self, groups: Iterable[int]) -> None:
        """Fetch what holds the pictures of videos."""
        starts = np.concatenate([[0], np.cumsum(self.reader.index.shard_rows)])
        for video in groups:
            samples = self.rows.samples[self._starts[video] : self._starts[video + 1]]
            self.reader.warm(np.unique(np.searchsorted(starts, samples, side="right") - 1).tolist())

    def keep_open(self, count: int) -> None:
        """All shards are open anyway."""

    def names(self) -> Names:
        names = self.reader.names()
        order = self.rows.samples.tolist()
        return Names(names.rows[order], [names.images[n] for n in order], [names.videos[n] for n in order])
