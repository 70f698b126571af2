"""Weights of an ensemble's members: those of the greatest CCC, and by ensemble selection those of any score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_ROUNDS, LEAST_GAIN = 40, 1e-6  # of ensemble selection


def select_members(parts: np.ndarray, score: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return the weights (M,) of ensemble selection (Caruana et al. 2004) on parts (M, n, ...).

    From the plain mean on, one member is counted once more or once less, whichever raises the score of the mean most,
    until nothing does. Likelihood would be smoother, but a mixture of calibrated members is underconfident, so that its
    likelihood favours the best member alone, where F1 does not.
    """
    counts = np.ones(len(parts))
    if not parts.shape[1]:
        return counts / len(counts)
    best = score(parts.mean(0))
    for _ in range(MAX_ROUNDS):
        total = np.tensordot(counts, parts, axes=1)
        moves = [(member, by) for member in range(len(parts)) for by in (1, -1)]
        moves = [(member, by) for member, by in moves if counts[member] + by >= 0 and counts.sum() + by >= 1]
        found = [score((total + by * parts[member]) / (counts.sum() + by)) for member, by in moves]
        if max(found) < best + LEAST_GAIN:
            break
        best = max(found)
        member, by = moves[int(np.argmax(found))]
        counts[member] += by
    return counts / counts.sum()


def concordance_weights(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the weights (M,), at least 0 and of sum 1, that give the mean of x (M, n) the greatest CCC with y (n,).

    With w on the simplex CCC is 2 c'w / (w'Qw + var y), Q the covariance of members plus the product of their
    offsets: a linear over a convex function, whose only maximum Dinkelbach's method finds; each of its quadratic
    programs by projected gradients.
    """
    weights = np.full(len(x), 1 / len(x))
    offset, centred, label = x.mean(1) - y.mean(), x - x.mean(1, keepdims=True), y - y.mean()
    quadratic = centred @ centred.T / len(y) + np.outer(offset, offset)
    linear, spread = centred @ label / len(y), label.var()

    def ccc(w: np.ndarray) -> float:
        return float(2 * linear @ w / max(w @ quadratic @ w + spread, 1e-12))

    start = max([weights, *np.eye(len(x))], key=ccc)  # the first of equals: the plain mean
    if ccc(start) <= 0:
        return weights
    weights, steepest = start, np.linalg.eigvalsh(quadratic)[-1]
    for _ in range(50):
        ratio = ccc(weights)
        found = weights
        for _ in range(200):
            found = _onto_simplex(found + (linear / ratio - quadratic @ found) / max(steepest, 1e-12))
        if ccc(found) - ratio < 1e-9:
            break
        weights = found
    return weights


def _onto_simplex(w: np.ndarray) -> np.ndarray:
    """Return the nearest point with entries at least 0 and sum 1 (Duchi et al. 2008)."""
    descending = np.sort(w)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(w) + 1)
    return np.maximum(w - excess[np.flatnonzero(descending > excess)[-1]], 0)
