"""Each task from the checkpoint that is best at it: what a run's best checkpoints of single tasks bring together.

The highest of many scores on a set is not to be expected elsewhere. So which of the candidates a task is taken from is
chosen on the videos of all other folds, and scored on those of its own. The candidates themselves are the best of their
runs on all rows, as every run's best checkpoint is: expect less elsewhere.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.objective.crossfit import make_folds
from mtl_dist.objective.metrics import AU_THRESHOLD, MetricSums, Predictions, Targets, grouped_sums, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.members import Member
from mtl_dist.predicting.predictions import PredictionTable
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.weights import open_weights
from mtl_dist.shards.splits import group_rows
from mtl_dist.tasks import TASKS

NAME = "each task from its best checkpoint"  # of its row among the scores


class ByTask(NamedTuple):
    """What taking each task from another checkpoint brings."""

    scores: dict[str, Any]  # of all rows, each by what was chosen on other folds
    chosen: dict[str, dict[str, int]]  # {task: {member: how many folds took it}}
    video_sums: np.ndarray  # (V, SIZE) of every video


def open_best_of_tasks(members: dict[str, Member]) -> dict[str, Member]:
    """Return the checkpoints that are best at one task, as members named <run>@<task>.

    Those that are a member already, or that another task has, are not named again.
    """
    found: dict[str, Member] = {}
    for name, member in members.items():
        seen = {member.weights.uri}
        for task in TASKS:
            checkpoints = [c for c in committed(member.run_uri)[0] if c.finite_score(task) is not None]
            if not checkpoints:
                continue
            chosen = max(checkpoints, key=lambda checkpoint: (checkpoint.finite_score(task), checkpoint.step))
            weights = open_weights(chosen.uri)
            if weights.uri not in seen:
                seen.add(weights.uri)
                found[f"{name}@{task}"] = member._replace(weights=weights)
    return found


def choose_by_task(tables: dict[str, PredictionTable], command: EnsembleCommand) -> ByTask | None:
    """Choose for every fold and task the member with the highest score on the other folds; None where all rows are of
    one video."""
    first = next(iter(tables.values()))
    videos = group_rows(pa.array(first.videos), None)
    folds = make_folds(videos, command.folds, seed=command.seed)
    if not folds.any():
        return None
    targets = first.predicted.targets
    found = Predictions(*(np.empty_like(array) for array in first.predicted.predictions))
    chosen: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for fold in range(folds.max() + 1):
        own, others = folds == fold, folds != fold
        elsewhere = {
            name: scores(metric_sums(_rows(table.predicted.predictions, others), _labels(targets, others)))
            for name, table in tables.items()
        }
        for task in TASKS:
            known = {name: scored[task] for name, scored in elsewhere.items() if scored[task] is not None}
            name = max(known, key=known.__getitem__, default=next(iter(tables)))
            chosen[task][name] += 1
            getattr(found, task)[own] = getattr(tables[name].predicted.predictions, task)[own]
    sums = grouped_sums(found, targets, videos, videos.max() + 1, au_on=found.au > AU_THRESHOLD)
    total = MetricSums.unflatten(sums.sum(0))
    return ByTask(scores(total), {task: dict(counts) for task, counts in chosen.items()}, sums)


def _rows(predictions: Predictions, rows: np.ndarray) -> Predictions:
    return Predictions(*(array[rows] for array in predictions))


def _labels(targets: Targets, rows: np.ndarray) -> Targets:
    return Targets(*(array[rows] for array in targets))
