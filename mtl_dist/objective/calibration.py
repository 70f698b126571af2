"""Combine members' predictions and calibrate what comes out.

Members are `Predictions` whose arrays have an axis of M members in front: va (M, n, 2), expr (M, n, 8), au (M, n, 12),
float64. Every fit is deterministic, and leaves what it has no labels for as the plain mean has it.

    temperature      one a member and task (EXPR, AU): the likelihood of the labels (Guo et al. 2017). Models
                     give probabilities here; their logarithms are the logits but for a constant, which softmax does not
                     see.
    weights          of the members, at least 0, sum 1, for valence, arousal, EXPR and each AU: the greatest CCC, and F1
                     by ensemble selection.
    class_smoothing  half-windows of the probabilities of EXPR and of AUs: the greatest F1.
    prior            EXPR: probabilities are divided by a power of the classes' shares of the labels, and by their sum
                     (logit adjustment, Menon et al. 2021): the greatest F1.
    thresholds       of each AU: the greatest F1.
    smoothing        half-windows of valence and arousal: the greatest CCC.
    moments          valence and arousal are given the mean and standard deviation of the labels, which is the line of
                     the greatest CCC.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from mtl_dist.objective.member_weights import concordance_weights, select_members
from mtl_dist.objective.metrics import AU_THRESHOLD, Predictions, Targets, va_moments
from mtl_dist.objective.scores import concordance
from mtl_dist.objective.smoothing import smooth
from mtl_dist.tasks import AUS, EXPRESSIONS, NUM_AUS, NUM_EXPRESSIONS
from mtl_dist.timeline import Timeline

# In this order, each on what those before it made.
STEPS = ("temperature", "weights", "class_smoothing", "prior", "thresholds", "smoothing", "moments")
# What each has of each task: a field of `Calibration`, and which part of it. No step of one task touches another.
PARTS = {
    ("temperature", "expr"): ("temperature", np.s_[:, 0]), ("temperature", "au"): ("temperature", np.s_[:, 1]),
    ("weights", "va"): ("va_weights", ...), ("weights", "expr"): ("expr_weights", ...),
    ("weights", "au"): ("au_weights", ...),
    ("class_smoothing", "expr"): ("class_half_windows", 0), ("class_smoothing", "au"): ("class_half_windows", 1),
    ("prior", "expr"): ("expr_factors", ...), ("thresholds", "au"): ("thresholds", ...),
    ("smoothing", "va"): ("half_windows", ...), ("moments", "va"): ("va_line", ...),
}  # fmt: skip
TASKS_OF = {step: tuple(task for own, task in PARTS if own == step) for step in STEPS}
Steps = Mapping[str, tuple[str, ...]]  # step -> the tasks that it is taken for, in any order
VA_NAMES = ("valence", "arousal")
AU_NAMES = tuple(f"AU{number}" for number in AUS)

LEAST_SPREAD = 1e-6  # a deviation of valence or arousal below it is none
LEAST_PROBABILITY = 1e-7  # float32 sigmoids saturate about here
MIN_EXAMPLES = 20  # fewer labels say nothing of a temperature, fewer positives nothing of a threshold
TEMPERATURES = (0.05, 20.0)
FEW_ROWS = 10_000  # a temperature is looked for among so many first,
NEAR = 1.02  # and then within this factor of what they say
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # of the classes' shares
NUM_LEVELS = 1024  # of probabilities, where F1 is compared and not yet a threshold found


class Calibration(NamedTuple):
    """How M members become one prediction."""

    temperature: np.ndarray  # (M, 2) of EXPR and AU; 1 leaves probabilities alone
    va_weights: np.ndarray  # (M, 2)
    expr_weights: np.ndarray  # (M,)
    au_weights: np.ndarray  # (M, 12)
    thresholds: np.ndarray  # (12,) an AU is on above it
    half_windows: np.ndarray  # (2,) frame numbers, of valence and arousal
    class_half_windows: np.ndarray  # (2,) of EXPR and AU
    expr_factors: np.ndarray  # (8,) of the probabilities
    va_line: np.ndarray  # (2, 2) factor and offset, of valence and arousal

    @classmethod
    def plain_mean(cls, num_members: int) -> Calibration:
        """Return the calibration that changes nothing: equal weights, thresholds of 0.5, no smoothing."""
        weights = [np.full((num_members, *rest), 1 / num_members) for rest in ((2,), (), (NUM_AUS,))]
        no_windows, same = np.zeros(2, np.int64), np.array([[1.0, 0.0], [1.0, 0.0]])
        thresholds, factors = np.full(NUM_AUS, AU_THRESHOLD), np.ones(NUM_EXPRESSIONS)
        return cls(np.ones((num_members, 2)), *weights, thresholds, no_windows, no_windows, factors, same)

    def until(self, num_steps: int) -> Calibration:
        """Return what is known after the first steps of `STEPS`: the others as the plain mean has them."""
        found = Calibration.plain_mean(len(self.temperature))
        for step in STEPS[:num_steps]:
            found = found.taking(self, step, TASKS_OF[step])
        return found

    def taking(self, other: Calibration, step: str, tasks: Iterable[str]) -> Calibration:
        """Return this calibration with the parameters that `other` has of a step, of some tasks."""
        found = self
        for task in tasks:
            field, place = PARTS[step, task]
            values = getattr(found, field).copy()
            values[place] = getattr(other, field)[place]
            found = found._replace(**{field: values})
        return found


def whole(steps: Iterable[str]) -> Steps:
    """Return steps, each taken for all tasks that it is of."""
    return {step: TASKS_OF[step] for step in steps}


def stack_members(members: list[Predictions]) -> Predictions:
    """Put members' predictions of the same n rows in one, with an axis of members in front."""
    return Predictions(*(np.stack(column).astype(np.float64) for column in zip(*members)))


