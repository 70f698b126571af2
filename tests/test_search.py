"""The search: which trial is the best."""

from __future__ import annotations

import csv
import math

import pandas as pd
import pytest
import yaml
from ray.tune import Result

from mtl_dist.config import Config
from mtl_dist.errors import InputError
from tune.search import finish_search


class Results(list):
    """What `Tuner.fit` returns has these beside the trials' results."""

    errors: tuple = ()
    num_errors = 0


def trial(name: str, lr: float, *scores: float) -> Result:
    """A trial as Ray gives it back: `scores` are P after every epoch."""
    metrics = {"trial_id": name, "epoch": len(scores), "p": scores[-1], "config": {"optim.lr": lr}}
    return Result(metrics, None, None, "", pd.DataFrame({"p": scores}))


@pytest.mark.parametrize(
    ("trials", "lr"),
    [
        ([(0.1, 0.7), (0.2, math.nan), (0.3, 1.2)], 0.3),  # NaN compares as neither more nor less, and stops a sort
        ([(0.1, math.nan), (0.2, 0.5)], 0.2),
        ([(0.1, 0.9, 0.8), (0.2, 1.4, 0.6)], 0.2),  # by the best evaluation, whose checkpoint is kept
        ([(0.1, 0.9, 0.8), (0.2, 1.4, math.nan)], 0.2),
        ([(0.1, 0.9), (0.2, math.inf)], 0.1),
    ],
)
def test_the_best_trial_is_the_one_with_the_highest_score_that_is_a_number(trials, lr, tmp_path, capsys):
    results = Results(trial(f"t{place}", *values) for place, values in enumerate(trials))
    finish_search(Config(), results, str(tmp_path))
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["optim"]["lr"] == lr
    first = next(csv.DictReader((tmp_path / "trials.csv").open()))
    assert float(first["optim.lr"]) == lr
    scores = next(values for own, *values in trials if own == lr)
    assert float(first["best P"]) == max(value for value in scores if not math.isnan(value))
    assert float(first["last P"]) == pytest.approx(scores[-1], nan_ok=True)


def test_a_search_without_any_score_that_is_a_number_has_no_best_configuration(tmp_path):
    with pytest.raises(InputError, match="none of 2 trials has a score that is a number"):
        finish_search(Config(), Results([trial("a", 0.1, math.nan), trial("b", 0.2, math.nan)]), str(tmp_path))
    assert not list(tmp_path.iterdir())
