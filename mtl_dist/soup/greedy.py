"""The greedy soup: checkpoints are added in the order of their scores where the score does not fall.

Wortsman et al. 2022 (arXiv 2203.05482), recipe 1. What is the best of many on some rows is not to be expected
elsewhere: so the choice is also made on each half of the videos, and scored on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import MetricSums, metric_sums
from mtl_dist.objective.scores import FIRST, scores

Chosen = tuple[int, ...]  # places of checkpoints, ascending
Predict = Callable[[Chosen], PredictedRows]  # of the mean of the weights of those: the same rows for all


class Choice(NamedTuple):
    """What was chosen on some rows."""

    soup: Chosen
    best: int  # the checkpoint of the highest score on these rows


class OutOfHalf(NamedTuple):
    """What choices score on the half of the videos that they were not made on, over all rows."""

    choices: tuple[Choice, ...]  # the i-th is scored on half i
    soup: dict[str, Any]
    best: dict[str, Any]


def add_greedily(order: Sequence[int], score: Callable[[Chosen], float]) -> Chosen:
    """Return what is kept of checkpoints that are added in this order, each where the score of all does not fall."""
    chosen: Chosen = (order[0],)
    reached = score(chosen)
    for place in order[1:]:
        tried = tuple(sorted((*chosen, place)))
        if (found := score(tried)) >= reached:
            chosen, reached = tried, found
    return chosen


def choose(count: int, predict: Predict, rows: np.ndarray) -> Choice:
    """Choose among `count` checkpoints by their P on `rows` (n,) bool."""

    def score(chosen: Chosen) -> float:
        return scores(sums_of(predict(chosen), rows))[FIRST.key]

    order = sorted(range(count), key=lambda place: -score((place,)))  # of equals the first comes first
    return Choice(add_greedily(order, score), order[0])


def choose_across(count: int, predict: Predict, halves: np.ndarray) -> OutOfHalf:
    """Choose on the rows of each half (n,) of 0 and 1, and score on those of the other."""
    choices, soup, best = [], MetricSums.zero(), MetricSums.zero()
    for half in (0, 1):
        choice = choose(count, predict, halves != half)
        soup = soup.plus(sums_of(predict(choice.soup), halves == half))
        best = best.plus(sums_of(predict((choice.best,)), halves == half))
        choices.append(choice)
    return OutOfHalf(tuple(choices), scores(soup), scores(best))


def sums_of(predicted: PredictedRows, rows: np.ndarray | slice = slice(None)) -> MetricSums:
    """Reduce the predictions of some rows to sums."""
    parts = (predicted.predictions, predicted.targets)
    return metric_sums(*(type(part)(*(array[rows] for array in part)) for part in parts))