def take_rows(members: Predictions, rows: np.ndarray) -> Predictions:
    """Return some rows of stacked members."""
    return Predictions(*(array[:, rows] for array in members))


def apply(members: Predictions, calibration: Calibration, timeline: Timeline) -> Predictions:
    """Combine members; thresholds are not applied but given to `metric_sums` and whoever writes decisions."""
    return combine_tempered(temper(members, calibration.temperature), calibration, timeline)


def combine_tempered(members: Predictions, calibration: Calibration, timeline: Timeline) -> Predictions:
    """Do what `apply` does, of members that have their temperatures already."""
    mixed, (half_expr, half_au) = _mix(members, calibration), calibration.class_half_windows
    va = smooth(mixed.va, timeline, calibration.half_windows)
    return Predictions(
        va=_on_line(va, calibration.va_line),
        expr=_weigh(_even(mixed.expr, timeline, half_expr), calibration.expr_factors),
        au=_even(mixed.au, timeline, half_au),
    )


def fit(
    members: Predictions, targets: Targets, timeline: Timeline, *, steps: Steps, half_windows: tuple[int, ...]
) -> Calibration:
    """Find the parameters of `steps` on these rows; all else is left as the plain mean has it."""
    found, tempered = Calibration.plain_mean(len(members.va)), members
    at_half = "au" not in steps.get("thresholds", ())
    for step in STEPS:
        if tasks := steps.get(step):
            more = fit_step(step, tempered, targets, timeline, found, half_windows=half_windows, at_half=at_half)
            found = found.taking(more, step, tasks)
        if step == "temperature":
            tempered = temper(members, found.temperature)
    return found


def fit_step(
    step: str,
    tempered: Predictions,
    targets: Targets,
    timeline: Timeline,
    found: Calibration,
    *,
    half_windows: tuple[int, ...],
    at_half: bool,
) -> Calibration:
    """Return `found` with the parameters of one more step, fitted for all its tasks on top of those that it has.

    `tempered` are members with the temperatures of `found`. `at_half`: units will be called above 0.5, so that their F1
    is taken there; else at the best threshold, for thresholds are to come.
    """
    if step == "temperature":
        return found._replace(temperature=fit_temperatures(tempered, targets))
    if step == "weights":
        return _fit_weights(tempered, targets, found, at_half=at_half)
    mixed, (half_expr, half_au) = _mix(tempered, found), found.class_half_windows
    if step == "class_smoothing":
        chosen = _choose_class_half_windows(mixed, targets, timeline, half_windows, at_half=at_half)
        return found._replace(class_half_windows=chosen)
    if step == "prior":
        return found._replace(expr_factors=_fit_prior(_even(mixed.expr, timeline, half_expr), targets))
    if step == "thresholds":
        return found._replace(thresholds=_fit_thresholds(_even(mixed.au, timeline, half_au), targets))
    if step == "smoothing":
        return found._replace(half_windows=_choose_half_windows(mixed.va, targets, timeline, half_windows))
    assert step == "moments"
    return found._replace(va_line=_match_moments(smooth(mixed.va, timeline, found.half_windows), targets))


