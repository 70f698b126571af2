"""The scores: one table that console, checkpoints, reports and the search read. To add one is to add a row here.

The first is what checkpoints and methods compete by: the challenge score of ABAW4 (arXiv 2202.10659), P = (CCC_V +
CCC_A) / 2 + mean F1 of 8 expressions + mean F1 of 12 action units. Frames without a label of a task do not count for
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from mtl_dist.errors import InputError, nearest
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.metrics import MetricSums
from mtl_dist.tasks import AUS, EXPRESSIONS, TASKS, Batch

LEAST_VARIANCE = 1e-12  # below it predictions, or labels, are constant
NO_SCORE = "no validation set: no score"
HOW_TO_SCORE = "for a score give --data.val, or hold a fold of the videos out: --data.fold K/N"


class Score(NamedTuple):
    """A number that predictions are judged by, or one for every class."""

    key: str  # in records, COMMITs, score.json and settings
    title: str  # of a column
    name: str  # where there is room
    task: str | None  # whose labels it is of; None: of all that have labels
    # Sums with any leading axes -> (...), or (..., names); NaN without labels. None: its objective's meter computes it.
    of: Callable[[MetricSums], np.ndarray] | None
    sign: int = 1  # +1: higher is better, -1: lower
    names: tuple[str, ...] = ()  # what its values are of, where it has several
    floor: Callable[[MetricSums], np.ndarray] | None = None  # of the best constant; None: of `constant_sums`
    is_main: bool = False  # stands in the main table; others stand below it
    table: int | None = None  # its number among the tables of Haider et al. 2022 (arXiv 2207.10878)
    figure: int | None = None  # its number among the figures
    pair: str = ""  # what it shares a column with where there is little room
    worst: float = -1.0  # a value that none is worse than

    def better(self, value: float, than: float) -> bool:
        """Whether one value is better than another."""
        return self.sign * value > self.sign * than


class Meter(Protocol):
    """Scores what a model says of batches."""

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take in a batch and what the model makes of it; padding is none of it."""

    def bad_rows(self) -> list[int]:
        """Return the rows whose predictions are not finite."""

    def sums(self) -> np.ndarray:
        """Return what adds up over ranks, (n,) float64."""

    def scores(self, total: np.ndarray) -> dict[str, Any]:
        """Return the scores that the sums of all ranks make."""

    def floor(self, total: np.ndarray) -> dict[str, Any]:
        """Return the scores of the best constant predictor, which the same sums tell."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Return what is to be looked at, {name: (H, W, 3) uint8}; nothing where a number says it all."""


# ------------------------------------------------------------------------------------------------------------ formulas


