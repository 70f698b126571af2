"""The learning rate that every parameter has, a pure function of the step: there is no state to save.

rate = lr(step) x optim.backbone_lr, in the backbone   x optim.layer_decay^(layers above), in a ViT
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from torch import nn

from mtl_dist.config import Config
from mtl_dist.errors import InputError

BACKBONE = "model.backbone."  # begins the names of its parameters in an `ObjectiveModule`


class Share(NamedTuple):
    """What of the learning rate a parameter has."""

    of_lr: float
    waits: bool  # has none for the first part of training: the backbone's, where `optim.freeze_backbone_for` is given


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to `final_lr` of the peak: a pure function of the step.

    Beyond `optim.cosine_steps` it goes on, up to the peak again and so forth. Where `loss.va_after` makes two stages,
    each has a warm-up and a cosine of its own.
    """
    first = config.loss.va_after * (total_steps // config.train.epochs)
    step, total_steps = (step - first, total_steps - first) if step >= first else (step, first)
    peak, warmup = config.optim.lr, min(config.optim.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (config.optim.cosine_steps or max(total_steps - warmup, 1))
    return peak * (config.optim.final_lr + (1 - config.optim.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def share_of(name: str, module: nn.Module, config: Config) -> Share:
    """Return what of the learning rate the parameter of this name has, in a module as `ObjectiveModule` makes it."""
    if not name.startswith(BACKBONE):
        return Share(1.0, False)
    depth = count_blocks(module.get_submodule(BACKBONE.rstrip(".")))
    above = depth + 1 - _layer(name, depth) if depth else 0
    return Share(config.optim.backbone_lr * config.optim.layer_decay**above, config.optim.freeze_backbone_for > 0)


def count_blocks(backbone: nn.Module) -> int:
    """Return how many blocks a ViT has; 0 for other networks."""
    return next((len(m.blocks) for m in backbone.modules() if hasattr(m, "blocks") and hasattr(m, "patch_embed")), 0)


def _layer(name: str, depth: int) -> int:
    """Number a ViT's parts from its input: patches and positions 0, the blocks 1 to `depth`, what follows `depth` + 1.

    As in MAE's fine-tuning (arXiv 2111.06377), where the heads have the whole rate.
    """
    if block := re.search(r"\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if re.search(r"\.(cls_token|pos_embed|patch_embed|reg_token)\b", name) else depth + 1


def check_layers(module: nn.Module, config: Config) -> None:
    """Raise `InputError` where `optim.layer_decay` has no layers to decay over."""
    if config.optim.layer_decay < 1 and not count_blocks(module):
        raise InputError(
            f"optim.layer_decay is {config.optim.layer_decay:g}, and model.backbone {config.model.backbone} is no ViT; "
            "leave it out, or give one"
        )


def group_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return the learning rates of an optimizer's groups, by what they are; nothing where all have the same."""
    rates = {("heads" if share == Share(1.0, False) else f"backbone x{share.of_lr:.3g}"): group["lr"]
             for group in groups for share in [group["share"]]}  # fmt: skip
    return rates if len(rates) > 1 else {}


def describe_rates(module: nn.Module, config: Config) -> str:
    """Say which rates there are, with how many parameters each; empty where all have the same."""
    check_layers(module, config)
    counts: dict[Share, int] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            share = share_of(name, module, config)
            counts[share] = counts.get(share, 0) + parameter.numel()
    frozen = config.optim.freeze_backbone_for
    if len({share.of_lr for share in counts}) < 2 and not frozen:
        return ""
    parts = [
        f"{config.optim.lr * share.of_lr:.3g} for {count:,}" for share, count in sorted(counts.items(), reverse=True)
    ]
    still = f"; the backbone's are 0 for the first {frozen:.0%} of training" if frozen else ""
    return f"rates   at their peak, by parameters: {', '.join(parts)}{still}"