def describe(calibration: Calibration, names: list[str], *, steps: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters of `steps` as JSON values, by the names of members, dimensions and AUs."""
    columns = [*calibration.va_weights.T, calibration.expr_weights, *calibration.au_weights.T]
    about = {
        "temperature": {n: {"expr": float(t[0]), "au": float(t[1])} for n, t in zip(names, calibration.temperature)},
        "weights": {
            dimension: dict(zip(names, map(float, column)))
            for dimension, column in zip((*VA_NAMES, "expression", *AU_NAMES), columns)
        },
        "thresholds": dict(zip(AU_NAMES, map(float, calibration.thresholds))),
        "smoothing": dict(zip(VA_NAMES, map(int, calibration.half_windows))),
        "class_smoothing": dict(zip(("expression", "au"), map(int, calibration.class_half_windows))),
        "prior": dict(zip(EXPRESSIONS, map(float, calibration.expr_factors))),
        "moments": {
            name: {"factor": float(factor), "offset": float(offset)}
            for name, (factor, offset) in zip(VA_NAMES, calibration.va_line)
        },
    }
    return {step: about[step] for step in STEPS if step in steps}


# --------------------------------------------------------------------------------------------------------- temperature


def temper(members: Predictions, temperature: np.ndarray) -> Predictions:
    """Divide every member's logits by its temperatures (M, 2) of EXPR and AU; those of 1 leave all as it is."""
    expr, au = (temperature[:, task, None, None] for task in (0, 1))
    if (expr != 1).any():
        powers = np.exp(np.log(members.expr.clip(LEAST_PROBABILITY, 1)) / expr)
        members = members._replace(expr=powers / powers.sum(-1, keepdims=True))
    if (au != 1).any():
        members = members._replace(au=_sigmoid(_logit(members.au) / au))
    return members


def fit_temperatures(members: Predictions, targets: Targets) -> np.ndarray:
    """Return the temperatures (M, 2) of EXPR and AU under which the labels are most likely."""
    has_expr, has_au = targets.expr_mask.astype(bool), targets.au_mask.astype(bool)
    truth, is_on = targets.expr[has_expr].astype(np.int64), targets.au[has_au] > 0
    found = np.ones((len(members.va), 2))
    for number, (expr, au) in enumerate(zip(members.expr, members.au)):
        if len(truth) >= MIN_EXAMPLES:
            found[number, 0] = softmax_temperature(np.log(expr[has_expr].clip(LEAST_PROBABILITY, 1)), truth)
        if len(is_on) >= MIN_EXAMPLES:
            found[number, 1] = sigmoid_temperature(_logit(au[has_au]), is_on)
    return found


def softmax_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return the T that minimises the cross entropy of softmax(logits / T) (n, C) against classes (n,)."""
    columns = np.ascontiguousarray((logits - logits.max(-1, keepdims=True)).T)  # a constant of a row changes nothing
    own, weights = columns[truth, np.arange(len(truth))].mean(), np.empty_like(columns)

    def slope(scale: float) -> float:
        np.exp(np.multiply(columns, scale, out=weights), out=weights)
        return (np.einsum("cn,cn->n", weights, columns) / weights.sum(0)).mean() - own

    return 1 / _minimise_convex(slope, near=_first_scale(softmax_temperature, logits, truth))


def sigmoid_temperature(logits: np.ndarray, is_on: np.ndarray) -> float:
    """Return the T that minimises the binary cross entropy of sigmoid(logits / T) (n,) against labels (n,) bool."""
    half, n, tanh = 0.5 * logits, len(logits), np.empty(len(logits))
    own = logits.mean() - 2 * (logits @ is_on) / n

    def slope(scale: float) -> float:
        np.tanh(np.multiply(half, scale, out=tanh), out=tanh)  # sigmoid(x) = (1 + tanh(x / 2)) / 2
        return own + tanh @ logits / n

    return 1 / _minimise_convex(slope, near=_first_scale(sigmoid_temperature, logits, is_on))


def _first_scale(fit: Callable[[np.ndarray, np.ndarray], float], logits: np.ndarray, truth: np.ndarray) -> float:
    """Return where to look first for 1 / T: where a part of many rows has it, so that all are seen less often."""
    every = len(logits) // FEW_ROWS
    return 1 / fit(logits[::every], truth[::every]) if every > 1 else 1.0


def _minimise_convex(slope: Callable[[float], float], *, near: float) -> float:
    """Return the 1 / T, in which both losses are convex, where their slope is 0, or the bound beyond which it is."""
    slope = functools.cache(slope)
    least, most = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    low, high = max(near / NEAR, least), min(near * NEAR, most)
    while slope(high) <= 0 and high < most:
        low, high = high, min(2 * high, most)
    while slope(low) > 0 and low > least:
        low, high = max(low / 2, least), low
    if slope(high) <= 0:
        return high
    return low if slope(low) > 0 else optimize.brentq(slope, low, high, xtol=1e-12, rtol=1e-10)


def _logit(p: np.ndarray) -> np.ndarray:
    p = p.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return np.log(p / (1 - p))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # never overflows


# ------------------------------------------------------------------------------------------------------------- weights


def _mix(members: Predictions, calibration: Calibration) -> Predictions:
    return Predictions(
        np.einsum("mnd,md->nd", members.va, calibration.va_weights),
        np.einsum("mnc,m->nc", members.expr, calibration.expr_weights),
        np.einsum("mna,ma->na", members.au, calibration.au_weights),
    )


def _fit_weights(members: Predictions, targets: Targets, found: Calibration, *, at_half: bool) -> Calibration:
    """Return `found` with the weights of every task and dimension."""
    if len(members.va) == 1:
        return found
    has_va, has_expr = targets.va_mask.astype(bool), targets.expr_mask.astype(bool)
    x, y = members.va[:, has_va].astype(np.float64), targets.va[has_va].astype(np.float64)
    va = found.va_weights
    if len(y) >= MIN_EXAMPLES:
        va = np.column_stack([concordance_weights(x[..., number], y[:, number]) for number in range(2)])

    truth = targets.expr[has_expr].astype(np.int64)
    expr = select_members(members.expr[:, has_expr], lambda mixed: _macro_f1(mixed, truth))

    au, columns = np.empty_like(found.au_weights), np.ascontiguousarray(np.moveaxis(members.au, -1, 0))  # (12, M, n)
    for number, known in enumerate(targets.au_mask.astype(bool).T):
        score = functools.partial(_best_f1, is_on=targets.au[known, number] > 0, at_half=at_half)
        au[:, number] = select_members(columns[number][:, known], score)
    return found._replace(va_weights=va, expr_weights=expr, au_weights=au)


def _macro_f1(p: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the 8 classes of probabilities (n, 8) against classes (n,)."""
    guess = p.argmax(-1)
    hits, called, actual = (np.bincount(x, minlength=NUM_EXPRESSIONS) for x in (truth[guess == truth], guess, truth))
    return float((2 * hits / np.maximum(called + actual, 1)).mean())


def _best_f1(p: np.ndarray, *, is_on: np.ndarray, at_half: bool) -> float:
    """F1 of probabilities (n,) at the best of 1,024 thresholds, or at 0.5; 0 with fewer than 20 positives."""
    if is_on.sum() < MIN_EXAMPLES:
        return 0.0
    if at_half:
        called = p > AU_THRESHOLD
        return float(2 * (called & is_on).sum() / (called.sum() + is_on.sum()))
    level = (p * NUM_LEVELS).astype(np.int64) + (NUM_LEVELS + 1) * is_on
    counts = np.bincount(level, minlength=2 * (NUM_LEVELS + 1)).reshape(2, -1)[:, ::-1].cumsum(1)
    called, hits = counts.sum(0), counts[1]
    return float((2 * hits / (called + is_on.sum())).max())


# ---------------------------------------------------------------------------------------- lines, factors of classes


def _on_line(va: np.ndarray, line: np.ndarray) -> np.ndarray:
    return va if (line == (1, 0)).all() else (va * line[:, 0] + line[:, 1]).clip(-1, 1)


def _match_moments(va: np.ndarray, targets: Targets) -> np.ndarray:
    """Return the line (2, 2) that gives va (n, 2) the labels' mean and deviation, where the two go together at all.

    For CCC, 2 cov / (var x + var y + (mean difference)^2), no other factor and offset is better.
    """
    line, known = np.array([[1.0, 0.0], [1.0, 0.0]]), targets.va_mask.astype(bool)
    if known.sum() < MIN_EXAMPLES:
        return line
    for dimension, (x, y) in enumerate(zip(va[known].T, targets.va[known].astype(np.float64).T)):
        if x.std() > LEAST_SPREAD and np.mean((x - x.mean()) * (y - y.mean())) > 0:
            factor = y.std() / x.std()
            line[dimension] = factor, y.mean() - factor * x.mean()
    return line


def _weigh(expr: np.ndarray, factors: np.ndarray) -> np.ndarray:
    if (factors == 1).all():
        return expr
    weighed = expr * factors
    return weighed / weighed.sum(-1, keepdims=True)


def _fit_prior(expr: np.ndarray, targets: Targets) -> np.ndarray:
    """Return the factors (8,) of the classes: their shares of the labels to the power of greatest F1, one over it.

    A class without a label keeps the factor of one with one label: it is not called more often for being unknown.
    """
    known = targets.expr_mask.astype(bool)
    truth = targets.expr[known].astype(np.int64)
    if len(truth) < MIN_EXAMPLES:
        return np.ones(NUM_EXPRESSIONS)
    counts = np.bincount(truth, minlength=NUM_EXPRESSIONS).clip(1)
    tried = [(counts / counts.max()) ** -power for power in POWERS]
    found = [_macro_f1(expr[known] * factors, truth) for factors in tried]
    return tried[int(np.argmax(found))]


# ------------------------------------------------------------------------------------------- thresholds and smoothing


def f1_threshold(p: np.ndarray, is_on: np.ndarray) -> float:
    """Return the threshold above which calling rows positive has the greatest F1; of equals the nearest to 0.5.

    Exact: every way to part the n probabilities is tried, and the threshold lies midway between two of them. With fewer
    than 20 positives it is 0.5: the best of so few says nothing of other videos.
    """
    if is_on.sum() < MIN_EXAMPLES:
        return AU_THRESHOLD
    order = np.argsort(-p)  # equal ones in any order: they are not parted
    above, below = p[order], np.append(p[order][1:], -LEAST_PROBABILITY)
    f1 = 2 * np.cumsum(is_on[order]) / (np.arange(1, len(p) + 1) + is_on.sum())
    f1[above == below] = -1
    middle = (above + below) / 2
    middle = np.where(middle < above, middle, below)  # neighbours among floating-point numbers
    best = np.flatnonzero(f1 == f1.max())
    return float(middle[best[np.argmin(np.abs(middle[best] - AU_THRESHOLD))]])


def _fit_thresholds(au: np.ndarray, targets: Targets) -> np.ndarray:
    """Return the thresholds (12,) of the greatest F1."""
    columns = zip(au.T, targets.au.T > 0, targets.au_mask.T.astype(bool))
    return np.array([f1_threshold(p[known], is_on[known]) for p, is_on, known in columns])


def _even(p: np.ndarray, timeline: Timeline, half_window: int) -> np.ndarray:
    return smooth(p, timeline, np.full(p.shape[1], half_window)) if half_window else p


def _choose_class_half_windows(
    mixed: Predictions, targets: Targets, timeline: Timeline, half_windows: tuple[int, ...], *, at_half: bool
) -> np.ndarray:
    """Return the half-windows (2,) of EXPR and AU with the greatest F1, the first listed of equals."""
    has_expr, has_au = targets.expr_mask.astype(bool), targets.au_mask.astype(bool)
    truth, tried = targets.expr[has_expr].astype(np.int64), []
    for half in half_windows:
        expr, au = _even(mixed.expr, timeline, half)[has_expr], _even(mixed.au, timeline, half)
        of_units = [
            _best_f1(p[known], is_on=on[known] > 0, at_half=at_half)
            for p, on, known in zip(au.T, targets.au.T, has_au.T)
        ]
        tried.append([_macro_f1(expr, truth) if len(truth) >= MIN_EXAMPLES else 0.0, np.mean(of_units)])
    return np.where(np.max(tried, axis=0) > 0, np.array(half_windows, np.int64)[np.argmax(tried, axis=0)], 0)


def _choose_half_windows(
    va: np.ndarray, targets: Targets, timeline: Timeline, half_windows: tuple[int, ...]
) -> np.ndarray:
    """Return the half-windows (2,) of valence and arousal with the greatest CCC, the first listed of equals."""
    if targets.va_mask.sum() < MIN_EXAMPLES:
        return np.zeros(2, np.int64)
    tried = []
    for half in half_windows:
        smoothed = smooth(va, timeline, np.array([half, half]))
        tried.append(concordance(va_moments(smoothed, targets)))
    return np.array(half_windows, np.int64)[np.argmax(tried, axis=0)]
