"""Masked pre-training by the loop that trains everything: any ranks and ZeRO stages, killed, begun with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.errors import InputError
from mtl_dist.objective.labelled import check_labels
from mtl_dist.report.__main__ import main as report
from mtl_dist.runs.checkpoint import MODEL, committed
from mtl_dist.runs.start import build_started, find_start
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.columns import TableOptions
from mtl_dist.training.plan import open_data, plan_run
from mtl_dist.training.status import print_ending
from mtl_dist.training.tracking import read_records
from tests.test_recipes import EVERY_STEP, assert_close_losses, assert_same_run, config_of, run_ranks
from tests.test_training import losses

pytestmark = pytest.mark.whole

TINY = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
MASKED: dict[str, Any] = {
    "model": {"name": "mae", "backbone": "vit_small", "weights": "none", "masked": TINY},
    "loss": {"expr_weights": "none", "au_weights": "none"},
}
SGD = {"optim": {"name": "sgd", "lr": 0.05}}
ADAMW = {"optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]}, "train": {"ema": 0.9}}


@pytest.fixture(scope="module")
def pictures(dataset, tmp_path_factory) -> Path:
    """A set of the same pictures without labels."""
    dest = tmp_path_factory.mktemp("unlabelled")
    unlabelled = TableOptions(unlabelled=True)
    create(
        f"{dataset}/cropped", str(dest), views=("cropped",), frames_per_shard=7, val_fraction=0.3, jobs=1,
        table=unlabelled,
    )  # fmt: skip
    return dest


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> Path:
    """All runs of this file; returns their storage."""
    storage = tmp_path_factory.mktemp("masked")

    def job(name: str, *layers: dict[str, Any], cut_at: int | None = None):
        return config_of(pictures, storage if cut_at is None else storage / "killed", name, MASKED, *layers), cut_at

    jobs = {
        1: [job("one", SGD), job("parts", SGD, {"train": {"accumulation": 3}})],
        2: [
            job("two", SGD),
            *(job(f"zero-{stage}", SGD, {"engine": {"zero_stage": stage}}) for stage in (1, 2)),
            job("whole", ADAMW, EVERY_STEP),
            job("whole", ADAMW, EVERY_STEP, cut_at=3),
        ],
        3: [job("three", SGD)],
    }
    for num_ranks, of_ranks in jobs.items():
        run_ranks(num_ranks, of_ranks, storage)
    return storage


@pytest.mark.parametrize("name", ["parts", "two", "three", "zero-1", "zero-2"])
def test_losses_are_those_of_one_rank(runs, name):
    assert_close_losses(losses(runs, name), losses(runs, "one"))
    one, other = (
        [record["scores"]["masked_loss"] for record in read_records(f"{runs}/{which}") if record["kind"] == "eval"]
        for which in ("one", name)
    )
    assert other == pytest.approx(one, rel=1e-5)


def test_a_run_killed_in_mid_epoch_ends_bit_identical(runs):
    assert_same_run((runs / "killed", "whole"), (runs, "whole"))


def test_the_best_checkpoint_has_the_lowest_loss(runs):
    found, _ = committed(f"{runs}/whole")
    scored = {checkpoint.step: checkpoint.score for checkpoint in found if checkpoint.score is not None}
    assert len(scored) == 2
    assert open_weights(f"{runs}/whole").checkpoint.score == min(scored.values())


def test_the_ending_says_what_to_do_with_an_encoder(runs, pictures, capsys):
    print_ending(config_of(pictures, runs, "one", MASKED, SGD))
    told = capsys.readouterr().out
    assert "--run.start-with backbone --model.backbone vit_small" in told
    assert "mtl_dist.predict" not in told


def test_tensorboard_has_the_picture(runs):
    board = EventAccumulator(f"{runs}/one/tensorboard", size_guidance={"images": 0})
    board.Reload()
    images = board.Images("masked")
    assert [image.width for image in images] == [3 * 80] * 2
    assert images[0].height % 80 == 0


def test_a_model_of_labels_begins_with_the_encoder(runs, shards, tmp_path):
    start = {"run": {"start": f"{runs}/one", "start_with": "backbone"}, "model": {"backbone": "vit_small"}}
    config = config_of(shards, tmp_path, "later", start)
    model = build_started(config, find_start(config, {}))
    saved = load_file(Path(open_weights(f"{runs}/one").uri) / MODEL)
    encoder = {name: tensor for name, tensor in saved.items() if name.startswith("backbone.")}
    found = model.state_dict()
    assert len(encoder) > 70
    for name, tensor in encoder.items():
        assert torch.equal(found[name], tensor), name
    assert all(parameter.requires_grad for parameter in model.backbone.parameters()), "positions are trained here"


def test_what_predicts_no_labels_is_refused_where_labels_are_predicted(runs):
    with pytest.raises(InputError, match=r"is a masked autoencoder.*predicts no labels.*--run.start-with backbone"):
        load_weights(open_weights(f"{runs}/one"))


def test_a_first_stage_with_nothing_to_learn_is_refused(shards, tmp_path):
    config = config_of(shards, tmp_path, "run", {"loss": {"va_after": 1, "expr": 0.0}})
    data = open_data(config)
    train = data.train.labels.model_copy(update={"au": [0] * 12})
    with pytest.raises(InputError, match=r"loss.va_after is 1, and .* has labels of va alone that are trained"):
        check_labels(config.loss, train, data.val.labels, names=("train", "val"))


def test_a_model_of_labels_is_not_trained_on_a_set_without(pictures, tmp_path):
    with pytest.raises(InputError, match="nothing would be trained"):
        plan_run(config_of(pictures, tmp_path, "run"))


def test_the_report_shows_the_loss_and_what_is_told(runs, tmp_path):
    report([f"{runs}/one", f"{runs}/two", "--out", str(tmp_path), "--faces", "2"])
    page = (tmp_path / "report.html").read_text()
    assert "Loss of hidden patches" in page
    assert Image.open(tmp_path / "figures" / "masked_1.png").size == (3 * 80, 2 * 80)
    lines = (tmp_path / "figures" / "masked_loss.csv").read_text().splitlines()
    assert lines[0] == "run,step,masked_loss,constant picture"
    assert len(lines) == 1 + 2 * 2


def test_a_report_without_pictures_or_records_says_so(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "one")
    (tmp_path / "one" / "metrics.jsonl").unlink()
    report([f"{tmp_path}/one", "--out", str(tmp_path / "page"), "--faces", "0", "--title", "Faces & masks"])
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Faces &amp; masks" in page
    assert "No records were kept of: one." in page
    with pytest.raises(InputError, match="autoencoders, which make none"):
        report([f"{runs}/one", "--out", str(tmp_path / "page"), "--ensemble", "e"])


def test_a_report_is_of_runs_of_one_kind(runs, shards, tmp_path):
    run_ranks(1, [(config_of(shards, tmp_path, "labels", {"train": {"epochs": 1}}), None)], tmp_path)
    with pytest.raises(InputError, match="trained for different things"):
        report([f"{runs}/one", f"{tmp_path}/labels", "--out", str(tmp_path / "page")])
