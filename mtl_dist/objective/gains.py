"""What steps of a calibration gain, with bootstrap intervals over videos.

The draws hold fixed what was fitted: an interval tells how far a gain depends on which videos were scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mtl_dist.objective.bootstrap import LEAST_VIDEOS, central, draw_videos, labelled_videos
from mtl_dist.objective.metrics import MetricSums
from mtl_dist.objective.scores import FIRST, find_score

NUM_DRAWS, SEED = 1000, 0


class Compared(NamedTuple):
    """Sums (V, SIZE) of every video without a step and with it, and the tasks that it changes."""

    before: np.ndarray
    after: np.ndarray
    tasks: tuple[str, ...]


class Gain(NamedTuple):
    """What a score gains, and the central 95% of that over draws of the videos; None with labels of one video."""

    gain: float
    low: float | None
    high: float | None
    videos: int  # with labels; of P, of the task that has the fewest


def measure_gains(
    compared: Mapping[str, Compared], *, progress: Callable[[int], None] = lambda count: None
) -> dict[str, dict[str, Gain]]:
    """Return the gains in P, and in the scores of the tasks that each step changes, by the keys of `SCORES`.

    A task without labels has none. All steps are scored on the same `NUM_DRAWS` draws, which `progress` is told of.
    """
    if not compared:
        return {}
    # What is known after one step is what was known before the next: each is drawn once.
    arrays = {id(sums): sums for pair in compared.values() for sums in (pair.before, pair.after)}
    places = {key: place for place, key in enumerate(arrays)}
    per_video = np.stack(list(arrays.values()))
    labelled = {task: count for task, count in labelled_videos(per_video[0]).items() if count}
    drawn = draw_videos(per_video, num_draws=NUM_DRAWS, seed=SEED, progress=progress)
    total = MetricSums.unflatten(per_video.sum(1))
    found = {}
    for name, pair in compared.items():
        before, after = places[id(pair.before)], places[id(pair.after)]
        found[name] = {}
        for key in (FIRST.key, *(task for task in pair.tasks if task in labelled)):
            score = find_score(key)
            values = score.of(total)
            videos = labelled[score.task] if score.task else min(labelled.values(), default=0)
            between = central(drawn[key][after] - drawn[key][before]) if videos >= LEAST_VIDEOS else None
            found[name][key] = Gain(float(values[after] - values[before]), *(between or (None, None)), videos)
    return found
