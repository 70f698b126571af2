"""Training that ends where its score gets no better: the same on every rank, and wherever a run was killed."""

from __future__ import annotations

import math
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.objective.scores import find_score
from mtl_dist.runs.checkpoint import committed, read_state
from mtl_dist.runs.patience import Patience, Standing, plan_standing, watched_score
from mtl_dist.runs.weights import open_weights
from mtl_dist.training.status import print_status
from mtl_dist.unread import check_read
from tests.test_training import STEPS_PER_EPOCH, cut_back, final_weights, train
from tune.population import PopulationConfig, check_population

VALUES = st.lists(st.none() | st.just(math.nan) | st.integers(-3, 3).map(float), max_size=12)


def evaluated(values: list[float | None], *, patience: int, key: str = "p", epochs: int = 99) -> Patience:
    watched = Patience(
        build_config({"train": {"patience": patience, "epochs": epochs}, "checkpoint": {"best_of": [key]}}), {}
    )
    for epoch, value in enumerate(values):
        watched.take({key: value}, epoch)
    return watched


def ends_at(values: list[float | None], *, patience: int, sign: int) -> int | None:
    """After how many evaluations training ends, by looking back over all of them each time."""
    for count in range(1, len(values) + 1):
        numbers = [(number, sign * v) for number, v in enumerate(values[:count]) if v is not None and not math.isnan(v)]
        best = max((value for _, value in numbers), default=None)
        first = next((number for number, value in numbers if value == best), -1)
        if count - 1 - first >= patience:
            return count
    return None


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(1, 5), st.sampled_from(["p", "rmse_v", "au"]))
def test_training_ends_where_the_best_is_so_many_evaluations_back(values, patience, key):
    expected = ends_at(values, patience=patience, sign=find_score(key, setting="x").sign)
    found = [bool(evaluated(values[:count], patience=patience, key=key).ended) for count in range(1, len(values) + 1)]
    assert (found.index(True) + 1 if any(found) else None) == expected


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(0, 12), st.integers(1, 5))
def test_a_run_stands_where_its_checkpoint_says(values, place, patience):
    """Going on from any checkpoint is as if nothing had happened; so is patience that was given later."""
    before = evaluated(values[:place], patience=0)
    assert not before.ended
    config = build_config({"train": {"patience": patience}, "checkpoint": {"best_of": ["p"]}})
    after = Patience(config, before.note())
    for epoch, value in enumerate(values[place:], start=place):
        after.take({"p": value}, epoch)
    whole = evaluated(values, patience=patience)
    assert (after.ended, after.note()) == (whole.ended, whole.note())


def test_it_says_why_and_where_the_best_was():
    assert evaluated([0.5, 1.25, 1.25, None], patience=2).ended == (
        "stopped early: no better P for 2 evaluations, best 1.2500 at epoch 2"
    )
    assert evaluated([0.3, 0.4], patience=1, key="rmse_v").ended.endswith("V for 1 evaluation, best 0.3000 at epoch 1")
    assert "had none that is a number" in evaluated([None], patience=1).ended


@pytest.mark.parametrize(
    ("model", "best_of", "expected"),
    [
        ("a", ["p", "va"], "p"), ("a", ["rmse_v", "p"], "rmse_v"), ("a", [], "p"),
        ("mae", ["p", "va"], "masked_loss"), ("mae", ["masked_loss"], "masked_loss"),
    ],
)  # fmt: skip
def test_the_first_score_of_best_of_is_watched(model, best_of, expected):
    own = {"model": {"name": model}} if model == "a" else {"model": {"name": model, "backbone": "vit_small"}}
    config = build_config(own, {"checkpoint": {"best_of": best_of}})
    assert watched_score(config).key == expected
    other = Patience(config, {"standing": Standing("ccc_v", 0.5, 1, since=3)._asdict()})
    assert other.note()["standing"] == Standing(expected)._asdict()


def test_what_is_no_number_is_not_better():
    assert plan_standing(Standing("p", 0.1, 1), math.nan, epoch=2) == Standing("p", 0.1, 1, since=1)
    assert plan_standing(Standing("p"), math.nan, epoch=1) == Standing("p", since=1)


def test_without_scores_and_in_a_population_it_is_refused():
    patient = {"train": {"patience": 3}}
    with pytest.raises(InputError, match=r"train\.patience is 3, and nothing reads it: there is no validation set"):
        check_read(build_config(patient, {"data": {"train": "t"}}))
    check_read(build_config(patient, {"data": {"train": "t", "val": "v"}}))
    with pytest.raises(InputError, match=r"train\.patience is 3, which ends a run by itself"):
        check_population(build_config(patient), PopulationConfig(), {})
    assert not Config().train.patience


LEARNS_NOTHING = ("--optim.lr", "1e-30", "--optim.weight-decay", "0", "--engine.batchnorm", "frozen")


@pytest.mark.whole
def test_a_run_ends_early_and_a_killed_one_at_the_same_step(shards, tmp_path, capsys):
    args = (*LEARNS_NOTHING, "--train.epochs", "4", "--train.patience", "2", "--checkpoint.keep-last", "9")
    said = train(shards, tmp_path, "run", *args).stdout
    where = r"stopped early: no better P for 2 evaluations, best \d\.\d{4} at epoch (\d)"
    end = STEPS_PER_EPOCH * (2 + int(re.search(where, said)[1]))
    assert end < 4 * STEPS_PER_EPOCH
    expected, state = final_weights(tmp_path, "run"), read_state(committed(f"{tmp_path}/run")[0][-1])
    assert committed(f"{tmp_path}/run")[0][-1].step == state["step"] == end
    shutil.copytree(tmp_path / "run", tmp_path / "killed" / "run")
    cut_back(tmp_path / "killed", "run", 2 * STEPS_PER_EPOCH)
    assert re.search(where, train(shards, tmp_path / "killed", "run", *args).stdout)
    newest = committed(f"{tmp_path}/killed/run")[0][-1]
    assert newest.step == end
    assert read_state(newest)["standing"] == state["standing"]
    found = final_weights(tmp_path / "killed", "run")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)

    assert open_weights(f"{tmp_path}/run").is_finished
    print_status(f"{tmp_path}/run")
    assert re.search(f"step {end} of .*finished, {where}", " ".join(capsys.readouterr().out.split()))
    again = train(shards, tmp_path, "run", *args).stdout
    assert re.search(rf"is finished \(step {end} of 20; {where}\): nothing is left to do", again)
    assert re.search(rf"run 'run' is finished \(step {end} of 20; {where}\); nothing is left to do", again)
    longer = train(shards, tmp_path, "run", *args, "--train.patience", "5").stdout  # more patience: it goes on
    assert committed(f"{tmp_path}/run")[0][-1].step > end, longer
