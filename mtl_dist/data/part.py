"""Some of the rows of sets: those of a fold of their videos, or all others."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from mtl_dist.label_counts import LabelCounts


class Kept(NamedTuple):
    """What of a set is in a part: whole videos."""

    rows: np.ndarray  # (n,) bool of all its rows, as they are stored
    labels: LabelCounts  # of the rows that are in it

    def holds(self, video_rows: np.ndarray) -> np.ndarray:
        """Return which videos are in it, (v,) bool, of videos that are stored one behind the other."""
        return self.rows[np.cumsum(video_rows) - video_rows]


class Part(NamedTuple):
    """What of several sets is in a part of them."""

    name: str  # says which part
    kept: tuple[Kept, ...]  # of every one of `Sets.parts()`

    @property
    def sha256(self) -> str:
        """Identity of the part within its sets."""
        bits = b"".join(np.packbits(kept.rows).tobytes() for kept in self.kept)
        return hashlib.sha256(self.name.encode() + b"\0" + bits).hexdigest()
