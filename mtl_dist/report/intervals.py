"""Bootstrap confidence intervals: the validation set's videos are drawn with replacement, and all scored again.

Frames of a video are near copies of each other, so videos are what is independent. Scores are functions of additive
sums: those of every video are taken once, and a draw is a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.objective.metrics import MetricSums
from mtl_dist.report.results import Method, Result
from mtl_dist.shards.splits import group_rows
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS

KEYS = ("p", "ccc_v", "ccc_a", "va", "expr", "au")
TASK_OF = {"ccc_v": "va", "ccc_a": "va", "va": "va", "expr": "expr", "au": "au"}
LEVEL = 0.95
CHUNK = 100  # draws at once
LEAST_VIDEOS = 2
FEW_VIDEOS = 10


class Interval(NamedTuple):
    low: float
    high: float


class Bootstrap(NamedTuple):
    """Scores of every method in every draw, the mean over its seeds; nan where a draw lacks a task's labels."""

    num_videos: int
    labelled: dict[str, int]  # task -> videos that have its labels
    draws: dict[str, dict[str, np.ndarray]]  # method -> score -> (D,)

    def videos(self, key: str) -> int:
        """How many videos have the labels that a score is of; of P, those of its task with the fewest."""
        covered = [count for count in self.labelled.values() if count]
        return min(covered, default=0) if key == "p" else self.labelled[TASK_OF[key]]

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
    covers = results[0].scores["covers"]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    parts = []
    for begin in range(0, num_draws, CHUNK):
        counts = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), min(CHUNK, num_draws - begin))
        parts.append(sums_to_scores(counts.astype(np.float64) @ per_video, covers))
    drawn = {key: np.concatenate([part[key] for part in parts], axis=1) for key in KEYS}
    places = {id(result): place for place, result in enumerate(results)}
    return Bootstrap(
        num_videos,
        labelled,
        {
            method.label: {key: drawn[key][[places[id(result)] for result in method.results]].mean(0) for key in KEYS}
            for method in methods
        },
    )


def video_sums(result: Result, video: np.ndarray) -> np.ndarray:
    """(V, 124): the metric sums of every video's rows; `video` (n,) numbers them from 0.

    As `Result.sums` of each, for all videos at once: a call a video takes minutes where there are a hundred thousand.
    """
    num_videos = int(video.max()) + 1
    predictions, targets = result.predicted.predictions, result.predicted.targets

    has_va, has_expr, has_au = (mask.astype(bool) for mask in (targets.va_mask, targets.expr_mask, targets.au_mask))
    x, y = (values[has_va].astype(np.float64) for values in (predictions.va, targets.va))
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1).reshape(len(x), 12)
    va = [np.bincount(video[has_va], weights=term, minlength=num_videos) for term in terms.T]

    truth, guess = targets.expr[has_expr].astype(np.int64), predictions.expr[has_expr].argmax(-1)
    cell = (video[has_expr] * NUM_EXPRESSIONS + truth) * NUM_EXPRESSIONS + guess
    confusion = np.bincount(cell, minlength=num_videos * NUM_EXPRESSIONS**2)

    cell = 2 * ~result.au_on + ~(targets.au > 0)  # TP, FP, FN, TN
    au = [
        np.bincount(video[known] * 4 + kind[known], minlength=num_videos * 4).reshape(num_videos, 4)
        for kind, known in zip(cell.T, has_au.T)
    ]
    return np.concatenate([np.stack(va, 1), confusion.reshape(num_videos, -1), *au], axis=1).astype(np.float64)


def sums_to_scores(flat: np.ndarray, covers: list[str]) -> dict[str, np.ndarray]:
    """Scores (...) of sums (..., 124), as `metrics.scores` defines them; P of the tasks in `covers`."""
    sizes = [part.size for part in MetricSums.zero()]
    va, confusion, au = np.split(flat, np.cumsum(sizes)[:-1], axis=-1)
    ccc = _concordance(va.reshape(*va.shape[:-1], 2, 6))
    confusion = confusion.reshape(*confusion.shape[:-1], NUM_EXPRESSIONS, NUM_EXPRESSIONS)
    au = au.reshape(*au.shape[:-1], NUM_AUS, 4)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    f1_expr = 2 * hits / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)
    f1_au = 2 * au[..., 0] / np.maximum(2 * au[..., 0] + au[..., 1] + au[..., 2], 1)
    found = {
        "ccc_v": ccc[..., 0],
        "ccc_a": ccc[..., 1],
        "va": ccc.mean(-1),
        "expr": np.where(confusion.sum((-1, -2)) > 0, f1_expr.mean(-1), np.nan),
        "au": np.where(au.sum((-1, -2)) > 0, f1_au.mean(-1), np.nan),
    }
    return found | {"p": sum((found[task] for task in covers), np.zeros(flat.shape[:-1]))}


def _concordance(moments: np.ndarray) -> np.ndarray:
    """CCC (...) of moments (..., 6): nan without rows, 0 where predictions or labels are constant."""
    n, sx, sy, sxx, syy, sxy = np.moveaxis(moments, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = sx / n, sy / n
        var_x, var_y = np.maximum(sxx / n - mean_x**2, 0), np.maximum(syy / n - mean_y**2, 0)
        ccc = 2 * (sxy / n - mean_x * mean_y) / (var_x + var_y + (mean_x - mean_y) ** 2)
    ccc = np.where((var_x < 1e-12) | (var_y < 1e-12), 0.0, ccc)
    return np.where(n > 0, ccc, np.nan)


def _central(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
