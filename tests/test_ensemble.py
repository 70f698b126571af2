"""The final job: members found, paired by row, averaged, scored; and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.ensemble import combine
from mtl_dist.errors import InputError
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.runtime.checkpoint import best, committed
from mtl_dist.runtime.evaluate import Predicted
from mtl_dist.tasks import VIEWS
from tests.conftest import assert_one_message, run_module
from tests.test_training import train, train_args


def make_predicted(rows: np.ndarray, seed: int) -> Predicted:
    rng = np.random.default_rng(seed)
    n = len(rows)
    predictions = Predictions(rng.uniform(-1, 1, (n, 2)), rng.dirichlet(np.ones(8), n), rng.random((n, 12)))
    none = np.zeros((n, 12))
    targets = Targets(none[:, :2], rows % 8, none, none[:, 0] > 0, none[:, 0] == 0, none > 0)
    return Predicted(rows, predictions, targets)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """A trained run of each view, named after it."""
    storage = tmp_path_factory.mktemp("runs")
    for view in VIEWS:
        args = [arg.replace("/cropped/", f"/{view}/") for arg in train_args(shards, storage, view)]
        done = run_module(*args)
        assert done.returncode == 0, done.stderr
    return storage


def test_probabilities_and_va_are_averaged():
    members = [make_predicted(np.arange(20), seed) for seed in (1, 2)]
    found = combine(members)
    for mine, first, second in zip(found.predictions, members[0].predictions, members[1].predictions):
        np.testing.assert_allclose(mine, (first + second) / 2)


def test_rows_that_do_not_pair_are_an_error_that_names_them():
    with pytest.raises(InputError, match=r"\[19, 20\]"):
        combine([make_predicted(np.arange(20), 1), make_predicted(np.r_[0:19, 20], 1)])
    members = [make_predicted(np.arange(20), seed) for seed in (1, 2)]
    other = members[1]._replace(targets=members[1].targets._replace(expr=members[1].targets.expr + 1))
    with pytest.raises(InputError, match="labels differ"):
        combine([members[0], other])


def test_the_job_writes_score_predictions_and_table_twice_the_same(runs, tmp_path):
    args = ["mtl_dist.ensemble", "--runs", *(f"{runs}/{view}" for view in VIEWS), "--out"]
    done = run_module(*args, f"{tmp_path}/first")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "first/score.json").read_text())
    assert list(report["scores"]) == ["constant predictor", *VIEWS, "ensemble"]
    assert report["p"] == report["scores"]["ensemble"]["p"]
    for view, member in zip(VIEWS, report["members"]):
        chosen = best(committed(f"{runs}/{view}")[0])
        assert member["checkpoint"] == chosen.uri
        # The job and the training run score one checkpoint alike, whatever batches they predicted it in.
        assert report["scores"][view]["p"] == pytest.approx(chosen.score, abs=1e-4)
    rows = list(csv.DictReader((tmp_path / "first/predictions.csv").open()))
    assert [int(row["row"]) for row in rows] == list(range(20))
    assert all(re.fullmatch(r"v\d/\d{5}\.jpg", row["image"]) for row in rows)
    assert "ensemble" in (tmp_path / "first/table.txt").read_text()
    assert run_module(*args, f"{tmp_path}/second").returncode == 0
    for name in ("score.json", "predictions.csv", "table.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_two_checkpoints_of_one_view_are_refused(runs, tmp_path):
    done = run_module(
        "mtl_dist.ensemble", "--runs", f"{runs}/cropped", f"{runs}/cropped", "--out", str(tmp_path / "out")
    )
    assert_one_message(done, "view 'cropped'", "one run of each view")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_refused(runs, tmp_path):
    done = run_module(
        "mtl_dist.ensemble", "--runs", f"{runs}/cropped", f"{runs}/nothing", "--out", str(tmp_path / "out")
    )
    assert_one_message(done, f"{runs}/nothing", "no committed checkpoint")


def test_a_photograph_set_without_va_and_au_trains_and_says_what_the_score_covers(tmp_path):
    from tests.conftest import write_dataset

    source = write_dataset(tmp_path / "source")
    for path in source.glob("*.txt"):
        lines = path.read_text().splitlines()
        cells = [line.split(",") for line in lines[1:]]
        kept = [",".join([c[0], "-5", "-5", c[3], *["-1"] * 12]) for c in cells]
        path.write_text("\n".join([lines[0], *kept]) + "\n")
    done = run_module("mtl_dist.shards", "create", str(source), str(tmp_path / "shards"), "--frames-per-shard", "7")
    assert "no labels at all for va, au" in done.stdout
    done = train(tmp_path / "shards", tmp_path, "run", "--train.epochs", "1")
    state = json.loads(next(tmp_path.glob("run/checkpoints/*/state.json")).read_text())
    assert state["scores"]["covers"] == ["expr"]
    assert state["scores"]["va"] is None
    assert state["scores"]["p"] == state["scores"]["expr"]
