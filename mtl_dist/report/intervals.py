"""Bootstrap confidence intervals of methods, over draws of the validation set's videos."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.objective.bootstrap import LEAST_VIDEOS, Interval, central, draw_videos, labelled_videos
from mtl_dist.objective.metrics import grouped_sums
from mtl_dist.objective.scores import find_score
from mtl_dist.report.results import CONSTANT, Method, Result
from mtl_dist.shards.splits import group_rows


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
        return central(self.draws[method][key]) if self.videos(key) >= LEAST_VIDEOS else None

    def difference(self, method: str, reference: str, key: str) -> Interval | None:
        """The central 95% of a method's score less the reference's, in the same draws."""
        if self.videos(key) < LEAST_VIDEOS:
            return None
        return central(self.draws[method][key] - self.draws[reference][key])


def number_videos(videos: list[str]) -> np.ndarray:
    """Number the videos of rows (n,) from 0, as the ensemble deals them into folds: halves of a video are one."""
    return group_rows(pa.array(videos, pa.string()), None)


def bootstrap(methods: list[Method], video: np.ndarray, *, num_draws: int, seed: int) -> Bootstrap:
    """Score every method on `num_draws` draws of the videos; `video` (n,) numbers those of the rows from 0."""
    num_videos, results = int(video.max()) + 1, [result for method in methods for result in method.results]
    per_video = np.stack([video_sums(result, video) for result in results])
    labelled = labelled_videos(per_video[0])
    if max(labelled.values()) < LEAST_VIDEOS:
        return Bootstrap(num_videos, labelled, {})
    is_constant = np.array([result.method == CONSTANT for result in results])
    drawn = draw_videos(per_video, num_draws=num_draws, seed=seed, is_constant=is_constant)
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
