"""What calibration adds to the plain mean: fitted for every fold on the others, and on all rows for new data."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.objective.calibration import Calibration, describe, fit, stack_members
from mtl_dist.objective.crossfit import CrossFit, cross_fit, make_folds
from mtl_dist.predicting.predictions import PredictionTable
from mtl_dist.progress import progress_bar
from mtl_dist.shards.splits import group_rows
from mtl_dist.timeline import make_timeline


class Fitted(NamedTuple):
    """What calibration found."""

    crossfit: CrossFit
    folds: np.ndarray  # (n,) of every row
    final: Calibration  # fitted on all rows


def calibrate(tables: list[PredictionTable], command: EnsembleCommand) -> Fitted | None:
    """Fit the steps for every fold and on all rows; None where none is asked for, or all rows are of one video."""
    if not command.steps:
        return None
    (_, _, targets), images, videos = tables[0]
    folds = make_folds(group_rows(pa.array(videos), None), command.folds, seed=command.seed)
    if not folds.any():
        print(f"all {len(images)} rows are of one video: nothing can be fitted on other videos, so nothing is fitted")
        return None
    members, timeline = stack_members([table.predicted.predictions for table in tables]), make_timeline(images, videos)
    options = {"steps": command.steps, "half_windows": command.half_windows}
    if videos == images:
        print(
            "note: no image names a video that it shares with another, so single images are dealt into folds: where "
            "several show one person, what is fitted on some is scored on that person too; a set made from a table "
            "with a column person keeps people apart"
        )
    with progress_bar("fitting", int(folds.max()) + 2) as advance:
        crossfit = cross_fit(members, targets, timeline, folds=folds, progress=advance, **options)
        final = fit(members, targets, timeline, **options)
        advance(1)
    return Fitted(crossfit, folds, final)


def about_calibration(
    fitted: Fitted, command: EnsembleCommand, names: list[str], first: PredictionTable
) -> dict[str, Any]:
    """Say which rows every parameter was fitted on, and where it was applied. The fold of each row is in the table."""
    has_videos = first.videos != first.images
    folds = []
    for number, calibration in enumerate(fitted.crossfit.calibrations):
        held_out = [name for name, fold in zip(first.videos, fitted.folds) if fold == number]
        about = {"scored_rows": len(held_out), "fitted_rows": len(first.images) - len(held_out)}
        if has_videos:
            about["scored_videos"] = sorted(set(held_out))
        folds.append(about | {"parameters": describe(calibration, names, steps=command.steps)})
    return {
        "steps": list(fitted.crossfit.sums)[1:],
        "half_windows": list(command.half_windows),
        "seed": command.seed,
        "split_by": "video" if has_videos else "image",
        "folds": folds,  # each was scored with parameters fitted on all the others
        "parameters": describe(fitted.final, names, steps=command.steps),  # fitted on all rows; for new data
    }
