"""Populations: a generation is a function of the seed and of the scores before, and its runs are ordinary ones."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.errors import InputError
from mtl_dist.objective.scores import find_score
from mtl_dist.training.tracking import read_records
from tune.population import PopulationConfig, main, plan_generation, rank, vary

SPACE = {
    "loss.va": {"loguniform": [0.3, 3.0]},
    "optim.warmup_steps": {"integer": [1, 50]},
    "loss.label_smoothing": {"choice": [0.0, 0.05, 0.1]},
}
P, RMSE = find_score("p", setting="x"), find_score("rmse_v", setting="x")


def grow(scores: list[list[float]], *, members: int, seed: int = 0, replaced: float = 0.25, score=P):
    population, plans, scored = PopulationConfig(members=members, replaced=replaced), [], []
    for of_members in scores:
        plans.append(plan_generation(SPACE, population, seed=seed, plans=plans, scored=scored, score=score))
        scored.append(dict(enumerate(of_members)))
    return plans


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9).flatmap(lambda n: st.lists(st.lists(st.floats(0, 3), min_size=n, max_size=n), max_size=4)),
    st.integers(0, 99),
)
def test_the_weak_go_on_from_the_strong_and_settings_stay_in_their_space(scores, seed):
    members = len(scores[0]) if scores else 2
    plans = grow(scores, members=members, seed=seed)
    assert plans == grow(scores, members=members, seed=seed)
    for number, planned in enumerate(plans):
        for each in planned:
            assert 0.3 <= each.params["loss.va"] <= 3
            assert each.params["optim.warmup_steps"] in range(1, 51)
            assert each.params["loss.label_smoothing"] in (0.0, 0.05, 0.1)
            if not number:
                assert each.parent is None
                continue
            before, parent = dict(enumerate(scores[number - 1])), plans[number - 1][each.parent]
            order = rank(before, P)
            count = max(1, members // 4)
            if each.member in order[-count:]:
                assert each.parent == order[order[-count:].index(each.member)]
            else:
                assert each.parent == each.member
                assert each.params == parent.params


def test_a_member_that_diverged_is_always_given_up_and_without_any_left_it_ends():
    nan = math.nan
    (_, later) = grow([[1.0, nan, nan, 2.0, nan], [0.0] * 5], members=5)
    assert [each.parent for each in later] == [0, 3, 3, 3, 3]
    with pytest.raises(InputError, match="no member of the population has a score"):
        grow([[nan, nan], [0.0, 0.0]], members=2)


def test_of_an_error_the_lowest_is_the_best():
    assert rank({0: 0.3, 1: 0.1, 2: math.nan, 3: 0.1}, RMSE) == [1, 3, 0, 2]
    assert rank({0: 0.3, 1: 0.1, 2: math.nan, 3: 0.1}, P) == [0, 1, 3, 2]


def test_settings_are_multiplied_and_stay_within_their_ends():
    rngs = [np.random.default_rng(n) for n in range(50)]
    assert {vary(1.0, {"loguniform": [0.3, 3.0]}, rng) for rng in rngs} == {0.8, 1.2}
    assert {vary(2.9, {"uniform": [0.3, 3.0]}, rng) for rng in rngs} == {2.9 * 0.8, 3.0}
    assert {vary(10, {"integer": [1, 50]}, rng) for rng in rngs} == {8, 12}
    assert {vary("b", {"choice": ["a", "b", "c"]}, rng) for rng in rngs} == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------------------ in runs


def args_of(shards, storage, *more: str) -> list[str]:
    return [
        "--local", "--preset", "small", "--population.name", "few", "--population.members", "2",
        "--population.generations", "2", "--run.storage", str(storage), "--data.train", f"{shards}/cropped/train",
        "--data.val", f"{shards}/cropped/val", "--data.image-size", "80", "--data.workers", "0", "--train.epochs", "2",
        "--train.global-batch", "8", "--engine.threads", "1", *more,
    ]  # fmt: skip


@pytest.mark.whole
def test_a_population_trains_goes_on_where_it_was_and_draws_its_lineage(shards, tmp_path, capsys):
    main(args_of(shards, tmp_path))
    told = capsys.readouterr().out
    assert "generation 2 of 2, the best first" in told
    with (tmp_path / "few/lineage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["g00-m00", "g00-m01", "g01-m00", "g01-m01"]
    best = max(rows[:2], key=lambda row: float(row["p"]))
    assert {row["parent"] for row in rows[2:]} == {best["run"]}
    for row in rows:
        records = read_records(str(tmp_path / "few/runs" / row["run"]))
        steps = range(1, 6) if row["run"].startswith("g00") else range(6, 11)
        assert [r["step"] for r in records if r["kind"] == "step"] == list(steps)
        last = [r for r in records if r["kind"] == "eval"][-1]
        assert last["scores"]["p"] == pytest.approx(float(row["p"]))
    assert (tmp_path / "few/lineage.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "few/runs").rglob("*") if path.is_file()}
    main(args_of(shards, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "few/runs").rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match=r"was begun with population\.members 2, not 3"):
        main(args_of(shards, tmp_path, "--population.members", "3"))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--population.generations", "3"), "a generation has an epoch at least"),
        (("--train.stop-epoch", "1"), "are the population's own here"),
    ],
)
def test_a_population_that_cannot_be_is_refused(shards, tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        main(args_of(shards, tmp_path, *more))


@pytest.mark.whole
def test_settings_that_cannot_change_within_a_run_are_refused(shards, tmp_path):
    (tmp_path / "space.yaml").write_text("optim.momentum: {uniform: [0.5, 0.9]}\n")
    with pytest.raises(InputError, match=r"optim\.momentum, which cannot change within a run"):
        main(args_of(shards, tmp_path, "--population.space", str(tmp_path / "space.yaml"), "--optim.name", "sgd"))
