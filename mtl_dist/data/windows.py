"""Which rows every window of an epoch has: a pure function of (rows of the videos, length, seed, epoch).

A video of n rows is cut at every `length` rows, from another place each epoch:

    windows   k = floor(n / length) + 1, the same number every epoch
    phase     p, drawn evenly: with r = n mod length from 0 to length - r, or from 1 to length - 1 where r is 0
    window j  the rows from j * length - p to (j + 1) * length - p that the video has

So none is empty, every row is in exactly one window of an epoch, and only a video's first and last may be short. An
`Order` treats windows as it treats pictures: it knows their number alone.

Evaluation reads whole videos: `eval_videos` says which ones a rank reads at once.

No torch, no files, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mtl_dist.data.order import draw

_PHASE = 5  # keeps these draws apart from those of `order.py`


@dataclass(frozen=True)
class Windows:
    """The windows of videos of `video_rows` (V,) rows, numbered from 0, one video's after another's."""

    video_rows: np.ndarray
    length: int
    seed: int

    @cached_property
    def counts(self) -> np.ndarray:
        """(V,) int64 windows of every video."""
        return self.video_rows // self.length + 1

    @cached_property
    def starts(self) -> np.ndarray:
        """(V + 1,) int64: the number of every video's first window; at the end that of all windows."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def spans(self, numbers: np.ndarray, *, epoch: int) -> np.ndarray:
        """Return (n, 3) int64 of windows (n,) by number: the video, the first row in it, and the one after the last."""
        videos = np.searchsorted(self.starts, numbers, side="right") - 1
        places = numbers - self.starts[videos]
        drawn = {video: self.phase(video, epoch=epoch) for video in set(videos.tolist())}
        begins = places * self.length - np.array([drawn[video] for video in videos.tolist()], np.int64)
        ends = np.minimum(begins + self.length, self.video_rows[videos])
        return np.stack([videos, np.maximum(begins, 0), ends], axis=1)

    def phase(self, video: int, *, epoch: int) -> int:
        """Return how many rows the first window of a video is cut short by."""
        rest = int(self.video_rows[video]) % self.length
        low, high = (0, self.length - rest) if rest else (1, self.length - 1)
        return int(draw(self.seed, epoch, _PHASE, video).integers(low, high + 1))


def eval_videos(frames: np.ndarray, *, batch: int, rank: int, num_ranks: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the videos that a rank evaluates at once: over all ranks every video exactly once.

    `frames` (V,) of every video. Ranks have about as many frames, and a batch at most `batch` videos, as long together,
    padded to the longest, as `batch` videos of the median length; a video that is longer is a batch of its own.
    """
    middles = np.cumsum(frames) - frames / 2
    mine = np.flatnonzero((middles * num_ranks // frames.sum()).astype(np.int64) == rank)
    room, videos = batch * int(np.median(frames)), []
    for video in mine.tolist():
        longest = max(frames[[*videos, video]].tolist())
        if videos and (len(videos) == batch or longest * (len(videos) + 1) > room):
            yield np.array(videos)
            videos = []
        videos.append(video)
    if videos:
        yield np.array(videos)
