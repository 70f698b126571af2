"""Mean and deviation of features, from sums of shards: the same in whatever order shards were made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

CHUNK = 4096  # rows


class Moments(NamedTuple):
    """Sums over rows of float16, as float64: of 11 bits a number, so that their difference loses none that matter."""

    rows: int
    sums: np.ndarray  # (D,) float64
    squares: np.ndarray  # (D,) float64

    @classmethod
    def zero(cls, width: int) -> Moments:
        """Return those of no rows."""
        return cls(0, np.zeros(width), np.zeros(width))

    def plus(self, other: Moments) -> Moments:
        """Return those of both."""
        return Moments(self.rows + other.rows, self.sums + other.sums, self.squares + other.squares)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation (D,) of the rows."""
        mean = self.sums / self.rows
        variance = np.maximum(self.squares / self.rows - mean**2, 0)
        return mean.tolist(), np.sqrt(variance).tolist()


def add_up(parts: Iterable[Moments], width: int) -> Moments:
    """Add up moments, in their order: floating point knows one."""
    total = Moments.zero(width)
    for part in parts:
        total = total.plus(part)
    return total


def moments_of(features: np.ndarray) -> Moments:
    """Return the moments of features (n, D) float16."""
    total = Moments.zero(features.shape[1])
    for begin in range(0, len(features), CHUNK):
        chunk = features[begin : begin + CHUNK].astype(np.float64)
        total = total.plus(Moments(len(chunk), chunk.sum(0), (chunk**2).sum(0)))
    return total
