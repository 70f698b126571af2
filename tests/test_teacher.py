"""Whole runs with a teacher: their own average, or another run; which runs can be one, and that it stays the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mtl_dist.config import Config, build_config
from mtl_dist.data.index import read_sets
from mtl_dist.errors import InputError
from mtl_dist.presets import load_preset
from mtl_dist.runs import teacher as teachers
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.teacher import TAUGHT_BY, find_teacher, load_teacher, note_teacher, taught_tasks
from mtl_dist.runs.weights import Weights, open_weights
from mtl_dist.training.plan import plan_run
from mtl_dist.training.tracking import read_records
from tests.conftest import assert_one_message, run_here
from tests.test_recipes import (
    EVERY_STEP,
    FROZEN,
    assert_close_losses,
    assert_same_run,
    config_of,
    run_ranks,
)
from tests.test_training import cut_back, losses, train_args

pytestmark = pytest.mark.whole

# From the second epoch on: the first five steps are those without a teacher.
EMA = {"loss": {"teacher": "ema", "teacher_confidence": 0.1, "teacher_after": 1}, "train": {"ema": 0.9}}


def of_run(uri: Path | str, **own) -> dict:
    return {"loss": {"teacher": str(uri), "teacher_confidence": 0.1, **own}}


def taught_of(storage: Path, name: str) -> list[dict[str, float]]:
    return [record["taught"] for record in read_records(f"{storage}/{name}") if record["kind"] == "step"]


@pytest.fixture(scope="module")
def taught(runs, shards, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("taught")

    def job(name: str, *layers: dict, cut_at: int | None = None):
        where = storage if cut_at is None else storage / f"killed-{cut_at}"
        return config_of(shards, where, name, *layers), cut_at

    by_run = of_run(runs / "cropped")
    parts, zero = {"train": {"accumulation": 2}}, {"engine": FROZEN["engine"] | {"zero_stage": 2}}
    run_ranks(1, [job("ema-1", FROZEN, EMA), job("run-1", FROZEN, by_run), job("parts", FROZEN, EMA, parts)], storage)
    # BatchNorm's statistics are each rank's own in these, and so is what the average says.
    own = [job("few-saves", EMA, parts), job("many-saves", EMA, parts, EVERY_STEP)]
    own += [job("many-saves", EMA, parts, EVERY_STEP, cut_at=step) for step in (3, 7)]
    own += [job("run-2", FROZEN, by_run, EVERY_STEP), job("run-2", FROZEN, by_run, EVERY_STEP, cut_at=7)]
    run_ranks(2, [job("ema-2", FROZEN, EMA, zero), *own], storage)
    return storage


@pytest.mark.parametrize(("name", "as_on_one"), [("ema-2", "ema-1"), ("run-2", "run-1"), ("parts", "ema-1")])
def test_ranks_zero_and_micro_batches_have_the_losses_of_one(name, as_on_one, taught):
    assert_close_losses(losses(taught, name), losses(taught, as_on_one))
    assert_close_losses(taught_of(taught, name), taught_of(taught, as_on_one))


def test_records_say_how_much_of_each_task_a_teacher_told(taught):
    before, after = taught_of(taught, "ema-1")[:5], taught_of(taught, "ema-1")[5:]
    assert all(set(step.values()) == {0.0} for step in before)
    assert all(step.keys() == {"va", "expr", "au"} for step in before + after)
    assert all(step["va"] * 8 == int(step["va"] * 8) < 8 for step in after)  # rows of 8 that have no label
    assert all(sum(step[task] for step in after) > 0 for task in ("va", "expr", "au"))


@pytest.mark.parametrize("killed", ["killed-3", "killed-7"])
def test_a_run_taught_by_its_average_goes_on_bit_identically_before_and_after_it_begins(killed, taught):
    assert_same_run((taught / killed, "many-saves"), (taught, "many-saves"))


def test_neither_saves_nor_evaluations_show_in_what_an_average_says(taught):
    assert_same_run((taught, "many-saves"), (taught, "few-saves"))


def test_a_run_taught_by_another_reads_it_again_and_goes_on_bit_identically(runs, taught):
    assert_same_run((taught / "killed-7", "run-2"), (taught, "run-2"))
    weights = open_weights(str(runs / "cropped"))
    for storage in (taught, taught / "killed-7"):
        checkpoint = committed(f"{storage}/run-2")[0][-1]
        state = json.loads(Path(checkpoint.uri, "state.json").read_text())
        place = weights.uri.removeprefix(str(runs / "cropped"))
        sha256 = weights.checkpoint.files["model.safetensors"]["sha256"]
        expected = {"uri": weights.uri, "place": place, "step": weights.checkpoint.step, "sha256": sha256}
        assert state[TAUGHT_BY] == expected
        assert {"model.safetensors", "train.safetensors"} <= checkpoint.files.keys()
    printed = " ".join(run_here("mtl_dist.train", "--status", f"{taught}/run-2").stdout.split())
    assert f"taught by {weights.uri}, step {weights.checkpoint.step}" in printed


def test_an_exports_page_says_that_a_run_was_taught_and_not_where_its_teacher_lay(runs, taught, tmp_path):
    args = (f"{taught}/run-2", "--out", str(tmp_path / "out"), "--formats", "safetensors")
    done = run_here("mtl_dist.export", *args)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "README.md").read_text()
    sha256 = open_weights(str(runs / "cropped")).checkpoint.files["model.safetensors"]["sha256"]
    assert f"missing were told by another run (sha256 of its weights `{sha256}`)" in page
    assert str(runs) not in page


def test_a_checkpoint_has_no_weights_of_a_teacher(taught):
    sizes = {}
    for name in ("run-2", "ema-2"):
        files = committed(f"{taught}/{name}")[0][-1].files
        sizes[name] = files["model.safetensors"]["bytes"]
    assert sizes["run-2"] == sizes["ema-2"]


# -------------------------------------------------------------------------------------------------- which run it can be


def settings_of(shards: Path, tmp_path: Path, *layers: dict) -> Config:
    return config_of(shards, tmp_path, "pupil", *layers)


def find(config: Config, known: dict | None = None) -> Weights | None:
    return find_teacher(config, read_sets(config.data.train), known)


def test_a_teacher_whose_run_has_a_better_checkpoint_by_now_is_still_the_one_that_it_was(runs, shards, tmp_path):
    shutil.copytree(runs / "cropped", tmp_path / "teacher")
    config = settings_of(shards, tmp_path, of_run(tmp_path / "teacher"))
    best = find(config)
    (other,) = [c for c in committed(str(tmp_path / "teacher"))[0] if c.uri != best.uri]
    known = note_teacher(find(settings_of(shards, tmp_path, of_run(other.uri))), config)
    assert find(config, known).uri == other.uri
    assert find(config, note_teacher(best, config)).uri == best.uri
    cut_back(tmp_path, "teacher", min(other.step, best.checkpoint.step))  # the later one is gone
    left = find(config)
    gone = note_teacher(best, config) if left.uri == other.uri else known
    with pytest.raises(
        InputError, match=rf"stands for other weights now .*{gone['sha256']}\); put those back, or give"
    ):
        find(config, gone)


def test_another_teacher_is_refused_by_a_run_that_goes_on_and_so_is_none(runs, shards, taught, tmp_path):
    shutil.copytree(taught / "run-2", tmp_path / "run-2")
    shutil.copytree(runs / "cropped", tmp_path / "cropped")

    def plan(*layers: dict) -> str:
        return str(plan_run(config_of(shards, tmp_path, "run-2", FROZEN, EVERY_STEP, *layers)))

    assert "labels that are missing are told by" in plan(of_run(tmp_path / "cropped"))  # moved
    for layer in ({}, EMA):
        with pytest.raises(InputError, match=r"has a checkpoint with (loss\.teacher|train\.ema)"):
            plan(layer)
    shutil.rmtree(tmp_path / "cropped")
    shutil.copytree(taught / "run-1", tmp_path / "cropped")
    with pytest.raises(InputError, match=r"stands for other weights now .* give the run another --run\.name"):
        plan(of_run(tmp_path / "cropped"))


def test_a_teacher_may_be_a_checkpoint_or_an_export_and_is_not_trained(runs, shards, tmp_path):
    done = run_here(
        "mtl_dist.export", str(runs / "cropped"), "--out", str(tmp_path / "out"), "--formats", "safetensors"
    )
    assert done.returncode == 0, done.stderr
    best = open_weights(str(runs / "cropped"))
    for uri in (best.uri, tmp_path / "out"):
        weights = find(settings_of(shards, tmp_path, of_run(uri)))
        assert note_teacher(weights, settings_of(shards, tmp_path, of_run(uri)))["place"] == ""
        model = load_teacher(weights)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def changed(weights: Weights, *, scores: dict | None = None, view: str | None = None, **sections: dict) -> Weights:
    config = build_config(weights.config.model_dump(mode="json"), sections)
    checkpoint = weights.checkpoint if scores is None else weights.checkpoint._replace(scores=scores)
    return weights._replace(config=config, checkpoint=checkpoint, view=view or weights.view)


FITS_NOT = {
    "view": ({"view": "cropped_aligned"}, r"was trained on cropped_aligned pictures, and .* holds cropped"),
    "size": ({"data": {"image_size": 96}}, r"reads pictures of 96 pixels a side, and this run of 80"),
    "videos": ({"model": {"name": "c", "backbone": "small"}}, "reads videos, and this run single pictures"),
    "features": (
        {"model": {"name": "c", "backbone": "features", "sequence": {"dims": [8]}}},
        r"has model\.backbone features, and this run small: they do not read the same inputs",
    ),
    "unscored": ({"scores": {"p": 0.1}}, "has nothing to teach this run: it was trained for and scored on no task"),
    "labels": ({"model": {"name": "mae", "backbone": "vit_tiny", "image_size": 80}}, "it predicts no labels"),
}


@pytest.mark.parametrize("case", FITS_NOT)
def test_a_run_that_cannot_teach_this_one_is_refused(case, runs, shards, tmp_path, monkeypatch):
    changes, words = FITS_NOT[case]
    weights = changed(open_weights(str(runs / "cropped")), **changes)
    monkeypatch.setattr(teachers, "open_weights", lambda uri: weights)
    with pytest.raises(InputError, match=rf"loss\.teacher .*{words}.*; give another one, or leave it out"):
        find(settings_of(shards, tmp_path, of_run(runs / "cropped")))


def test_a_run_teaches_what_it_was_trained_for_and_scored_on(runs):
    weights = open_weights(str(runs / "cropped"))
    assert taught_tasks(weights) == ("va", "expr", "au")
    assert taught_tasks(changed(weights, loss={"au": 0.0})) == ("va", "expr")
    assert taught_tasks(changed(weights, scores={"p": 1.0, "va": 0.5, "expr": 0.5})) == ("va", "expr")
    assert taught_tasks(changed(weights, scores={})) == ("va", "expr", "au")  # not evaluated


def test_a_teacher_that_is_not_there_and_settings_of_none_are_one_message(shards, tmp_path):
    args = train_args(shards, tmp_path, "pupil", "--dry-run")
    done = run_here(*args, "--loss.teacher", str(tmp_path / "nobody"))
    assert_one_message(done, "loss.teacher: run", "nobody has no committed checkpoint")
    done = run_here(*args, "--loss.teacher-weight", "2")
    assert_one_message(done, "loss.teacher_weight is 2.0, and nothing reads it: it is for loss.teacher")
    assert_one_message(run_here(*args, "--loss.teacher", "ema"), "loss.teacher is ema", "train.ema is 0")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_masked_autoencoder_has_no_teacher(shards, tmp_path):
    """A file that a run wrote may name one; nothing reads it."""
    config = build_config(load_preset("small-mae"), {"loss": {"teacher": str(tmp_path / "nobody")}})
    assert find_teacher(config, None, None) is None
