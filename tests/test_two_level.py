"""System D: maps of several resolutions, two levels of attention, and two stages of training."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.models import build_model
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.two_level import LayerAttention, PositionAttention
from mtl_dist.objective.affect import Affect, mean_square_error
from mtl_dist.objective.gradients import build_balancer
from mtl_dist.objective.losses import global_losses
from mtl_dist.sections import LossConfig
from mtl_dist.training.engine import is_decayed
from mtl_dist.training.rates import learning_rate
from mtl_dist.training.tracking import read_records
from tests.conftest import run_here
from tests.test_objective import COUNTS, TinyModel, make_batch
from tests.test_recipes import EVERY_STEP, assert_close_losses, assert_same_run, config_of, run_ranks
from tests.test_training import losses
from tests.windows import all_valid

SIZE = 96


def make(**two_level):
    settings = {"name": "d", "backbone": "small", "weights": "none", "two_level": two_level}
    return build_model(build_config({"model": settings, "data": {"image_size": SIZE}}).model, input_size=SIZE)


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("small", 96, [(48, 24), (96, 12), (192, 6)]),
        ("inception_v3", 299, [(192, 71), (288, 35), (768, 17)]),
        ("vgg_small", 96, [(64, 24), (96, 12), (96, 6)]),
        ("iresnet18", 112, [(128, 28), (256, 14), (512, 7)]),
        ("vit_small", 32, [(128, 4)] * 3),
        ("torchvision:resnet18", 96, [(64, 24), (128, 12), (256, 6)]),
        ("timm:test_efficientnet", 96, None),
    ],
)
def test_a_pyramid_has_the_last_map_of_every_resolution(name, size, shapes):
    backbone = build_backbone(name, size).eval()
    images = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        maps = backbone.pyramid(images)
        torch.testing.assert_close(maps[-1], backbone(images))
    assert len(maps) >= 2
    if shapes:
        assert [(features.shape[1], features.shape[-1]) for features in maps] == shapes


@pytest.mark.whole
def test_what_has_one_map_is_refused():
    config = build_config({"model": {"name": "d", "backbone": "torchvision:vit_b_16", "weights": "none"}})
    with pytest.raises(InputError, match="attends to several maps of a backbone, and this one has one"):
        build_model(config.model, input_size=112)


def test_a_map_is_enhanced_where_the_mask_says():
    attention = PositionAttention(16)
    features = torch.randn(2, 16, 5, 5)
    enhanced, places = attention(features)
    assert places.shape == (2, 1, 5, 5)
    assert ((places > 0) & (places < 1)).all()
    torch.testing.assert_close(enhanced, features + features * places)


def test_layers_are_weighed_by_weights_that_sum_to_one():
    attention = LayerAttention().double()
    layers = torch.randn(3, 4, 256, dtype=torch.float64)
    states, _ = attention.gru(layers)
    keys = torch.tanh(states @ attention.key.weight.T + attention.key.bias)
    weights = F.softmax(keys @ attention.score.weight[0], dim=1)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(attention(layers), torch.einsum("nl,nld->nd", weights, states))


SWITCHES = ("position_attention", "layer_attention", "categorical_feedback", "detach_categorical")


@pytest.mark.parametrize("values", itertools.product([True, False], repeat=4))
def test_every_part_can_be_switched_off_and_every_parameter_is_trained(values):
    model = make(**dict(zip(SWITCHES, values)))
    images = torch.rand(3, 1, 3, SIZE, SIZE)
    outputs = model(images, all_valid(images))
    assert [tuple(output.shape) for output in outputs] == [(3, 1, 2), (3, 1, 8), (3, 1, 12)]
    assert outputs.va.abs().max() <= 1
    sum(output.square().sum() for output in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    position, layer, *_ = values
    assert any("positions" in name for name, _ in model.named_parameters()) == position
    assert any("gru" in name for name, _ in model.named_parameters()) == layer


@pytest.mark.parametrize("detaches", [True, False])
def test_valence_and_arousal_are_told_from_what_expressions_are(detaches):
    model = make(detach_categorical=detaches)
    images = torch.rand(3, 1, 3, SIZE, SIZE)
    model(images, all_valid(images)).va.square().sum().backward()
    moved = model.categorical.weight.grad is not None and bool(model.categorical.weight.grad.any())
    assert moved is not detaches


# ------------------------------------------------------------------------------------------------------------ its loss


def test_the_mean_square_error_is_that_of_the_pairs():
    config = LossConfig(va_mse=2.0)
    batch, model = make_batch(20), TinyModel()
    outputs = model(batch.inputs, batch.valid)
    mask, labels = batch.labels.va_mask, batch.labels.va.double()
    error = (outputs.va - labels)[mask].square().mean(0)
    for objective, extra in ((Affect(config, COUNTS), 2 * error.mean()), (Affect(LossConfig(), COUNTS), 0.0)):
        sums = objective.sums(outputs, batch)
        plain = Affect(LossConfig(), COUNTS).loss("va", sums["va"])
        assert float(objective.loss("va", sums["va"]) - plain) == pytest.approx(float(extra))
    torch.testing.assert_close(mean_square_error(sums["va"]), error)
    whole = Affect(config, COUNTS)
    found = global_losses(whole, sums, {term: part.detach() for term, part in sums.items()}, scale=1.0)["va"]
    (gradient,) = torch.autograd.grad(found, model.va.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(whole.loss("va", sums["va"]), model.va.weight)
    torch.testing.assert_close(gradient, expected)


def test_a_first_stage_has_no_loss_of_va():
    balancer = build_balancer("fixed", {"va": 2.0, "expr": 1.0})
    for epoch, expected in ((0, [0, 1]), (2, [0, 1]), (3, [2, 1]), (9, [2, 1]), (1, [0, 1])):
        balancer.begin_epoch(epoch, {"va": 3})
        assert balancer.fixed.tolist() == expected


def test_the_learning_rate_begins_anew_after_the_first_stage():
    optim = {"lr": 0.1, "warmup_steps": 5, "final_lr": 0.0}
    two = build_config({"optim": optim, "train": {"epochs": 10}, "loss": {"va_after": 4}})
    one = build_config({"optim": optim, "train": {"epochs": 4}})
    rest = build_config({"optim": optim, "train": {"epochs": 6}})
    for step in range(40):
        assert learning_rate(two, step, 100) == learning_rate(one, step, 40)
    for step in range(60):
        assert learning_rate(two, 40 + step, 100) == learning_rate(rest, step, 60)


def test_a_second_stage_without_epochs_is_refused():
    with pytest.raises(InputError, match="no epoch is left for VA"):
        build_config({"loss": {"va_after": 10}, "train": {"epochs": 10}})
    with pytest.raises(InputError, match="its first epochs train nothing"):
        build_config({"loss": {"va_after": 2, "expr": 0.0, "au": 0.0}})


# ------------------------------------------------------------------------------------------------------------- training


def test_weights_of_the_gru_are_decayed():
    module = make()
    assert is_decayed(module, "layers.gru.weight_ih_l0")
    assert not is_decayed(module, "layers.gru.bias_ih_l0_reverse")


STAGES = {
    "model": {"name": "d", "backbone": "small", "weights": "none", "dropout": 0.0},
    "loss": {"va_after": 1, "va_mse": 1.0},
    "train": {"epochs": 2},
}
SGD = {"optim": {"name": "sgd", "lr": 0.02}, "engine": {"batchnorm": "frozen"}}


@pytest.mark.whole
def test_two_stages_have_the_same_losses_on_any_ranks_in_parts_and_at_any_zero_stage(shards, tmp_path):
    def job(name: str, *layers):
        return config_of(shards, tmp_path, name, STAGES, SGD, *layers), None

    run_ranks(1, [job("one"), job("parts", {"train": {"accumulation": 3}})], tmp_path)
    run_ranks(2, [job("two"), *(job(f"zero-{stage}", {"engine": {"zero_stage": stage}}) for stage in (1, 2))], tmp_path)
    run_ranks(3, [job("three")], tmp_path)
    for name in ("parts", "two", "zero-1", "zero-2", "three"):
        assert_close_losses(losses(tmp_path, name), losses(tmp_path, "one"))


@pytest.mark.whole
def test_two_stages_end_bit_identical_after_a_kill_in_either(shards, tmp_path):
    def job(name: str, place: Path, cut_at: int | None = None):
        return config_of(shards, place, name, STAGES, EVERY_STEP), cut_at

    run_ranks(2, [job("first", tmp_path), job("second", tmp_path)], tmp_path)
    in_second = len(losses(tmp_path, "second")) // 2 + 1
    killed = tmp_path / "killed"
    (tmp_path / "again").mkdir()
    run_ranks(2, [job("first", killed, cut_at=2), job("second", killed, cut_at=in_second)], tmp_path / "again")
    for name in ("first", "second"):
        assert_same_run((killed, name), (tmp_path, name))


@pytest.mark.whole
def test_two_stages_as_two_runs_each_end_bit_identical_after_a_kill(shards, tmp_path):
    """The first run learns categories, and the second begins with its model."""
    first = {"loss": {"va": 0.0, "va_after": 0, "va_mse": 0.0}}
    second = {"loss": {"va_after": 0}, "run": {"start": str(tmp_path / "first"), "start_with": "model"}}

    def jobs(name: str, layer: dict) -> list:
        killed = config_of(shards, tmp_path / "killed", name, STAGES, EVERY_STEP, layer)
        return [(config_of(shards, tmp_path, name, STAGES, EVERY_STEP, layer), None), (killed, 3)]

    run_ranks(1, [*jobs("first", first), *jobs("second", second)], tmp_path)
    for name in ("first", "second"):
        assert_same_run((tmp_path / "killed", name), (tmp_path, name))
    step = losses(tmp_path, "first")[0]
    assert step["total"] == pytest.approx(step["expr"] + step["au"])  # of VA it is told, and not learnt
    assert losses(tmp_path, "second")[0]["total"] > sum(losses(tmp_path, "second")[0][t] for t in ("expr", "au"))


@pytest.mark.whole
def test_a_run_of_it_is_exported_predicted_ensembled_and_reported(shards, dataset, tmp_path):
    run_ranks(1, [(config_of(shards, tmp_path, "run", STAGES), None)], tmp_path)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for command in (
        ["mtl_dist.train", "--status", run],
        ["mtl_dist.export", run, "--out", f"{out}/exported"],
        ["mtl_dist.predict", "--runs", run, "--input", f"{dataset}/cropped/v0", "--out", f"{out}/run.csv"],
        [
            "mtl_dist.predict",
            "--runs",
            f"{out}/exported",
            "--input",
            f"{dataset}/cropped/v0",
            "--out",
            f"{out}/same.csv",
        ],
        ["mtl_dist.ensemble", "--runs", run, "--out", f"{out}/ensemble"],
        ["mtl_dist.report", run, "--ensemble", f"{out}/ensemble", "--out", f"{out}/report"],
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            done = run_here(*command)
        assert done.returncode == 0, (command, done.stderr)
        assert not [warning for warning in said if "assigned during export" in str(warning.message)]
    assert (tmp_path / "out/run.csv").read_bytes() == (tmp_path / "out/same.csv").read_bytes()
    scored = json.loads((tmp_path / "out/ensemble/score.json").read_text())["p"]
    evaluations = [record["scores"]["p"] for record in read_records(run) if record["kind"] == "eval"]
    assert scored == pytest.approx(max(evaluations), abs=1e-4)
    assert "2Att-2Mt" in (tmp_path / "out/report/report.html").read_text()