class _Moments(NamedTuple):
    """Means, variances and the covariance of predictions x and labels y."""

    n: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    var_x: np.ndarray
    var_y: np.ndarray
    cov: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray) -> _Moments:
        """Of sums (..., 6) as in `MetricSums.va`."""
        n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_x, mean_y = sx / n, sy / n
            var_x, var_y = np.maximum(sxx / n - mean_x**2, 0), np.maximum(syy / n - mean_y**2, 0)
            return cls(n, mean_x, mean_y, var_x, var_y, sxy / n - mean_x * mean_y)

    def share(self, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        """top / bottom: 0 where predictions or labels are constant, NaN without labels."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.where((self.var_x < LEAST_VARIANCE) | (self.var_y < LEAST_VARIANCE), 0.0, top / bottom)
        return np.where(self.n > 0, found, np.nan)


def concordance(sums: np.ndarray) -> np.ndarray:
    """CCC (...) of sums (..., 6): 0 where predictions or labels are constant, NaN without labels."""
    m = _Moments.of(sums)
    return m.share(2 * m.cov, m.var_x + m.var_y + (m.mean_x - m.mean_y) ** 2)


def _rmse(sums: np.ndarray) -> np.ndarray:
    n, _, _, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.maximum(sxx - 2 * sxy + syy, 0) / np.where(n, n, np.nan))


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's."""
    m = _Moments.of(sums)
    return m.share(m.cov, np.sqrt(m.var_x * m.var_y))


def _intraclass(sums: np.ndarray) -> np.ndarray:
    """ICC(3,1) of labels and predictions as two raters (Shrout and Fleiss 1979): CCC without the offset's term."""
    m = _Moments.of(sums)
    return m.share(2 * m.cov, m.var_x + m.var_y)


def _sign_agreement(signs: np.ndarray) -> np.ndarray:
    """SAGR of (..., 3, 3) as in `MetricSums.signs`; a label of 0, as of a neutral face, agrees with exactly 0 only."""
    return _share(np.trace(signs, axis1=-2, axis2=-1), signs.sum((-1, -2)))


def _sign_agreement_not0(signs: np.ndarray) -> np.ndarray:
    """SAGR of labels other than 0."""
    return _share(signs[..., 0, 0] + signs[..., 2, 2], signs[..., (0, 2), :].sum((-1, -2)))


def _commoner_sign(signs: np.ndarray) -> np.ndarray:
    labels = signs.sum(-1)
    return _share(labels.max(-1), labels.sum(-1))


def _commoner_sign_not0(signs: np.ndarray) -> np.ndarray:
    labels = signs[..., (0, 2), :].sum(-1)
    return _share(labels.max(-1), labels.sum(-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.where(whole, whole, np.nan)


def _f1_of_expressions(sums: MetricSums) -> np.ndarray:
    """(..., 8); 0 where a class neither occurs nor is predicted."""
    confusion = sums.confusion
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    f1 = 2 * hits / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)
    return np.where(confusion.sum((-1, -2))[..., None] > 0, f1, np.nan)


def _f1_of_units(sums: MetricSums) -> np.ndarray:
    """(..., 12); 0 where a unit neither occurs nor is predicted."""
    tp, fp, fn, _ = np.moveaxis(sums.au, -1, 0)
    return np.where(sums.au.sum((-1, -2))[..., None] > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan)


def _accuracy(sums: MetricSums) -> np.ndarray:
    """Share of right answers, mean over the units with labels."""
    return _mean_over_units(sums.au[..., 0] + sums.au[..., 3], sums.au.sum(-1))


def _commoner_answer(sums: MetricSums) -> np.ndarray:
    """Share of each unit's commoner answer, mean over the units with labels."""
    labelled, on = sums.au.sum(-1), sums.au[..., 0] + sums.au[..., 2]
    return _mean_over_units(np.maximum(on, labelled - on), labelled)


def _mean_over_units(right: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    num_units = (labelled > 0).sum(-1)
    with np.errstate(invalid="ignore"):
        return (right / np.maximum(labelled, 1)).sum(-1) / np.where(num_units, num_units, np.nan)


def _va(sums: MetricSums) -> np.ndarray:
    return concordance(sums.va).mean(-1)


def _expr(sums: MetricSums) -> np.ndarray:
    return _f1_of_expressions(sums).mean(-1)


def _au(sums: MetricSums) -> np.ndarray:
    return _f1_of_units(sums).mean(-1)


def _challenge(sums: MetricSums) -> np.ndarray:
    """The sum over the tasks that have labels."""
    return sum(np.where(np.isnan(part), 0.0, part) for part in (_va(sums), _expr(sums), _au(sums)))


def _pair(
    key: str,
    title: str,
    formula: Callable[[np.ndarray], np.ndarray],
    *,
    part: str = "va",
    floor: Callable[[np.ndarray], np.ndarray] | None = None,
    what: str = "",
    tables: tuple[int | None, int | None] = (None, None),
    figures: tuple[int | None, int | None] = (None, None),
    **more: Any,
) -> tuple[Score, Score]:
    """Valence and arousal: two scores of one column. The formulas are of one dimension of a part of the sums."""
    axis = {"va": -2, "signs": -3}[part]

    def of(formula: Callable[[np.ndarray], np.ndarray], dimension: int) -> Callable[[MetricSums], np.ndarray]:
        return lambda sums: formula(np.take(getattr(sums, part), dimension, axis=axis))

    return tuple(
        Score(
            f"{key}_{side[0]}", f"{title} {side[0].upper()}{what}", f"{title} {side}{what}", "va", of(formula, place),
            floor=floor and of(floor, place), pair=f"{title} V / A{what}", table=tables[place], figure=figures[place],
            **more)
        for place, side in enumerate(("valence", "arousal"))
    )  # fmt: skip


SCORES = (
    Score("p", "P", "P", None, _challenge, is_main=True, table=5),
    *_pair("ccc", "CCC", concordance, is_main=True, tables=(3, 4), figures=(5, 4)),
    Score("va", "VA", "mean CCC", "va", _va, is_main=True),
    Score("expr", "EXPR F1", "EXPR F1", "expr", _expr, is_main=True, table=1, figure=3),
    Score("au", "AU F1", "AU F1", "au", _au, is_main=True, table=2),
    *_pair("rmse", "RMSE", _rmse, sign=-1, worst=2.0, figures=(7, 8)),
    *_pair("pcc", "PCC", _correlation),
    *_pair("icc", "ICC", _intraclass),
    *_pair("sagr", "SAGR", _sign_agreement, part="signs", floor=_commoner_sign),
    *_pair("sagr_not0", "SAGR", _sign_agreement_not0, part="signs", floor=_commoner_sign_not0, what=", not 0"),
    Score("au_accuracy", "AU accuracy", "AU accuracy", "au", _accuracy, floor=_commoner_answer, figure=2),
    Score("f1_expr", "F1", "F1 of every expression", "expr", _f1_of_expressions, names=EXPRESSIONS),
    Score("f1_au", "F1", "F1 of every action unit", "au", _f1_of_units, names=tuple(f"AU{number}" for number in AUS)),
)  # fmt: skip
FIRST = SCORES[0]
MASKED = Score("masked_loss", "masked loss", "loss of hidden patches", None, of=None, sign=-1, is_main=True, worst=1e6)


# ------------------------------------------------------------------------------------------------------- what has them


def tables() -> tuple[tuple[Score, ...], ...]:
    """Return the scores of every objective; what checkpoints and methods compete by is the first of each."""
    return SCORES, (MASKED,)


def table_of(values: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the scores that values, by their keys, are of: those of faces' labels unless they are of another."""
    return next((table for table in tables() if table[0].key in values), SCORES)


def single_scores() -> list[Score]:
    """Scores of one number, of labels."""
    return [score for score in SCORES if not score.names]


def main_scores(values: Mapping[str, Any] = MappingProxyType({})) -> list[Score]:
    """Scores of the main table, the first of all last: it sums up the others."""
    first, *others = [score for score in table_of(values) if score.is_main]
    return [*others, first]


def more_scores() -> dict[str, list[Score]]:
    """Single scores beside the main ones, by the columns that they share."""
    columns: dict[str, list[Score]] = {}
    for score in single_scores():
        if not score.is_main:
            columns.setdefault(score.pair or score.title, []).append(score)
    return columns


def find_score(key: str, *, setting: str = "score") -> Score:
    """Return a score of one number. Raises `InputError` naming those that there are."""
    known = {score.key: score for score in (*single_scores(), MASKED)}
    if key not in known:
        raise InputError(f"{setting} is {key!r}: {nearest(key, known)}")
    return known[key]


def scores(sums: MetricSums) -> dict[str, Any]:
    """Return every score by its key, {name: value} of one with names; "frames": {task: n}, and "covers".

    A score without labels is None; P is of the tasks that `covers` names. One that cannot be computed though there are
    labels is left out, as is one that an earlier version did not know.
    """
    return _named(sums, {score.key: score.of(sums) for score in SCORES})


def constant_scores(sums: MetricSums) -> dict[str, Any]:
    """Return the scores of the best constant predictor where the labels are those of `sums`: the floor of every table.

    It always predicts the mean valence and arousal (CCC 0) and the commonest expression. For F1 it predicts all action
    units as on, which gives the highest F1; for the accuracy, each unit's commoner answer; for SAGR, the commoner sign.
    """
    constant = constant_sums(sums)
    return _named(sums, {score.key: score.floor(sums) if score.floor else score.of(constant) for score in SCORES})


def constant_sums(sums: MetricSums) -> MetricSums:
    """Return the sums that the constant predictor has where the labels are those of `sums`."""
    constant = MetricSums.zero()
    n, _, sy, _, syy, _ = sums.va.T
    mean = np.nan_to_num(sy / np.maximum(n, 1))  # where it is not known: the CCC of any constant is 0
    constant.va[:] = np.stack([n, n * mean, sy, n * mean**2, syy, mean * sy], axis=-1)
    classes = sums.confusion.sum(1)
    constant.confusion[:, int(np.argmax(classes))] = classes
    constant.au[:, 0], constant.au[:, 1] = sums.au[:, 0] + sums.au[:, 2], sums.au[:, 1] + sums.au[:, 3]
    return constant


def label_sums(counts: LabelCounts) -> MetricSums:
    """Return sums with what counts tell of labels, for `constant_scores`; NaN is what they do not tell."""
    sums = MetricSums.zero()
    sums.va[:] = sums.signs[:] = np.nan
    sums.va[:, 0] = counts.va
    sums.confusion[:, 0] = counts.expr_classes
    sums.au[:, 0] = counts.au_positives
    sums.au[:, 1] = np.array(counts.au) - sums.au[:, 0]
    return sums


def flat_scores(scored: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of scores as `scores` returns them: what is published, and stored with a checkpoint."""
    found = {score.key: scored.get(score.key) for score in (*single_scores(), MASKED)}
    return {key: value for key, value in found.items() if value is not None}


def count_frames(sums: MetricSums) -> dict[str, int]:
    """Frames with labels of each task; of AU, of the unit with the most."""
    counts = sums.va[0, 0], sums.confusion.sum(), sums.au.sum(1).max()
    return {task: int(count) for task, count in zip(TASKS, counts)}


def _named(sums: MetricSums, values: dict[str, np.ndarray]) -> dict[str, Any]:
    frames = count_frames(sums)
    found: dict[str, Any] = {}
    for score in SCORES:
        value = values[score.key]
        if score.task and not frames[score.task]:
            found[score.key] = None
        elif not np.isnan(value).any():
            found[score.key] = {n: float(v) for n, v in zip(score.names, value)} if score.names else float(value)
    return found | {"frames": frames, "covers": [task for task in TASKS if frames[task]]}
