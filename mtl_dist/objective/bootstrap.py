"""Bootstrap over videos: they are drawn with replacement, and everything is scored again.

Frames of a video are near copies of each other, so videos are what is independent. Scores are functions of additive
sums: those of every video are taken once, and a draw is a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtl_dist.objective.metrics import MetricSums
from mtl_dist.objective.scores import single_scores
from mtl_dist.tasks import TASKS

LEVEL = 0.95
CHUNK = 100  # draws at once
LEAST_VIDEOS = 2  # with labels, for an interval
FEW_VIDEOS = 10  # fewer make a rough one


class Interval(NamedTuple):
    """The ends of a confidence interval of level `LEVEL`."""

    low: float
    high: float


def draw_videos(
    per_video: np.ndarray,
    *,
    num_draws: int,
    seed: int,
    is_constant: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
    """Scores (R, D) of R results in D draws of the V videos, from the sums (R, V, SIZE) of every video.

    `is_constant` (R,): which is the constant predictor; None: none is. A score of all tasks is NaN in a draw that lacks
    one of those that the data covers. `progress` is told of draws.
    """
    num_results, num_videos, _ = per_video.shape
    is_constant = np.zeros(num_results, bool) if is_constant is None else is_constant
    covers = [task for task, count in labelled_videos(per_video[0]).items() if count]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    parts = []
    for begin in range(0, num_draws, CHUNK):
        size = min(CHUNK, num_draws - begin)
        counts = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size)
        parts.append(_score(counts.astype(np.float64) @ per_video, covers, is_constant))
        progress(size)
    return {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}


def labelled_videos(per_video: np.ndarray) -> dict[str, int]:
    """How many videos have labels of each task, from their sums (V, SIZE)."""
    return {task: int((count > 0).sum()) for task, count in zip(TASKS, _labels(MetricSums.unflatten(per_video)))}


def _labels(sums: MetricSums) -> tuple[np.ndarray, ...]:
    """How many labels of every task sums (...) are of: (...) each."""
    return sums.va[..., 0, 0], sums.confusion.sum((-1, -2)), sums.au.sum((-1, -2))


def _score(flat: np.ndarray, covers: list[str], is_constant: np.ndarray) -> dict[str, np.ndarray]:
    sums = MetricSums.unflatten(flat)
    is_whole = np.logical_and.reduce([count > 0 for task, count in zip(TASKS, _labels(sums)) if task in covers])
    drawn = {}
    for score in single_scores():
        values = score.of(sums)
        if score.floor:
            values = np.where(is_constant[:, None], score.floor(sums), values)
        drawn[score.key] = values if score.task else np.where(is_whole, values, np.nan)
    return drawn


def central(values: np.ndarray) -> Interval | None:
    """The central 95% of what draws (D,) gave; None where none gave a number."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
