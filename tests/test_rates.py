"""The learning rate of every parameter: the backbone's share, layers of a ViT, and what waits."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.models import build_model
from mtl_dist.models.backbones import build_backbone
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.presets import CommandConfig, parse_command
from mtl_dist.training.engine import build_optimizer, set_learning_rate
from mtl_dist.training.rates import describe_rates, learning_rate

COUNTS = LabelCounts(rows=1, va=1, expr=1, expr_classes=[1] * 8, au=[1] * 12, au_positives=[1] * 12, unlabelled=0)


def make(**optim):
    config = build_config(
        {
            "model": {"name": "a", "backbone": "vit_small", "weights": "none", "image_size": 32},
            "optim": {"name": "adamw", "lr": 0.1, "warmup_steps": 0, **optim},
        }
    )
    model = build_model(config.model, input_size=32)
    return config, ObjectiveModule(model, build_objective(config, COUNTS))


def rates(config: Config, module: torch.nn.Module, *, step: int, total: int = 10) -> dict[str, float]:
    """Return what every parameter's rate is at a step, as a share of the whole one."""
    optimizer = build_optimizer(module, config)
    lr = set_learning_rate(SimpleNamespace(optimizer=optimizer), config, step, total)
    assert lr == learning_rate(config, step, total)
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group["lr"] / lr for group in optimizer.param_groups for p in group["params"]}


def test_all_have_the_same_unless_another_is_asked_for():
    config, module = make()
    assert len(build_optimizer(module, config).param_groups) == 2  # with weight decay and without
    assert set(rates(config, module, step=3).values()) == {1.0}
    assert describe_rates(module, config) == ""


def test_layers_of_a_vit_have_less_the_further_they_are_from_the_heads():
    config, module = make(backbone_lr=0.5, layer_decay=0.5)
    found = rates(config, module, step=3)
    vit = "model.backbone.net.model."
    expected = {
        "model.projections.weight": 1.0,
        f"{vit}norm.weight": 0.5,
        f"{vit}blocks.5.attn.qkv.weight": 0.5 * 0.5,
        f"{vit}blocks.0.norm1.bias": 0.5 * 0.5**6,
        f"{vit}patch_embed.proj.weight": 0.5 * 0.5**7,
        f"{vit}cls_token": 0.5 * 0.5**7,
        f"{vit}pos_embed": 0.5 * 0.5**7,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert len(Counter(found.values())) == 9  # heads, norm, six blocks, patches
    assert found.keys() == {name for name, _ in module.named_parameters()}
    text = describe_rates(module, config)
    assert "0.1 for " in text
    assert "0.000391 for " in text


def test_layers_of_what_has_none_are_refused():
    config = build_config(
        {"model": {"backbone": "timm:resnet10t", "weights": "none", "image_size": 64}, "optim": {"layer_decay": 0.7}}
    )
    module = ObjectiveModule(build_model(config.model, input_size=64), build_objective(config, COUNTS))
    for call in (build_optimizer, describe_rates):
        with pytest.raises(InputError, match=r"optim.layer_decay is 0.7, and model.backbone timm:resnet10t is no ViT"):
            call(module, config)


def test_a_backbone_waits_for_a_share_of_training():
    config, module = make(freeze_backbone_for=0.3)
    for step, expected in ((0, 0.0), (2, 0.0), (3, 1.0), (9, 1.0)):
        found = rates(config, module, step=step)
        assert {rate for name, rate in found.items() if name.startswith("model.backbone.")} == {expected}
        assert {rate for name, rate in found.items() if not name.startswith("model.backbone.")} == {1.0}
    assert "0 for the first 30% of training" in describe_rates(module, config)


def test_paths_are_dropped_in_training_alone():
    backbone = build_backbone("vit_small", 32, drop_path=0.5)
    images = torch.rand(2, 3, 32, 32)
    first, second = backbone(images), backbone(images)
    assert not torch.equal(first, second)
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))
    with pytest.raises(InputError, match="has no path to drop"):
        build_backbone("timm:vgg11", 32, drop_path=0.5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.layer-decay", "0.7"], "optim.layer_decay is 0.7, and nothing reads it"),
        (["--model.drop-path", "0.1"], "model.drop_path is 0.1, and nothing reads it"),
        (["--model.freeze-backbone", "--optim.backbone-lr", "0.1"], "optim.backbone_lr is 0.1, and nothing reads it"),
        (["--preset", "small-mae", "--loss.va", "2"], "loss.va is 2.0, and nothing reads it"),
        (["--preset", "small-mae", "--model.dropout", "0.1"], "model.dropout is 0.1, and nothing reads it"),
        (["--optim.betas", "0.9", "0.95"], "optim.betas is"),
        (["--optim.momentum", "0", "--optim.no-nesterov"], "optim.nesterov is False, and nothing reads it: optim.mom"),
        (["--optim.name", "adamw", "--optim.no-nesterov"], "optim.nesterov is False, and nothing reads it: optim.name"),
        (["--preset", "small", "--optim.betas", "0.9", "1.5"], "optim.betas"),
    ],
)
def test_what_nothing_reads_is_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parse_command(CommandConfig, flags, prog="test", description="")
