"""DeepSpeed as we configure it, and with what a run goes on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.model_config import ModelConfig
from mtl_dist.models import build_model
from mtl_dist.models.heads import AUHead
from mtl_dist.models.regions import GatedConv, RegionLinear
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.presets import PRESETS, load_preset
from mtl_dist.runs.checkpoint import MODEL, TRAIN, committed, read_state, read_tensors
from mtl_dist.runs.lives import begin_life, read_lives
from mtl_dist.training.averaging import check_batchnorm
from mtl_dist.training.clipping import Clipper, clip_gradients
from mtl_dist.training.engine import build_engine, build_optimizer, read_optimizer, restore_optimizer
from mtl_dist.training.loop import fit
from mtl_dist.training.plan import build_order, open_data
from mtl_dist.training.saving import Saver
from tests.test_recipes import EVERY_STEP, PER_TASK, Context, config_of
from tests.test_training import cut_back
from tests.windows import DIMS

pytestmark = pytest.mark.whole


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize(("clip_norm", "moved"), [(None, 500.0), (1.0, 1.0), (600.0, 500.0)])
def test_gradients_are_clipped_to_the_norm_asked_for_and_not_at_all_without_one(group, zero_stage, clip_norm, moved):
    """The loss is 300 x + 400 y: plain SGD at lr 1 moves the weights by its gradient."""
    optim = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": clip_norm}
    config = build_config({"optim": optim, "engine": {"zero_stage": zero_stage}, "train": {"global_batch": 1}})
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    engine = build_engine(module, config, num_ranks=1, device=torch.device("cpu"))
    engine.backward(engine(torch.tensor([[300.0, 400.0]])).sum() - module.bias.sum())
    engine.step()
    assert float((engine.module.weight.detach() - before).norm()) == pytest.approx(moved, rel=1e-4)


BACKBONES = {
    "timm:test_vit": ["cls_token", "pos_embed"],
    "timm:convnext_atto": ["gamma"],
    "timm:swin_tiny_patch4_window7_224": ["relative_position_bias_table"],
    "timm:nfnet_f0": ["gain"],
    "torchvision:vit_b_16": ["class_token", "pos_embedding"],
    "torchvision:convnext_tiny": ["layer_scale"],
}
DECAYED = (nn.GRU, nn.LSTM, nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, GatedConv, RegionLinear, AUHead)
COUNTS = LabelCounts(rows=1, va=1, expr=1, expr_classes=[1] * 8, au=[1] * 12, au_positives=[1] * 12, unlabelled=0)


@pytest.mark.parametrize("model", [*PRESETS, *BACKBONES])
def test_weights_of_layers_are_decayed_and_nothing_else(model):
    """Biases of two dimensions (regions.linear.bias), tokens, positions and scales of layers are no weights."""
    layers_of = {"backbone": model, "image_size": 64} if model in BACKBONES else {}
    changes = {
        "model": {"weights": "none", "sequence": {"dims": DIMS}, **layers_of},
        "loss": {"balancing": "uncertainty"},
        "optim": {"layer_decay": 1.0, "freeze_backbone_for": 0.0},  # one rate: two groups
    }
    config = build_config(load_preset(model if model in PRESETS else "a"), changes)
    network, objective = build_model(config.model, input_size=config.input_size), build_objective(config, COUNTS)
    module = ObjectiveModule(network, objective, balancing=config.loss.balancing)
    layers = dict(module.named_modules())
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, others = (
        [names[id(p)] for p in group["params"]] for group in build_optimizer(module, config).param_groups
    )
    assert len(decayed) + len(others) == sum(p.requires_grad for p in module.parameters())
    for name in decayed:
        owner, _, own_name = name.rpartition(".")
        assert own_name in ("weight", "in_proj_weight") or own_name.startswith("weight_"), name
        assert isinstance(layers[owner], DECAYED), name
    for name in others:
        owner, _, own_name = name.rpartition(".")
        assert not (own_name.endswith("weight") and isinstance(layers[owner], DECAYED)), name
    expected = ["log_variance", *BACKBONES.get(model, ())] + (
        ["regions.linear.bias"] if hasattr(network, "regions") else []
    )
    assert all(any(name.endswith(part) for name in others) for part in expected)


def test_one_row_a_rank_is_refused_for_batchnorm_over_single_cells_and_few_are_noted():
    squeezing = build_model(ModelConfig(backbone="timm:rexnet_100", weights="none"), input_size=64)
    with pytest.raises(InputError, match=r"1 row .*start fewer ranks, raise train\.global_batch, .*batchnorm frozen"):
        check_batchnorm(squeezing, rows=1, size=64)
    for rows in (2, 7):
        assert f"statistics of {rows} row(s)" in check_batchnorm(squeezing, rows=rows, size=64)
    assert check_batchnorm(squeezing, rows=8, size=64) == ""
    small = build_model(ModelConfig(backbone="small", weights="none"), input_size=80)
    assert "statistics of 1 row(s)" in check_batchnorm(small, rows=1, size=80)
    frozen = ModelConfig(name="baseline", backbone="vgg_small", weights="none", freeze_backbone=True, hidden=8)
    assert check_batchnorm(build_model(frozen, input_size=80), rows=1, size=80) == ""


@pytest.mark.parametrize("recipe", [{}, PER_TASK])
def test_a_run_begun_with_the_old_order_continues_with_it_and_a_new_one_has_the_new(
    recipe, shards, tmp_path, group, capsys
):
    config = config_of(shards, tmp_path, "run", recipe, EVERY_STEP, {"train": {"epochs": 1, "eval_batch": 20}})
    fit(config, Context(0, 1, "first"))
    begun = committed(config.run.uri)[0][0]
    state = read_state(begun)
    assert state.pop("order") == 2
    tensors = [read_tensors(begun, name) for name in (MODEL, TRAIN)]
    cut_back(tmp_path, "run", 0)  # what is left is a checkpoint as earlier versions made it
    life = begin_life(config.run.uri, launcher="second", num_ranks=1)
    with Saver(config.run.uri, config.checkpoint, life=life) as saver:
        saver.save(*tensors, begun=0.0, state=state, scores={}, records={})
    assert "an earlier version" not in capsys.readouterr().out
    fit(config, Context(0, 1, "third"))
    assert "an earlier version began this run" in capsys.readouterr().out
    assert read_state(committed(config.run.uri)[0][-1])["order"] == 1

    data, reader = open_data(config), ShardReader(config.data.train[0], read_index(config.data.train[0]), Cache())
    order = build_order(config, data, ImageSamples(reader, config.data.image_size))
    first, *_, last = (life["life"] for life in read_lives(config.run.uri))
    for life, version in ((first, 2), (last, 1)):
        plan = order.of_version(version).plan(epoch=0, rank=0, num_ranks=1)
        (audit,) = (tmp_path / "audit" / "run").glob(f"{life}-*")
        for line in map(json.loads, audit.read_text().splitlines()):
            expected = plan.samples_of(line["step"] - 1, 1)[0]
            assert [number for batch in line["samples"].values() for number in batch] == expected.tolist()


class StoppedMeanwhile(Context):
    """A rank that is asked to stop while it evaluates."""

    is_asked = False

    def publish(self, metrics) -> None:
        self.is_asked = True

    def should_stop(self) -> bool:
        return self.is_asked


def test_who_asks_to_stop_during_an_evaluation_is_heard_when_it_ends(shards, tmp_path, group, capsys):
    config = config_of(shards, tmp_path, "run")
    fit(config, StoppedMeanwhile(0, 1, "first"))
    assert [checkpoint.step for checkpoint in committed(config.run.uri)[0]] == [5]
    assert "stopped at step 5 of 10, saved; the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_gradients_are_clipped_as_deepspeed_clips_them_to_the_last_bit(group, max_norm):
    config = build_config({"optim": {"clip_norm": max_norm}, "train": {"global_batch": 1}})
    engine = build_engine(nn.Linear(2, 1), config, num_ranks=1, device=torch.device("cpu"))  # DeepSpeed wants one
    assert isinstance(engine.clip_fp32_gradients, Clipper)
    from deepspeed.runtime.utils import clip_grad_norm_

    generator, shapes = torch.Generator().manual_seed(0), ((7, 5), (3,), (11, 2, 3, 3), (1,), (64, 1000))
    mine, theirs = (nn.ParameterList(torch.zeros(shape) for shape in shapes) for _ in "ab")
    for one, other in zip(mine, theirs):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    mine.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    clip_grad_norm_(list(theirs.parameters()), max_norm)
    clip_gradients(mine.parameters(), max_norm)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(mine, theirs))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_go_on_with_the_state_of_a_checkpoint(name):
    config = build_config({"optim": {"name": name}, "train": {"global_batch": 1}})

    def make(*, fused):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return SimpleNamespace(module=module, optimizer=build_optimizer(module, config, fused=fused))

    def step(engine, seed):
        engine.module.zero_grad()
        engine.module(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        engine.optimizer.step()

    plain, fused = make(fused=False), make(fused=True)
    for number in range(2):
        step(plain, number)
    fused.module.load_state_dict(plain.module.state_dict())
    kept = {name: tensor.clone() for name, tensor in read_optimizer(plain, config).items()}
    restore_optimizer(fused, config, kept, steps=2)
    step(plain, 2)
    step(fused, 2)
    torch.testing.assert_close(fused.module.state_dict(), plain.module.state_dict())
