"""Calibrate an ensemble and score what that brings, no row ever scored with parameters that were fitted on it.

Cross-fitting: videos are dealt into folds. The parameters for a fold are fitted on all other folds, and applied to it.
So every labelled row is scored once, and each step is compared with the plain mean on all rows; a single held-out part
would leave the others unused. What is applied to new data is fitted on all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mtl_dist.objective.calibration import STEPS, Calibration, Steps, combine_tempered, fit, take_rows, temper, whole
from mtl_dist.objective.metrics import SIZE, MetricSums, Predictions, Targets, grouped_sums
from mtl_dist.timeline import Timeline

PLAIN_MEAN = "plain mean"


class CrossFit(NamedTuple):
    """A calibration scored out of fold."""

    calibrations: list[Calibration]  # of each fold, fitted on the others
    predictions: Predictions  # every row by its fold's calibration
    au_on: np.ndarray  # (n, 12) bool, by its fold's thresholds
    video_sums: dict[str, np.ndarray]  # (V, SIZE) of every video: of the plain mean, then with each step added

    @property
    def sums(self) -> dict[str, MetricSums]:
        """The sums over all rows: of the plain mean, then with each step added."""
        return {name: MetricSums.unflatten(sums.sum(0)) for name, sums in self.video_sums.items()}


def make_folds(groups: np.ndarray, num_folds: int, *, seed: int) -> np.ndarray:
    """Deal groups (n,) of rows into folds of about equal size, (n,) int64: a group's rows have one fold.

    The largest groups first, each to the fold with the fewest rows; the seed decides among groups of one size. There
    are no more folds than groups.
    """
    sizes = np.bincount(groups)
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3]))).permutation(len(sizes))
    fold_of, filled = np.zeros(len(sizes), np.int64), np.zeros(min(num_folds, len(sizes)), np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of[group] = np.argmin(filled)
        filled[fold_of[group]] += sizes[group]
    return fold_of[groups]


def cross_fit(
    members: Predictions,
    targets: Targets,
    timeline: Timeline,
    *,
    folds: np.ndarray,
    videos: np.ndarray,
    steps: tuple[str, ...],
    half_windows: tuple[int, ...],
    kept: Sequence[Steps] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> CrossFit:
    """Fit `steps` for every fold on the other folds and score them there, one after the other added.

    `members` as in `calibration.py`; folds (n,) as of `make_folds`, videos (n,) int64 numbers from 0. `kept`: what of
    the steps each fold has, as of `choosing.choose_nested`; None: all. `progress` is told of every fold.
    """
    names = [PLAIN_MEAN, *(f"+ {step}" for step in STEPS if step in steps)]
    video_sums = {name: np.zeros((videos.max() + 1, SIZE)) for name in names}
    predictions = Predictions(*(np.zeros((len(folds), array.shape[-1])) for array in members))
    au_on = np.zeros(predictions.au.shape, bool)
    calibrations = []
    for fold in range(folds.max() + 1):
        held_out, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        own = kept[fold] if kept else whole(steps)
        calibration = fit(*take_parts(members, targets, timeline, others), steps=own, half_windows=half_windows)
        mine, labels, times = take_parts(members, targets, timeline, held_out)
        tempered = temper(mine, calibration.temperature)
        scored_videos, video = np.unique(videos[held_out], return_inverse=True)
        for name, known in zip(names, _stages(calibration, steps)):
            scored = combine_tempered(mine if name == PLAIN_MEAN else tempered, known, times)
            called = scored.au > known.thresholds
            video_sums[name][scored_videos] += grouped_sums(scored, labels, video, len(scored_videos), au_on=called)
        for whole_part, part in zip(predictions, scored):
            whole_part[held_out] = part
        au_on[held_out] = called
        calibrations.append(calibration)
        progress(1)
    return CrossFit(calibrations, predictions, au_on, video_sums)


def _stages(calibration: Calibration, steps: tuple[str, ...]) -> list[Calibration]:
    """The plain mean, then `calibration` with one more of its steps each time."""
    return [
        calibration.until(0),
        *(calibration.until(place) for place, step in enumerate(STEPS, start=1) if step in steps),
    ]


def take_parts(
    members: Predictions, targets: Targets, timeline: Timeline, rows: np.ndarray
) -> tuple[Predictions, Targets, Timeline]:
    """Return some rows of stacked members, of their labels and of their places in time."""
    return take_rows(members, rows), *(type(part)(*(array[rows] for array in part)) for part in (targets, timeline))
