"""Metrics as additive sums: one vector, one all-reduce, the same scores for any split of the data over ranks.

What is made of the sums is in `scores.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS

AU_THRESHOLD = 0.5
_SHAPES = ((2, 6), (NUM_EXPRESSIONS, NUM_EXPRESSIONS), (NUM_AUS, 4), (2, 3, 3))
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
    """Additive counts and moments, float64; any axes may stand before those that are named."""

    va: np.ndarray  # (2, 6): n, sum x, sum y, sum xx, sum yy, sum xy of valence and arousal
    confusion: np.ndarray  # (8, 8): labelled class, predicted class
    au: np.ndarray  # (12, 4): TP, FP, FN, TN
    signs: np.ndarray  # (2, 3, 3) of valence and arousal: labelled sign (-1, 0, 1), predicted sign

    @classmethod
    def zero(cls) -> MetricSums:
        """Return the sums of no frames."""
        return cls(*(np.zeros(shape) for shape in _SHAPES))

    def plus(self, other: MetricSums) -> MetricSums:
        """Add the sums of other frames."""
        return MetricSums(*(mine + theirs for mine, theirs in zip(self, other)))

    def flatten(self) -> np.ndarray:
        """(142,) float64: what ranks add up."""
        return np.concatenate([part.ravel() for part in self])

    @classmethod
    def unflatten(cls, flat: np.ndarray) -> MetricSums:
        """Sums of (..., 142)."""
        parts = np.split(flat, np.cumsum(_SIZES)[:-1], axis=-1)
        return cls(*(part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, _SHAPES)))


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
    x, y = predictions.va[targets.va_mask], targets.va[targets.va_mask]
    signs = np.bincount(sign_cells(x, y).ravel(), minlength=18).reshape(2, 3, 3)
    return MetricSums(va, *(part.astype(np.float64) for part in (confusion.reshape(8, 8), au, signs)))


def sign_cells(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, 2): the cell of `MetricSums.signs`, laid out flat, that each prediction x and label y (n, 2) counts in."""
    row, column = ((values > 0).astype(np.int64) - (values < 0) + 1 for values in (y, x))
    return np.array([0, 9]) + 3 * row + column


def va_moments(va: np.ndarray, targets: Targets) -> np.ndarray:
    """Reduce predicted valence and arousal (n, 2) and their labels to (2, 6) moments, as in `MetricSums`."""
    x, y = (array[targets.va_mask].astype(np.float64) for array in (va, targets.va))
    moments = [np.full(2, len(x)), x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)]
    return np.stack(moments, axis=-1).astype(np.float64)
