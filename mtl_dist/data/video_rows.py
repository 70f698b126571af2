"""The rows of a set of pictures by video: which videos there are, and in which order their rows come."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtl_dist.data.reader import ShardReader, names_of
from mtl_dist.data.sidecar import Sidecar
from mtl_dist.timeline import make_timeline, name_videos, owners_of

# What a row keeps of its picture's.
KEPT = ("row", "image", "length", "crc32", "va", "expr", "au", "va_mask", "expr_mask", "au_mask")


class VideoRows(NamedTuple):
    """n rows of v videos, one video's behind another's. Videos in order of their first row, rows by frame and row."""

    samples: np.ndarray  # (n,) int64 their numbers in the set of pictures
    frame: np.ndarray  # (n,) int64 from 0 at the first frame of each video
    kept: dict[str, np.ndarray]  # (n, ...) as in `Sidecar`: `KEPT`
    videos: list[str]
    num_rows: np.ndarray  # (v,) int64
    owners: list[str]  # (v,) whose rows stay together in folds: the video itself, or the person of a picture

    @property
    def starts(self) -> np.ndarray:
        """(v + 1,) int64: where every video's rows begin; at the end the number of all."""
        return np.concatenate([[0], np.cumsum(self.num_rows)])

    @property
    def first_samples(self) -> np.ndarray:
        """(v,) int64: the number of every video's first row in the set of pictures."""
        return self.samples[self.starts[:-1]]

    def part(self, begin: int, end: int) -> VideoRows:
        """Return the videos from `begin` to before `end`."""
        rows = slice(*self.starts[[begin, end]].tolist())
        kept = {name: array[rows] for name, array in self.kept.items()}
        return VideoRows(
            self.samples[rows], self.frame[rows], kept, self.videos[begin:end], self.num_rows[begin:end],
            self.owners[begin:end])  # fmt: skip


def read_rows(reader: ShardReader) -> VideoRows:
    """Read the rows of a set of pictures: all its sidecars, and no picture.

    Frames are the numbers that names of pictures end with, where a video's all do (`make_timeline`); else pictures are
    counted. Rows of one picture stand side by side. A picture of no video is a video of its own.
    """
    sidecars = list(reader.sidecars())
    names = names_of(sidecars)
    by_row = np.argsort(names.rows, kind="stable")
    images = [names.images[place] for place in by_row]
    own = [names.videos[place] for place in by_row]
    owners, videos = owners_of(images, own), name_videos(images, own)
    timeline = make_timeline(images, videos)
    order = np.lexsort((timeline.frame, timeline.video))  # stable: then by row
    samples = by_row[order]
    kept = {name: _concatenate(sidecars, name)[samples] for name in KEPT}
    owner_of = dict(zip(videos, owners))
    num_rows = np.bincount(timeline.video).astype(np.int64)
    return VideoRows(samples, timeline.frame[order], kept, list(owner_of), num_rows, list(owner_of.values()))


def _concatenate(sidecars: list[Sidecar], name: str) -> np.ndarray:
    """Return an array of all samples; names are padded to the longest."""
    arrays = [getattr(sidecar, name) for sidecar in sidecars]
    if name == "image":
        width = max(array.shape[1] for array in arrays)
        arrays = [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
    return np.concatenate(arrays)
