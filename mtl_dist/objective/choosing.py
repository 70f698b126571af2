"""Which steps of a calibration help: each is added in its order, for a task, and kept where it raises the task's score.

What decides is the score out of fold: parameters are fitted on some videos and scored on others. Tasks are decided
apart, for no step of one touches another, and P is their sum.

A step that was kept for its score on some videos looks better there than it is. So the choice is cross-fitted too
(nested cross-validation: Stone 1974; Varma and Simon 2006): for a fold the videos of all other folds are dealt into
folds again, the inner ones, and steps are chosen by what they gain out of these. Then the kept steps are fitted on all
other folds, and the fold is scored: its labels had no part in choosing or in fitting what is applied to it. The score
over all folds is that of the whole procedure, choosing included. What is applied to new data is chosen out of all folds
and fitted on all rows.

Action units are compared at thresholds fitted together with each step, where thresholds are asked for: before that
step they would be called above 0.5, where a step that needs other thresholds looks worthless. The thresholds
themselves are compared with 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtl_dist.objective.calibration import STEPS, TASKS_OF, Calibration, Steps, combine_tempered, fit_step, temper
from mtl_dist.objective.crossfit import make_folds, take_parts
from mtl_dist.objective.gains import Compared
from mtl_dist.objective.metrics import AU_THRESHOLD, SIZE, MetricSums, Predictions, Targets, grouped_sums
from mtl_dist.objective.scores import find_score
from mtl_dist.timeline import Timeline

LEAST_GAIN = 1e-6  # less is rounding
NUM_INNER = 4  # folds that the videos of all other folds are dealt into


class Choice(NamedTuple):
    """What was kept of the steps, and what each did when it was tried."""

    kept: Steps  # without steps that no task keeps
    tried: dict[str, Compared]  # on top of what was kept of the steps before it


class Nested(NamedTuple):
    """Choices for every fold, each from the other folds alone, and the one from all of them."""

    folds: list[Steps]
    final: Choice


def choose_nested(
    members: Predictions,
    targets: Targets,
    timeline: Timeline,
    *,
    folds: np.ndarray,
    videos: np.ndarray,
    steps: tuple[str, ...],
    half_windows: tuple[int, ...],
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> Nested:
    """Choose among `steps` for every fold, and for new data; arguments as of `crossfit.cross_fit`.

    The seed deals the videos of the others into at most `NUM_INNER` folds: about (`NUM_INNER` + 1) fits of all steps
    for every fold. `progress` is told of (folds + 1) times the steps.
    """
    options = {"steps": steps, "half_windows": half_windows, "progress": progress}
    chosen = []
    for fold in range(folds.max() + 1):
        others = np.flatnonzero(folds != fold)
        groups = np.unique(videos[others], return_inverse=True)[1]
        inner, one = make_folds(groups, NUM_INNER, seed=seed), np.zeros_like(groups)  # no sums of videos apart
        chosen.append(choose(*take_parts(members, targets, timeline, others), folds=inner, videos=one, **options).kept)
    return Nested(chosen, choose(members, targets, timeline, folds=folds, videos=videos, **options))


def choose(
    members: Predictions,
    targets: Targets,
    timeline: Timeline,
    *,
    folds: np.ndarray,
    videos: np.ndarray,
    steps: tuple[str, ...],
    half_windows: tuple[int, ...],
    progress: Callable[[int], None] = lambda count: None,
) -> Choice:
    """Add one of `steps` after the other, and keep it for the tasks whose score it raises out of fold.

    With one fold there are no others to fit on, and nothing is kept. `progress` is told of every step.
    """
    if not folds.max():
        progress(len(steps))
        return Choice({}, {})
    at_half, rows = "thresholds" not in steps, (members, targets, timeline)
    parts = [_open_part(*rows, videos=videos, is_own=folds == fold, at_half=at_half) for fold in range(folds.max() + 1)]
    kept, tried = {}, {}
    for step in (step for step in STEPS if step in steps):
        pairs = [part.without_and_with(step, half_windows=half_windows, at_half=at_half) for part in parts]
        sums = np.zeros((2, videos.max() + 1, SIZE))
        for part, pair in zip(parts, pairs):
            for total, calibration in zip(sums, pair):
                part.add_sums(total, calibration)
        tried[step] = Compared(*sums, TASKS_OF[step])
        if tasks := tuple(task for task in TASKS_OF[step] if _gain(task, *sums) > LEAST_GAIN):
            kept[step] = tasks
        parts = [part.keeping(step, tasks, *pair) for part, pair in zip(parts, pairs)]
        progress(1)
    return Choice(kept, tried)


def _gain(task: str, before: np.ndarray, after: np.ndarray) -> float:
    """What a task's score gains from one set of sums (V, SIZE) to another; NaN without labels."""
    old, new = (find_score(task).of(MetricSums.unflatten(sums.sum(0))) for sums in (before, after))
    return float(new - old)


