"""Results and formats stay what they were: see `tests/golden`."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from mtl_dist.data.index import read_index
from mtl_dist.runs.checkpoint import committed
from mtl_dist.training.tracking import read_records
from tests.conftest import run_here
from tests.golden.worlds import HERE, TOLERANCES, VALUES, distances, measure, newest_archive, unpack

pytestmark = pytest.mark.whole

ARCHIVES = sorted(path.name for path in (HERE / "formats").glob("*.tar.xz"))
FLOATS = 1e-4  # between processors, of predictions


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Every archive unpacked, with the newest one's shards where it has none of its own."""
    found = {name: unpack(HERE / "formats" / name, tmp_path_factory.mktemp("formats")) for name in ARCHIVES}
    for root in found.values():
        if not (root / "shards").exists():
            shutil.copytree(found[newest_archive().name] / "shards", root / "shards")
    return found


@pytest.mark.timeout(1200)  # 46 runs
def test_losses_scores_and_weights_of_tiny_runs_are_those_that_are_kept(tmp_path):
    found = distances(measure(tmp_path), json.loads(VALUES.read_text()))
    print(found)
    assert {kind: where for kind, where in found.items() if where[0] > TOLERANCES[kind]} == {}


@pytest.mark.parametrize("view", ["cropped", "cropped_aligned"])
def test_a_set_of_an_earlier_version_is_whole(made, view):
    shards = made[newest_archive().name] / "shards" / view
    for split, rows in (("train", 48), ("val", 24)):
        done = run_here("mtl_dist.shards", "verify", str(shards / split), "--jobs", "1")
        assert done.returncode == 0, done.stderr
        assert read_index(str(shards / split)).rows == rows


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("weights", ["runs/cropped", "exported"])
def test_weights_of_an_earlier_version_predict_what_they_did(made, archive, weights, tmp_path):
    root, out = made[archive], tmp_path / "out.csv"
    args = ["--runs", root / weights, "--input", root / "shards/cropped/val", "--out", out]
    done = run_here("mtl_dist.predict", *map(str, args))
    assert done.returncode == 0, done.stderr
    found, expected = (list(csv.DictReader(path.open())) for path in (out, root / "predicted.csv"))
    assert len(found) == len(expected) == 24
    for mine, theirs in zip(found, expected):
        for column, value in theirs.items():
            try:
                assert float(mine[column]) == pytest.approx(float(value), abs=FLOATS), column
            except ValueError:
                assert mine[column] == value, column


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_run_of_an_earlier_version_is_continued_to_the_scores_that_it_had(made, archive, tmp_path):
    """Its last checkpoint is taken away: the epoch after the one before is trained again."""
    root = made[archive]
    shutil.copytree(root / "runs" / "cropped", tmp_path / "cropped")
    run = str(tmp_path / "cropped")
    before = [record for record in read_records(run) if record["kind"] == "eval"]
    shutil.rmtree(committed(run)[0][-1].uri)
    data = [f"--data.{split}={root}/shards/cropped/{split}" for split in ("train", "val")]
    done = run_here(
        "mtl_dist.train", "--local", "--config", f"{run}/config.yaml", f"--run.storage={tmp_path}", *data
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    after = [record for record in read_records(run) if record["kind"] == "eval"]
    assert [record["step"] for record in after] == [record["step"] for record in before]
    for name in ("p", "ccc_v", "ccc_a"):
        assert after[-1]["scores"][name] == pytest.approx(before[-1]["scores"][name], abs=TOLERANCES["scores"])
    status = run_here("mtl_dist.train", "--status", run)
    assert (status.returncode, "damaged" in status.stdout) == (0, False), status.stdout + status.stderr


@pytest.mark.parametrize("archive", ARCHIVES)
def test_an_ensemble_of_an_earlier_version_is_made_again_and_reported(made, archive, tmp_path):
    root = made[archive]
    runs = [str(root / "runs" / view) for view in ("cropped", "cropped_aligned")]
    vals = [str(root / "shards" / view / "val") for view in ("cropped", "cropped_aligned")]
    more = ["--val", *vals, "--folds", "2", "--local"]
    done = run_here("mtl_dist.ensemble", "--runs", *runs, "--out", str(tmp_path / "again"), *more)
    assert done.returncode == 0, done.stderr
    found, expected = (json.loads((at / "score.json").read_text()) for at in (tmp_path / "again", root / "ensemble"))
    assert found["p"] == pytest.approx(expected["p"], abs=TOLERANCES["ensemble"])
    page = ["--ensemble", str(root / "ensemble"), "--val", *vals, "--out", str(tmp_path / "report"), "--draws", "20"]
    done = run_here("mtl_dist.report", *runs, *page)
    assert done.returncode == 0, done.stderr
    assert f"{expected['p']:.4f}" in (tmp_path / "report" / "report.html").read_text()
