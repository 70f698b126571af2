"""Windows of videos, and whole videos, as samples: how sequence models are trained, and how they are evaluated.

Where the frames come from, features or pictures, a `VideoSource` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mtl_dist.data.classes import By, Classes
from mtl_dist.data.labels import NO_ROW, split_table
from mtl_dist.data.reader import Names
from mtl_dist.data.windows import Windows
from mtl_dist.label_counts import LabelCounts
from mtl_dist.tasks import Batch


class Layout(NamedTuple):
    """Which rows of which videos the samples of a batch have. Frames before `begins` are context: seen, and no more."""

    videos: list[int]  # (B,)
    firsts: list[int]  # (B,) the first row that is seen, by its place in the video
    begins: list[int]  # (B,) the first that counts
    ends: list[int]  # (B,) the one after the last

    @property
    def sizes(self) -> list[int]:
        """(B,) rows that are seen."""
        return [end - first for first, end in zip(self.firsts, self.ends)]

    @property
    def longest(self) -> int:
        """T: rows that samples are padded to."""
        return max(self.sizes, default=1)


class VideoSource(Protocol):
    """Frames of whole videos by video and place. Safe to share between threads."""

    counts: LabelCounts
    max_open: int
    video_rows: np.ndarray  # (V,) int64
    group_videos: list[int]  # (S,) videos of every group that is fetched at once

    def read(self, layout: Layout) -> Tensor:
        """Return the inputs of a batch, (B, T, ...), with zeros on padding."""
        ...

    def table(self, video: int, begin: int, end: int) -> np.ndarray:
        """Return row numbers and labels (end - begin, TABLE_WIDTH) of rows of a video, by their places in it."""
        ...

    def warm(self, groups: Iterable[int]) -> None: ...

    def keep_open(self, count: int) -> None: ...

    def names(self) -> Names:
        """Return the names of all rows, video by video."""
        ...


@dataclass(frozen=True)
class PartVideos:
    """Some of the videos of a source, numbered anew; groups are those of the source, some of them empty."""

    every: VideoSource
    chosen: np.ndarray  # (v,) int64 ascending numbers in the source
    counts: LabelCounts

    @property
    def max_open(self) -> int:
        return self.every.max_open

    @cached_property
    def video_rows(self) -> np.ndarray:
        return self.every.video_rows[self.chosen]

    @cached_property
    def group_videos(self) -> list[int]:
        bounds = np.cumsum([0, *self.every.group_videos])
        return np.diff(np.searchsorted(self.chosen, bounds)).tolist()

    def read(self, layout: Layout) -> Tensor:
        return self.every.read(layout._replace(videos=[int(self.chosen[video]) for video in layout.videos]))

    def table(self, video: int, begin: int, end: int) -> np.ndarray:
        return self.every.table(int(self.chosen[video]), begin, end)

    def warm(self, groups: Iterable[int]) -> None:
        self.every.warm(groups)

    def keep_open(self, count: int) -> None:
        self.every.keep_open(count)

    def names(self) -> Names:
        rows, images, videos = self.every.names()
        of_row = np.repeat(np.arange(len(self.every.video_rows)), self.every.video_rows)
        places = np.flatnonzero(np.isin(of_row, self.chosen))
        return Names(rows[places], [images[place] for place in places], [videos[place] for place in places])


@dataclass(frozen=True)
class _OfVideos:
    """What windows and whole videos have in common."""

    source: VideoSource
    sha256: str

    @property
    def counts(self) -> LabelCounts:
        return self.source.counts

    @property
    def max_open(self) -> int:
        return self.source.max_open

    def give_back(self, batch: Batch) -> None:
        """Its memory is its own."""

    def decode_for(self, device: torch.device) -> None:
        """What was read is put together in other memory."""

    def warm(self, groups: Iterable[int]) -> None:
        self.source.warm(groups)

    def keep_open(self, count: int) -> None:
        self.source.keep_open(count)

    def labelled(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        raise AssertionError("which window has a label of a task is another in every epoch: masked sampling alone")

    def classes(self, by: By, progress: Callable[[int], None] = lambda count: None) -> Classes:
        raise AssertionError("which labels a window has is another in every epoch: they are not balanced")

    def names(self) -> Names:
        return self.source.names()


@dataclass(frozen=True)
class WindowSamples(_OfVideos):
    """The windows of one epoch (`samples.Samples`)."""

    windows: Windows
    context: int = 0  # rows before a window that the model sees, and whose labels are other windows'
    epoch: int = 0
    frames: None = None

    @cached_property
    def group_sizes(self) -> np.ndarray:
        return _sum_up(self.windows.counts, self.source.group_videos)

    def at_epoch(self, epoch: int) -> WindowSamples:
        return replace(self, epoch=epoch)

    def whole(self) -> VideoSamples:
        return VideoSamples(self.source, self.sha256)

    def read(self, samples: np.ndarray) -> Batch:
        videos, begins, ends = self.windows.spans(samples, epoch=self.epoch).T.tolist()
        firsts = [max(0, begin - self.context) for begin in begins]
        return read_layout(self.source, Layout(videos, firsts, begins, ends), samples)


@dataclass(frozen=True)
class VideoSamples(_OfVideos):
    """Whole videos (`samples.Samples`): how every row is evaluated, once."""

    @cached_property
    def frames(self) -> np.ndarray:
        return self.source.video_rows

    @cached_property
    def group_sizes(self) -> np.ndarray:
        return np.array(self.source.group_videos, np.int64)

    def at_epoch(self, epoch: int) -> VideoSamples:
        return self

    def whole(self) -> VideoSamples:
        return self

    def read(self, samples: np.ndarray) -> Batch:
        begins = [0] * len(samples)
        return read_layout(
            self.source, Layout(samples.tolist(), begins, begins, self.frames[samples].tolist()), samples
        )


def read_layout(source: VideoSource, layout: Layout, samples: np.ndarray) -> Batch:
    """Read rows of videos into a `Batch`.

    What is context is valid, and has neither labels nor row numbers: those count in another window.
    """
    longest = layout.longest
    valid = np.arange(longest) < np.array(layout.sizes, np.int64)[:, None]
    table = np.tile(NO_ROW, (len(samples), longest, 1))
    for place, (video, first, begin, end) in enumerate(zip(*layout)):
        table[place, begin - first : end - first] = source.table(video, begin, end)
    labels, rows = split_table(table)
    numbers = torch.from_numpy(np.array(samples, np.int64))
    return Batch(source.read(layout), torch.from_numpy(valid), labels, rows, numbers)


def _sum_up(of_videos: np.ndarray, group_videos: list[int]) -> np.ndarray:
    """Add up numbers of videos by group."""
    return np.array([part.sum() for part in np.split(of_videos, np.cumsum(group_videos)[:-1])], np.int64)
