"""What calibration adds to the plain mean: fitted for every fold on the others, and on all rows for new data."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.objective.calibration import TASKS_OF, Calibration, Steps, describe, fit, stack_members, whole
from mtl_dist.objective.choosing import Nested, choose_nested
from mtl_dist.objective.crossfit import CrossFit, cross_fit, make_folds
from mtl_dist.objective.gains import Compared
from mtl_dist.predicting.predictions import PredictionTable
from mtl_dist.progress import progress_bar
from mtl_dist.shards.splits import group_rows
from mtl_dist.timeline import make_timeline


class Fitted(NamedTuple):
    """What calibration found."""

    crossfit: CrossFit
    folds: np.ndarray  # (n,) of every row
    final: Calibration  # fitted on all rows
    nested: Nested | None  # what was kept of the steps; None: all

    @property
    def compared(self) -> dict[str, Compared]:
        """Every step out of fold, by its name among the scores: without it and with it.

        Where steps may be left out, as each was tried on top of those that are kept for new data; else as it was added.
        """
        names, sums = list(self.crossfit.video_sums), list(self.crossfit.video_sums.values())
        if self.nested:
            return {name: self.nested.final.tried[_step_of(name)] for name in names[1:]}
        return {
            name: Compared(before, after, TASKS_OF[_step_of(name)])
            for name, before, after in zip(names[1:], sums, sums[1:])
        }


def _step_of(name: str) -> str:
    return name.removeprefix("+ ")


def calibrate(tables: list[PredictionTable], command: EnsembleCommand) -> Fitted | None:
    """Fit the steps for every fold and on all rows; None where none is asked for, or all rows are of one video."""
    if not command.steps:
        return None
    (_, _, targets), images, videos = tables[0]
    groups = group_rows(pa.array(videos), None)
    folds = make_folds(groups, command.folds, seed=command.seed)
    if not folds.any():
        print(f"all {len(images)} rows are of one video: nothing can be fitted on other videos, so nothing is fitted")
        return None
    members, timeline = stack_members([table.predicted.predictions for table in tables]), make_timeline(images, videos)
    rows, options = (members, targets, timeline), {"steps": command.steps, "half_windows": command.half_windows}
    if videos == images:
        print(
            "note: no image names a video that it shares with another, so single images are dealt into folds: where "
            "several show one person, what is fitted on some is scored on that person too; a set made from a table "
            "with a column person keeps people apart"
        )
    options |= {"folds": folds, "videos": groups}
    num_folds, nested = int(folds.max()) + 1, None
    num_choices = (num_folds + 1) * len(command.steps) if command.calibrate == "auto" else 0
    with progress_bar("fitting", num_choices + num_folds + 1) as advance:
        if num_choices:
            nested = choose_nested(*rows, **options, seed=command.seed, progress=advance)
        crossfit = cross_fit(*rows, **options, kept=nested.folds if nested else None, progress=advance)
        steps = nested.final.kept if nested else whole(command.steps)
        final = fit(*rows, steps=steps, half_windows=command.half_windows)
        advance(1)
    return Fitted(crossfit, folds, final, nested)


def about_calibration(
    fitted: Fitted, command: EnsembleCommand, names: list[str], first: PredictionTable
) -> dict[str, Any]:
    """Say which rows every parameter was fitted on, and where it was applied. The fold of each row is in the table."""
    has_videos, nested = first.videos != first.images, fitted.nested
    folds = []
    for number, calibration in enumerate(fitted.crossfit.calibrations):
        held_out = [name for name, fold in zip(first.videos, fitted.folds) if fold == number]
        about = {"scored_rows": len(held_out), "fitted_rows": len(first.images) - len(held_out)}
        if has_videos:
            about["scored_videos"] = sorted(set(held_out))
        if nested:
            about["kept"] = _listed(nested.folds[number])  # chosen on the other folds
        folds.append(about | {"parameters": describe(calibration, names, steps=command.steps)})
    about = {
        "steps": list(fitted.crossfit.sums)[1:],
        "half_windows": list(command.half_windows),
        "seed": command.seed,
        "split_by": "video" if has_videos else "image",
        "folds": folds,  # each was scored with parameters fitted on all the others
        "parameters": describe(fitted.final, names, steps=command.steps),  # fitted on all rows; for new data
    }
    if nested:
        counts = {step: Counter(task for kept in nested.folds for task in kept.get(step, ())) for step in command.steps}
        about["kept"] = _listed(nested.final.kept)  # chosen on all folds; for new data
        about["kept_by_folds"] = {step: {task: counts[step][task] for task in TASKS_OF[step]} for step in counts}
    return about


def _listed(kept: Steps) -> dict[str, list[str]]:
    return {step: list(tasks) for step, tasks in kept.items()}
