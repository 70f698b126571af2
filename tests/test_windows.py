"""Samples of several frames, some of them padding: losses, scores and rows are those of the frames that are there."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mtl_dist.config import AugmentConfig, LossConfig, build_config
from mtl_dist.data.augment import ImagePreparation, build_preparation
from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.module import ObjectiveModule, build_module
from mtl_dist.predicting.evaluate import evaluate, predict
from mtl_dist.predicting.predictions import prediction_table
from mtl_dist.tasks import Batch, LabelCounts, Outputs
from mtl_dist.training.step import train_step
from tests.test_recipes import PlainEngine
from tests.windows import LENGTHS, frames_alone, make_windows

FEATURES, SIDE = 5, 8
CPU = torch.device("cpu")
PREPARE = ImagePreparation(AugmentConfig(), SIDE)
COUNTS = LabelCounts(
    rows=100, va=80, expr=60, au=[50] * 12, expr_classes=[20, 10, 5, 5, 10, 5, 5, 0], au_positives=[10] * 12,
    unlabelled=1,
)  # fmt: skip
BALANCERS = get_args(LossConfig.model_fields["balancing"].annotation)


class Pixels(nn.Module):
    """A linear model of what every frame holds; what comes out on padding is garbage."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 22)

    def forward(self, inputs, valid):
        outputs = self.linear(torch.where(valid[..., None], inputs.flatten(2), 99.0))
        va, expr, au = outputs.split([2, 8, 12], -1)
        return Outputs(va.tanh(), expr, au)


def make_module(balancing: str, width: int = FEATURES) -> ObjectiveModule:
    config = LossConfig(va=0.7, expr=1.3, balancing=balancing, expr_weights="balanced", au_weights="balanced")
    torch.manual_seed(0)
    return build_module(Pixels(width), Affect(config, COUNTS), balancing=balancing)


def loss_and_gradients(module: ObjectiveModule, batch: Batch) -> torch.Tensor:
    loss = copy.deepcopy(module)
    step = loss(batch)
    step.total.backward()
    return torch.cat([step.total.detach()[None], *(p.grad.double().flatten() for p in loss.parameters())])


def run_ranks(function, num_ranks: int, tmp_path, *args) -> list:
    results = mp.get_context("spawn").Queue()
    processes = mp.spawn(
        rank_main, args=(num_ranks, tmp_path / "store", function, args, results), nprocs=num_ranks, join=False
    )
    found = [results.get(timeout=90) for _ in range(num_ranks)]
    processes.join()
    return found


def rank_main(rank, num_ranks, init_file, function, args, results):
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=num_ranks)
    results.put(function(rank, *args))
    dist.destroy_process_group()


def losses_of_rank(rank: int, module: ObjectiveModule, batch: Batch) -> list[float]:
    found = loss_and_gradients(module, batch.take(slice(0, 4) if rank == 0 else slice(4, None)))
    mean = found.clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    mean[0] = found[0]  # every rank has the loss of all
    return mean.tolist()


@pytest.mark.parametrize("balancing", BALANCERS)
def test_losses_and_gradients_of_padded_samples_are_those_of_their_frames(balancing):
    batch, module = make_windows((FEATURES,)), make_module(balancing)
    alone = loss_and_gradients(module, frames_alone(batch))
    torch.testing.assert_close(loss_and_gradients(module, batch), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.whole
def test_losses_and_gradients_of_padded_samples_on_two_ranks_are_those_of_their_frames_on_one(tmp_path):
    batch, module = make_windows((FEATURES,)), make_module("uncertainty")
    alone = loss_and_gradients(module, frames_alone(batch))
    for found in run_ranks(losses_of_rank, 2, tmp_path, module, batch):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), alone, rtol=1e-5, atol=1e-6)


def images(lengths=LENGTHS) -> Batch:
    return make_windows((3, SIDE, SIDE), lengths=lengths, dtype=torch.uint8)


def predicted(batch: Batch, module: ObjectiveModule):
    return predict(module.model, [batch.take(slice(0, 4)), batch.take(slice(4, None))], device=CPU, prepare=PREPARE)


def scores_of_rank(rank: int, module: ObjectiveModule, batch: Batch) -> dict:
    mine = batch.take(slice(0, 4) if rank == 0 else slice(4, None))
    return scored(module, [mine])


def scored(module: ObjectiveModule, batches: list[Batch], told: list[int] | None = None) -> dict[str, float]:
    progress = (lambda count: None) if told is None else told.append
    how = {"step": 7, "progress": progress, "device": CPU, "prepare": PREPARE}
    scores = evaluate(module.model, module.objective, batches, **how).scores
    parts = {**scores["f1_expr"], **scores["f1_au"], **scores["frames"]}
    return parts | {name: score for name, score in scores.items() if isinstance(score, float)}


@pytest.mark.whole
def test_predictions_of_padded_samples_are_rows_of_their_frames_and_none_of_padding(tmp_path):
    batch, module, told = images(), make_module("fixed", 3 * SIDE**2), []
    windows, alone = predicted(batch, module), predicted(frames_alone(batch), module)
    assert len(windows.rows) == sum(LENGTHS)
    assert windows.rows.min() >= 0
    tables = [prediction_table(each, list(map(str, each.rows)), labels=True) for each in (windows, alone)]
    one, other = (table.to_pylist() for table in tables)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    expected = scored(module, [frames_alone(batch)])
    assert scored(module, [batch], told) == pytest.approx(expected, rel=1e-5)
    assert told == [sum(LENGTHS)]
    for found in run_ranks(scores_of_rank, 2, tmp_path, module, batch):
        assert found == pytest.approx(expected, rel=1e-5)


class Spoilt(nn.Module):
    """A model with values that are not finite in some places, (B, T) bool."""

    def __init__(self, model: nn.Module, places: torch.Tensor):
        super().__init__()
        self.model, self.places = model, places

    def forward(self, inputs, valid):
        outputs = self.model(inputs, valid)
        return outputs._replace(va=torch.where(self.places[..., None], float("nan"), outputs.va))


def test_what_is_not_finite_on_padding_is_no_fault_and_on_a_frame_names_its_row():
    batch, module = images(), make_module("fixed", 3 * SIDE**2)
    padding, frame = ~batch.valid, torch.zeros_like(batch.valid)
    frame[2, 1] = True
    whole, module.model = module.model, Spoilt(module.model, padding)
    scored(module, [batch])
    module.model = Spoilt(whole, frame)
    with pytest.raises(NonFiniteLoss, match=rf"step 7: .* 1 row\(s\) are not finite: {batch.rows[2, 1]}$"):
        scored(module, [batch])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_over_padded_samples_is_that_over_their_frames(accumulation):
    """Augmentation is keyed by row; micro-batches are of samples, so that padding is cut as the frames are."""
    batch, losses = images(), []
    config = build_config(
        {"train": {"accumulation": accumulation}, "data": {"image_size": 32}, "model": {"backbone": "vgg_small"}}
    )
    for each in (batch, frames_alone(batch)):
        module = make_module("famo", 3 * 32**2)
        loss = train_step(
            PlainEngine(module), each, config, prepare=build_preparation(config), epoch=1, step=0, device=CPU, rank=0
        )
        grads = [p.grad / accumulation for p in module.parameters()]
        losses.append([loss.total.float(), *(value.float() for value in loss.terms.values()), *grads])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert sorted(batch.valid_rows()) == sorted(batch.rows[batch.rows >= 0].tolist())
