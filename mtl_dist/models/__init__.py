"""Models: `build_model(config)` and, in one file a family, what it builds. Every model returns `tasks.Outputs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mtl_dist.errors import InputError
from mtl_dist.models.backbones import build_backbone, load_backbone_weights, load_imagenet_weights
from mtl_dist.models.emotionnet import EnsembleNet, SMMEmotionNet

if TYPE_CHECKING:
    from mtl_dist.config import ModelConfig

MODELS = {"a": EnsembleNet, "b": SMMEmotionNet}


def build_model(config: ModelConfig, *, seed: int = 0, weights_file: Path | None = None) -> nn.Module:
    """Build the configured model on the CPU: random weights by `seed`, then the backbone's from `config.weights`.

    `weights_file` is the local copy of `config.weights` where that is an `s3://` URI: models read no storage.
    The global random state is left as it was.

    Raises:
        InputError: an unknown name, or weights that do not fit the backbone.
        InputError: ImageNet weights could not be downloaded.
    """
    if config.name not in MODELS:
        raise InputError(f"unknown model {config.name!r}; known: {', '.join(sorted(MODELS))}")
    if weights_file is None and config.weights.startswith("s3://"):
        raise InputError(f"fetch {config.weights} first and give build_model its local copy as weights_file")

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well, which are not forked
        model = MODELS[config.name](build_backbone(config.backbone), dropout=config.dropout)

    if config.weights == "imagenet":
        load_imagenet_weights(model.backbone)
    elif config.weights != "none":
        load_backbone_weights(model.backbone, weights_file or Path(config.weights))
    return model


def num_parameters(module: nn.Module) -> int:
    """Count the parameters of `module`, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
