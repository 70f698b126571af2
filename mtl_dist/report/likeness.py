"""How alike runs predict: an ensemble gains from members that differ, and little from one recipe with another seed."""

from __future__ import annotations

import itertools

import numpy as np

from mtl_dist.objective.metrics import Predictions
from mtl_dist.report.results import Method
from mtl_dist.report.tables import Table, number, text

COLUMNS = ("valence", "arousal", "expressions", "action units")
MAX_METHODS = 12  # 78 rows


def likeness_table(methods: list[Method]) -> Table | None:
    """Correlations of what runs predict, means over pairs of runs of two methods, or of two seeds of one.

    None where there is one run.
    """
    trained = [method for method in methods if not method.kind][:MAX_METHODS]
    rows = []
    for one, other in itertools.combinations_with_replacement(trained, 2):
        of_one = itertools.combinations(one.results, 2)
        pairs = of_one if one is other else itertools.product(one.results, other.results)
        found = [correlations(a.predicted.predictions, b.predicted.predictions) for a, b in pairs]
        if found:
            name = f"{one.label}, two seeds" if one is other else f"{one.label} and {other.label}"
            rows.append([text(name), *(number(_mean(column), 3) for column in np.transpose(found))])
    note = (
        "Correlation over the validation rows; of expressions and units the mean over theirs, of probabilities. Of "
        "members as good, those that are less alike make the better ensemble."
    )
    return Table("likeness", "How alike the runs predict", ("Runs", *COLUMNS), rows, note) if rows else None


def correlations(one: Predictions, other: Predictions) -> list[float]:
    """Return the correlation of valence, of arousal, and the means of those of EXPR and of AU probabilities.

    NaN where one of both never changes.
    """
    found = [_correlate(a, b) for a, b in zip(one, other)]
    means = [_mean(of_classes) for of_classes in found[1:]]
    return [*found[0], *(np.nan if mean is None else mean for mean in means)]


def _correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) - x.mean(0, dtype=np.float64) for x in (a, b))
    spread = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), spread, out=np.full(len(spread), np.nan), where=spread > 1e-12)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