class _Part(NamedTuple):
    """A fold, and what was kept so far, fitted on the others."""

    others: tuple[Predictions, Targets, Timeline]  # members have the temperatures that were kept
    own: tuple[Predictions, Targets, Timeline]  # likewise
    videos: np.ndarray  # of its own rows
    found: Calibration  # where thresholds are to come, with those for what was kept so far

    def without_and_with(
        self, step: str, *, half_windows: tuple[int, ...], at_half: bool
    ) -> tuple[Calibration, Calibration]:
        """Return the calibration so far, and the one with the step for all its tasks."""
        if step == "thresholds":
            half = np.full_like(self.found.thresholds, AU_THRESHOLD)
            return self.found._replace(thresholds=half), self.found
        more = fit_step(step, *self.others, self.found, half_windows=half_windows, at_half=at_half)
        if "au" in TASKS_OF[step] and not at_half:
            more = _with_thresholds(self._tempered(self.others, more), more)
        return self.found, more

    def add_sums(self, total: np.ndarray, calibration: Calibration) -> None:
        """Add the sums of the fold's own rows, under a calibration, to those of all videos (V, SIZE)."""
        members, labels, times = self._tempered(self.own, calibration)
        scored = combine_tempered(members, calibration, times)
        groups, video = np.unique(self.videos, return_inverse=True)
        total[groups] += grouped_sums(scored, labels, video, len(groups), au_on=scored.au > calibration.thresholds)

    def keeping(self, step: str, tasks: tuple[str, ...], without: Calibration, with_it: Calibration) -> _Part:
        """Go on with what tasks keep of a step."""
        found = without.taking(with_it, step, tasks)
        if "au" in tasks:
            found = found.taking(with_it, "thresholds", ("au",))
        return self._replace(
            others=self._tempered(self.others, found), own=self._tempered(self.own, found), found=found
        )

    def _tempered(self, rows: tuple[Predictions, Targets, Timeline], calibration: Calibration):
        """Return rows with a calibration's temperatures: they have those that were kept, which are none till then."""
        members, *rest = rows
        is_new = not np.array_equal(calibration.temperature, self.found.temperature)
        return (temper(members, calibration.temperature) if is_new else members, *rest)


def _open_part(
    members: Predictions, targets: Targets, timeline: Timeline, *, videos: np.ndarray, is_own: np.ndarray, at_half: bool
) -> _Part:
    own, others = np.flatnonzero(is_own), np.flatnonzero(~is_own)
    rows = [take_parts(members, targets, timeline, part) for part in (others, own)]
    found = Calibration.plain_mean(len(members.va))
    return _Part(*rows, videos[own], found if at_half else _with_thresholds(rows[0], found))


def _with_thresholds(rows: tuple[Predictions, Targets, Timeline], calibration: Calibration) -> Calibration:
    return fit_step("thresholds", *rows, calibration, half_windows=(), at_half=False)
