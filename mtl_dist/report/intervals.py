"""Bootstrap confidence intervals: the validation set's videos are drawn with replacement, and all scored again.

Frames of a video are near copies of each other, so videos are what is independent. Scores are functions of additive
sums: those of every video are taken once, and a draw is a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.objective.metrics import MetricSums, grouped_sums
from mtl_dist.objective.scores import find_score, single_scores
from mtl_dist.report.results import CONSTANT, Method, Result
from mtl_dist.shards.splits import group_rows
from mtl_dist.tasks import TASKS

LEVEL = 0.95
CHUNK = 100  # draws at once
LEAST_VIDEOS = 2
FEW_VIDEOS = 10


class Interval(NamedTuple):
    """The ends of a confidence interval of level `LEVEL`."""

    low: float
    high: float


class Bootstrap(NamedTuple):
    """Scores of every method in every draw, the mean over its seeds; nan where a draw lacks a task's labels."""

    num_videos: int
    labelled: dict[str, int]  # task -> videos that have its labels
    draws: dict[str, dict[str, np.ndarray]]  # method -> score -> (D,)

    def videos(self, key: str) -> int:
        """How many videos have the labels that a score is of; of all tasks, those of the task with the fewest."""
        covered = [count for count in self.labelled.values() if count]
        task = find_score(key).task
        return self.labelled[task] if task else min(covered, default=0)

    def interval(self, method: str, key: str) -> Interval | None:
        """The central 95% of a method's score; None where the labels are of one video: there is nothing to draw."""
        return _central(self.draws[method][key]) if self.videos(key) >= LEAST_VIDEOS else None

    def difference(self, method: str, reference: str, key: str) -> Interval | None:
        """The central 95% of a method's score less the reference's, in the same draws."""
        if self.videos(key) < LEAST_VIDEOS:
            return None
        return _central(self.draws[method][key] - self.draws[reference][key])


def number_videos(videos: list[str]) -> np.ndarray:
    """Number the videos of rows (n,) from 0, as the ensemble deals them into folds: halves of a video are one."""
    return group_rows(pa.array(videos, pa.string()), None)


def bootstrap(methods: list[Method], video: np.ndarray, *, num_draws: int, seed: int) -> Bootstrap:
    """Score every method on `num_draws` draws of the videos; `video` (n,) numbers those of the rows from 0."""
    num_videos, targets = int(video.max()) + 1, methods[0].results[0].predicted.targets
    masks = {"va": targets.va_mask, "expr": targets.expr_mask, "au": targets.au_mask.any(-1)}
    labelled = {task: len(np.unique(video[mask.astype(bool)])) for task, mask in masks.items()}
    if max(labelled.values()) < LEAST_VIDEOS:
        return Bootstrap(num_videos, labelled, {})
    results = [result for method in methods for result in method.results]
    per_video = np.stack([video_sums(result, video) for result in results])
    covers, is_constant = results[0].scores["covers"], np.array([result.method == CONSTANT for result in results])
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    parts = []
    for begin in range(0, num_draws, CHUNK):
        counts = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), min(CHUNK, num_draws - begin))
        parts.append(draw_scores(counts.astype(np.float64) @ per_video, covers, is_constant=is_constant))
    drawn = {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}
    places = {id(result): place for place, result in enumerate(results)}
    return Bootstrap(
        num_videos,
        labelled,
        {
            method.label: {
                key: values[[places[id(result)] for result in method.results]].mean(0) for key, values in drawn.items()
            }
            for method in methods
        },
    )


def video_sums(result: Result, video: np.ndarray) -> np.ndarray:
    """(V, SIZE): the metric sums of every video's rows; `video` (n,) numbers them from 0. As `Result.sums` of each."""
    predictions, targets = result.predicted.predictions, result.predicted.targets
    return grouped_sums(predictions, targets, video, int(video.max()) + 1, au_on=result.au_on)


def draw_scores(flat: np.ndarray, covers: list[str], *, is_constant: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (R, D) of the sums (R, D, SIZE) of R results in D draws; `is_constant` (R,): the constant predictor.

    A score of all tasks is NaN in a draw that lacks one of those that the data covers.
    """
    sums = MetricSums.unflatten(flat)
    counts = sums.va[..., 0, 0], sums.confusion.sum((-1, -2)), sums.au.sum((-1, -2))
    is_whole = np.logical_and.reduce([count > 0 for task, count in zip(TASKS, counts) if task in covers])
    drawn = {}
    for score in single_scores():
        values = score.of(sums)
        if score.floor:
            values = np.where(is_constant[:, None], score.floor(sums), values)
        drawn[score.key] = values if score.task else np.where(is_whole, values, np.nan)
    return drawn


def _central(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
