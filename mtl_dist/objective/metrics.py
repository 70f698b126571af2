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
SIZE = sum(_SIZES)  # of all sums, laid out flat


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
        """(SIZE,) float64: what ranks add up."""
        return np.concatenate([part.ravel() for part in self])

    @classmethod
    def unflatten(cls, flat: np.ndarray) -> MetricSums:
        """Sums of (..., SIZE)."""
        parts = np.split(flat, np.cumsum(_SIZES)[:-1], axis=-1)
        return cls(*(part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, _SHAPES)))


def metric_sums(
    predictions: Predictions, targets: Targets, *, au_thresholds: float | np.ndarray = AU_THRESHOLD
) -> MetricSums:
    """Reduce predictions and targets of n frames to sums. An AU is on above its threshold, one for all or (12,)."""
    whole = np.zeros(len(predictions.va), np.int64)
    return MetricSums.unflatten(grouped_sums(predictions, targets, whole, 1, au_on=predictions.au > au_thresholds)[0])


def grouped_sums(
    predictions: Predictions, targets: Targets, group: np.ndarray, num_groups: int, *, au_on: np.ndarray
) -> np.ndarray:
    """Reduce n frames to the sums of every group, laid out flat: (G, SIZE) float64, all groups at once.

    `group` (n,) int64 numbers that of each frame from 0; `au_on` (n, 12) bool are the units that are predicted. A sum
    that is added here and in `MetricSums` is everywhere: in evaluation, in tables, and in every draw of a bootstrap.
    """

    def count(cells: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
        """(G, size): how often each cell occurs."""
        return np.bincount(groups * size + cells, minlength=num_groups * size).reshape(num_groups, size)

    has_va, has_expr, has_au = (mask.astype(bool) for mask in (targets.va_mask, targets.expr_mask, targets.au_mask))
    x, y = (values[has_va].astype(np.float64) for values in (predictions.va, targets.va))
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1).reshape(len(x), 12)
    va = np.stack([np.bincount(group[has_va], weights=term, minlength=num_groups) for term in terms.T], axis=1)

    truth, guess = targets.expr[has_expr].astype(np.int64), predictions.expr[has_expr].argmax(-1)
    confusion = count(truth * NUM_EXPRESSIONS + guess, group[has_expr], NUM_EXPRESSIONS**2)

    kinds = 2 * ~au_on + ~(targets.au > 0)  # TP, FP, FN, TN
    au = [count(kind[known], group[known], 4) for kind, known in zip(kinds.T, has_au.T)]

    # The sign that is labelled, then the one that is predicted: -1, 0, 1.
    row, column = ((values > 0).astype(np.int64) - (values < 0) + 1 for values in (y, x))
    cells = np.array([0, 9]) + 3 * row + column
    signs = count(cells.ravel(), np.repeat(group[has_va], 2), 18)
    return np.concatenate([va, confusion, *au, signs], axis=1).astype(np.float64)


def va_moments(va: np.ndarray, targets: Targets) -> np.ndarray:
    """Reduce predicted valence and arousal (n, 2) and their labels to (2, 6) moments, as in `MetricSums`."""
    x, y = (array[targets.va_mask].astype(np.float64) for array in (va, targets.va))
    moments = [np.full(2, len(x)), x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)]
    return np.stack(moments, axis=-1).astype(np.float64)
