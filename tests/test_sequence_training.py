"""Sequence models by the loop that trains everything: any ranks, killed, evaluated, reported; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.config import Config, build_config
from mtl_dist.data.index import FEATURES, dump_index, read_index
from mtl_dist.data.widths import fill_in_widths
from mtl_dist.ensemble.__main__ import main as ensemble
from mtl_dist.errors import InputError
from mtl_dist.predicting.members import open_member, predict_member
from mtl_dist.predicting.predictions import read_predictions
from mtl_dist.presets import load_preset
from mtl_dist.report.__main__ import main as report
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.soup.__main__ import main as soup
from mtl_dist.training.plan import open_data, plan_run
from mtl_dist.training.tracking import read_records
from tests.conftest import assert_one_message, run_here, write_features
from tests.test_recipes import EVERY_STEP, assert_close_losses, assert_same_run, run_ranks
from tests.test_recipes import config_of as pictures_config
from tests.test_training import losses

TRAIN, VAL = [20, 33, 16, 7, 48, 5, 61, 16], [25, 9, 40, 16]
SGD = {"optim": {"name": "sgd", "lr": 0.05, "clip_norm": None}}
PLAIN = {"model": {"dropout": 0.0}}
FEEDBACK = {
    "model": {
        "dropout": 0.0,
        "sequence": {
            "encoder": "transformer",
            "bidirectional": False,
            "framework": "share_bottom",
            "feed_source": ["v", "au"],
            "feed_target": ["a"],
            "context": 3,
            "layers": 2,
            "hidden": 16,
            "heads": 2,
            "head_widths": [8],
        },
    }
}
PICTURES = {
    "model": {
        "name": "c",
        "backbone": "vgg_small",
        "weights": "none",
        "dropout": 0.0,
        "sequence": {"encoder": "gru", "bidirectional": True, "hidden": 8, "layers": 1, "window": 4},
    },
    "data": {"image_size": 32},
    "train": {"global_batch": 4, "epochs": 1, "eval_batch": 4},
    "engine": {"batchnorm": "frozen"},
}
DROPOUT = {"model": {"dropout": 0.3}}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """Two sets side by side, each of train and val."""
    root = tmp_path_factory.mktemp("features")
    for name, width, extractor in (("one", 6, "b"), ("two", 4, "d")):
        write_features(root / name / "train", TRAIN, width=width, extractor=extractor * 64)
        write_features(
            root / name / "val", VAL, width=width, extractor=extractor * 64, split="val", source="e" * 64, seed=1
        )
    return root


def config_of(
    features: Path, storage: Path, name: str, *layers: dict[str, Any], sets: tuple[str, ...] = ("one",)
) -> Config:
    tiny = {
        "run": {"name": name, "storage": str(storage), "audit_dir": str(storage / "audit")},
        "data": {split: [f"{features}/{one}/{split}" for one in sets] for split in ("train", "val")} | {"workers": 0},
        "model": {"sequence": {"hidden": 8, "layers": 1, "window": 16}},
        "train": {"global_batch": 6, "epochs": 2, "eval_batch": 2},
        "optim": {"warmup_steps": 2},
        "engine": {"threads": 1, "device": "cpu"},
    }
    return fill_in_widths(build_config(load_preset("small-c"), tiny, *layers))


@pytest.fixture(scope="module")
def runs(features, shards, tmp_path_factory) -> Path:
    """All runs of this file; returns their storage."""
    storage = tmp_path_factory.mktemp("sequences")
    both = ("one", "two")

    def job(name: str, *layers: dict[str, Any], cut_at: int | None = None, sets: tuple[str, ...] = ("one",)):
        place = storage if cut_at is None else storage / "killed"
        return config_of(features, place, name, *layers, sets=sets), cut_at

    jobs = {
        1: [
            job("gru-1", SGD, PLAIN, sets=both),
            job("feedback-1", SGD, FEEDBACK),
            job("parts", SGD, PLAIN, {"train": {"accumulation": 3}}, sets=both),
            (pictures_config(shards, storage, "pictures-1", PICTURES, SGD), None),
        ],
        2: [
            job("gru-2", SGD, PLAIN, sets=both),
            job("feedback-2", SGD, FEEDBACK),
            (pictures_config(shards, storage, "pictures-2", PICTURES, SGD), None),
            job("whole", DROPOUT, EVERY_STEP),
            job("whole", DROPOUT, EVERY_STEP, cut_at=3),
        ],
        3: [job("gru-3", SGD, PLAIN, sets=both), job("feedback-3", SGD, FEEDBACK)],
    }
    for num_ranks, of_ranks in jobs.items():
        run_ranks(num_ranks, of_ranks, storage)
    return storage


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("gru-2", "gru-1"),
        ("gru-3", "gru-1"),
        ("parts", "gru-1"),
        ("feedback-2", "feedback-1"),
        ("feedback-3", "feedback-1"),
        ("pictures-2", "pictures-1"),
    ],
)
def test_losses_and_scores_are_those_of_one_rank(runs, name, alone):
    assert_close_losses(losses(runs, name), losses(runs, alone))
    one, other = (
        [record["scores"] for record in read_records(f"{runs}/{which}") if record["kind"] == "eval"]
        for which in (alone, name)
    )
    for mine, theirs in zip(other, one):
        assert mine["p"] == pytest.approx(theirs["p"], rel=1e-5)
        assert mine["rmse_v"] == pytest.approx(theirs["rmse_v"], rel=1e-6)


@pytest.mark.whole
def test_a_run_killed_in_mid_epoch_ends_bit_identical(runs):
    assert_same_run((runs / "killed", "whole"), (runs, "whole"))


@pytest.mark.whole
def test_a_run_is_evaluated_the_same_whatever_the_batch(runs):
    for name in ("gru-1", "feedback-1"):
        member = open_member(f"{runs}/{name}")
        one, all_at_once = (
            predict_member(member, device=torch.device("cpu"), batch=batch, workers=0) for batch in (1, 64)
        )
        assert one.rows.tolist() == all_at_once.rows.tolist() == list(range(sum(VAL)))
        for mine, theirs in zip(one.predictions, all_at_once.predictions):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.whole
def test_a_checkpoint_carries_the_statistics_and_what_made_the_features(runs):
    opened = open_weights(f"{runs}/gru-1")
    assert [extractor["width"] for extractor in opened.state["extractors"]] == [6, 4]
    model = load_weights(opened)
    assert opened.config.model.sequence.dims == (6, 4)
    assert model.backbone.standardise.mean.shape == (10,)


@pytest.mark.whole
def test_runs_of_features_are_reported_and_ensembled(runs, tmp_path):
    report([f"{runs}/gru-1", f"{runs}/feedback-1", "--out", str(tmp_path / "page"), "--draws", "10"])
    page = (tmp_path / "page" / "report.html").read_text()
    assert "C (sequences)" in page
    assert "These runs read features" in page
    ensemble(["--runs", f"{runs}/gru-1", f"{runs}/feedback-1", "--out", str(tmp_path / "both"), "--local"])
    table = read_predictions(str(tmp_path / "both" / "predictions.parquet"))
    assert table.images[0] == "v0/00001.jpg"
    assert len(table.images) == sum(VAL)


@pytest.mark.whole
def test_a_model_of_videos_is_not_exported_and_a_test_list_of_pictures_not_predicted(runs, tmp_path):
    done = run_here("mtl_dist.export", runs / "gru-1", "--out", tmp_path / "out", "--formats", "safetensors")
    assert_one_message(done, "reads whole videos", "mtl_dist.predict --runs")
    (tmp_path / "list.txt").write_text("image\nv0/00001.jpg\n")
    test = ["--test-list", tmp_path / "list.txt", "--test-root", tmp_path]
    done = run_here("mtl_dist.ensemble", "--runs", runs / "gru-1", "--out", tmp_path / "out", "--local", *test)
    assert_one_message(done, "--test-list names pictures", "reads whole videos")
    done = run_here("mtl_dist.predict", "--runs", runs / "pictures-2", "--input", tmp_path, "--out", tmp_path / "o.csv")
    assert_one_message(done, "reads windows of pictures")


@pytest.mark.whole
def test_a_backbone_is_trained_with_its_encoder_on_windows_of_pictures(runs, shards):
    config = pictures_config(shards, runs, "pictures-1", PICTURES, SGD)
    data = open_data(config)
    assert data.noun == "windows"
    told = predict_member(open_member(f"{runs}/pictures-2"), device=torch.device("cpu"), batch=2, workers=0)
    assert told.rows.tolist() == list(range(data.val.rows))


@pytest.mark.whole
def test_a_run_begins_with_another_of_the_same_features_only(runs, features, tmp_path):
    soup([f"{runs}/gru-1", f"{runs}/gru-2", "--out", str(tmp_path / "soup")])  # an export keeps what made its features
    starts = [{"run": {"start": uri, "start_with": "model"}} for uri in (f"{runs}/gru-1", f"{tmp_path}/soup")]
    for start in starts:
        plan_run(config_of(features, tmp_path, "same", PLAIN, start, sets=("one", "two")))
    other = features.parent / f"{features.name}-pooled"
    shutil.copytree(features, other, dirs_exist_ok=True)
    for split in ("train", "val"):
        place = other / "one" / split
        index = read_index(str(place), formats=(FEATURES,))
        pooled = index.model_copy(update={"extractor": index.extractor.model_copy(update={"pool": "max"})})
        (place / "index.json").write_bytes(dump_index(pooled))
    for start in starts:
        with pytest.raises(InputError, match=r"was trained on features of .*give features of the same"):
            plan_run(config_of(other, tmp_path, "other", PLAIN, start, sets=("one", "two")))


def test_windows_of_pictures_are_checked_before_anything_starts(shards, tmp_path):
    long = {"model": {**PICTURES["model"], "sequence": {**PICTURES["model"]["sequence"], "window": 64}}}
    with pytest.raises(InputError, match=r"window is 64 rows, and the longest video of"):
        open_data(pictures_config(shards, tmp_path, "run", PICTURES, long))
    with pytest.raises(InputError, match=r"data\.sampling is per_task, and which window"):
        open_data(pictures_config(shards, tmp_path, "run", PICTURES, {"data": {"sampling": "per_task"}}))


def test_the_plan_counts_windows(features, tmp_path):
    config = config_of(features, tmp_path, "run", sets=("one", "two"))
    assert config.model.sequence.dims == (6, 4)
    windows = sum(rows // 16 + 1 for rows in TRAIN)
    assert open_data(config).num_samples == windows
    text = str(plan_run(config))
    assert f"{sum(TRAIN)} rows of cropped_aligned" in text
    assert "windows of 16, rows of 6 + 4" in text
    assert f"{windows % 6} windows an epoch are left out" in text


def test_a_video_of_one_row_is_noted(tmp_path):
    write_features(tmp_path / "one" / "train", [40, 1, 30, 30, 30])
    write_features(tmp_path / "one" / "val", [40, 1], split="val", source="e" * 64, seed=1)
    assert "1 training video(s) have one row" in str(plan_run(config_of(tmp_path, tmp_path / "runs", "run")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.sequence.window", "64"], "model.sequence.window is 64 rows, and the longest video of"),
        (["--model.sequence.dims", "7"], "model.sequence.dims is [7], and"),
        (["--data.sampling", "per_task"], "data.sampling is per_task"),
    ],
)
def test_settings_that_do_not_fit_the_features_are_one_message(features, tmp_path, flags, words):
    sets = ["--data.train", f"{features}/one/train", "--data.val", f"{features}/one/val"]
    command = ["--local", "--preset", "small-c", "--run.storage", tmp_path, *sets, "--model.sequence.window", "16"]
    done = run_here("mtl_dist.train", *command, *flags, "--train.global-batch", "4")
    assert done.returncode == 2
    assert words in done.stderr


def test_models_and_sets_of_two_kinds_are_refused(features, shards, tmp_path):
    pictures = {"data": {split: f"{shards}/cropped_aligned/{split}" for split in ("train", "val")}}
    with pytest.raises(InputError, match=r"holds pictures, and model\.backbone features reads features"):
        open_data(config_of(features, tmp_path, "run", pictures))
    sets = {"data": {split: f"{features}/one/{split}" for split in ("train", "val")}}
    with pytest.raises(InputError, match=r"holds features, and model\.backbone small reads pictures.*--preset small-c"):
        open_data(build_config(load_preset("small"), sets))


def test_validation_features_of_another_extractor_are_refused(features, tmp_path):
    config = config_of(features, tmp_path, "run", {"data": {"val": f"{features}/two/val"}})
    with pytest.raises(InputError, match="expected the same of both"):
        open_data(config)
