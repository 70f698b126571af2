"""Metrics as additive sums: one vector, one all-reduce, the same scores for any split of the data over ranks.

The challenge score of ABAW4 (arXiv 2202.10659): P = (CCC_V + CCC_A) / 2 + mean F1 of 8 expressions + mean F1 of 12
action units. Frames without a label of a task do not count for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mtl_dist.tasks import AUS, EXPRESSIONS, NUM_AUS, NUM_EXPRESSIONS, LabelCounts

AU_THRESHOLD = 0.5
_SHAPES = ((2, 6), (NUM_EXPRESSIONS, NUM_EXPRESSIONS), (NUM_AUS, 4))
_SIZES = tuple(int(np.prod(shape)) for shape in _SHAPES)


class Predictions(NamedTuple):
    """Predictions of n frames: what is scored, combined and written."""

    va: np.ndarray  # (n, 2) float, in [-1, 1]
    expr: np.ndarray  # (n, 8) float probabilities
    au: np.ndarray  # (n, 12) float probabilities


class Targets(NamedTuple):
    """Labels of n frames with their masks, as in `tasks.Labels` without the frame axis."""

    va: np.ndarray  # (n, 2)
    expr: np.ndarray  # (n,)
    au: np.ndarray  # (n, 12)
    va_mask: np.ndarray  # (n,)
    expr_mask: np.ndarray  # (n,)
    au_mask: np.ndarray  # (n, 12)


class MetricSums(NamedTuple):
    """Additive counts and moments, float64."""

    va: np.ndarray  # (2, 6): n, sum x, sum y, sum xx, sum yy, sum xy of valence and arousal
    confusion: np.ndarray  # (8, 8): labelled class, predicted class
    au: np.ndarray  # (12, 4): TP, FP, FN, TN

    @classmethod
    def zero(cls) -> MetricSums:
        return cls(*(np.zeros(shape) for shape in _SHAPES))

    def plus(self, other: MetricSums) -> MetricSums:
        return MetricSums(*(mine + theirs for mine, theirs in zip(self, other)))

    def flatten(self) -> np.ndarray:
        """(124,) float64: what ranks add up."""
        return np.concatenate([part.ravel() for part in self])

    @classmethod
    def unflatten(cls, flat: np.ndarray) -> MetricSums:
        parts = np.split(flat, np.cumsum(_SIZES)[:-1])
        return cls(*(part.reshape(shape) for part, shape in zip(parts, _SHAPES)))


def metric_sums(
    predictions: Predictions, targets: Targets, *, au_thresholds: float | np.ndarray = AU_THRESHOLD
) -> MetricSums:
    """Reduce predictions and targets of n frames to sums. An AU is on above its threshold, one for all or (12,)."""
    truth, guess = targets.expr[targets.expr_mask], predictions.expr[targets.expr_mask].argmax(-1)
    confusion = np.bincount(truth.astype(np.int64) * NUM_EXPRESSIONS + guess, minlength=NUM_EXPRESSIONS**2)
    positive, actual, known = predictions.au > au_thresholds, targets.au > 0, targets.au_mask.astype(bool)
    cells = ((positive & actual), (positive & ~actual), (~positive & actual), (~positive & ~actual))
    au = np.stack([(cell & known).sum(0) for cell in cells], axis=-1)
    va = va_moments(predictions.va, targets)
    return MetricSums(va, confusion.reshape(8, 8).astype(np.float64), au.astype(np.float64))


def va_moments(va: np.ndarray, targets: Targets) -> np.ndarray:
    """Reduce predicted valence and arousal (n, 2) and their labels to (2, 6) moments, as in `MetricSums`."""
    x, y = (array[targets.va_mask].astype(np.float64) for array in (va, targets.va))
    moments = [np.full(2, len(x)), x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)]
    return np.stack(moments, axis=-1).astype(np.float64)


def scores(sums: MetricSums) -> dict[str, Any]:
    """Return the challenge score and its parts.

    {"p", "ccc_v", "ccc_a", "va", "expr", "au", "au_accuracy", "f1_expr": {class: F1}, "f1_au": {AU: F1},
    "frames": {task: n}, "covers": [tasks]}. A task without labels has None and adds nothing to P; `covers` names the
    tasks P covers. The accuracy is the mean over the AUs that have labels.
    """
    frames = {"va": int(sums.va[0, 0]), "expr": int(sums.confusion.sum()), "au": int(sums.au.sum(1).max())}
    ccc_v, ccc_a = (concordance(moments) for moments in sums.va)
    hits = np.diag(sums.confusion)
    f1_expr = _f1(hits, sums.confusion.sum(0) - hits, sums.confusion.sum(1) - hits)
    f1_au = _f1(*sums.au.T[:3])
    parts = {"va": (ccc_v + ccc_a) / 2, "expr": float(f1_expr.mean()), "au": float(f1_au.mean())}
    covers = [task for task in parts if frames[task]]
    return {
        "p": sum(parts[task] for task in covers),
        "ccc_v": ccc_v if frames["va"] else None,
        "ccc_a": ccc_a if frames["va"] else None,
        **{task: parts[task] if task in covers else None for task in parts},
        "au_accuracy": _accuracy(sums.au) if frames["au"] else None,
        "f1_expr": {name: float(f1) for name, f1 in zip(EXPRESSIONS, f1_expr)} if frames["expr"] else None,
        "f1_au": {f"AU{number}": float(f1) for number, f1 in zip(AUS, f1_au)} if frames["au"] else None,
        "frames": frames,
        "covers": covers,
    }


def constant_scores(counts: LabelCounts) -> dict[str, Any]:
    """Return the scores of the best constant predictor on data with these counts: the floor of every table.

    VA constant (CCC 0), the commonest expression always, every action unit always on, which F1 is highest with; the
    accuracy is that of each unit's commoner answer.
    """
    sums = MetricSums.zero()
    sums.va[:, 0] = counts.va
    sums.confusion[:, int(np.argmax(counts.expr_classes))] = counts.expr_classes
    positives, labelled = np.array(counts.au_positives), np.array(counts.au)
    sums.au[:, 0], sums.au[:, 1] = positives, labelled - positives
    return scores(sums) | {"au_accuracy": _majority(positives, labelled)}


def _majority(positives: np.ndarray, labelled: np.ndarray) -> float | None:
    """Share of the commoner answer, mean over the AUs with labels; None without any."""
    has = labelled > 0
    shares = positives[has] / labelled[has]
    return float(np.maximum(shares, 1 - shares).mean()) if has.any() else None


def _f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """F1, 0 where a class neither occurs nor is predicted."""
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def _accuracy(au: np.ndarray) -> float:
    """Share of right answers, mean over the AUs with labels; (12, 4) TP, FP, FN, TN."""
    labelled = au.sum(1)
    return float(((au[:, 0] + au[:, 3])[labelled > 0] / labelled[labelled > 0]).mean())


def concordance(moments: np.ndarray) -> float:
    """CCC of (6,) moments; 0 where predictions or labels are constant."""
    n, sx, sy, sxx, syy, sxy = moments
    if n == 0:
        return 0.0
    mean_x, mean_y = sx / n, sy / n
    var_x, var_y = max(sxx / n - mean_x**2, 0.0), max(syy / n - mean_y**2, 0.0)
    if var_x < 1e-12 or var_y < 1e-12:
        return 0.0
    return float(2 * (sxy / n - mean_x * mean_y) / (var_x + var_y + (mean_x - mean_y) ** 2))
