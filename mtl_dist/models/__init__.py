"""Models: `build_model(config)` and, in one file a family, what it builds.

Every model is `forward(inputs, valid) -> tasks.Outputs` of samples and frames; see `PerFrame` and `SequenceNet`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.foreign import load_backbone_weights, load_imagenet_weights

if TYPE_CHECKING:
    from mtl_dist.model_config import ModelConfig


def build_model(
    config: ModelConfig, *, seed: int = 0, input_size: int | None = None, weights_file: Path | None = None
) -> nn.Module:
    """Build the configured model on the CPU: random weights by `seed`, then the backbone's from `config.weights`.

    `input_size` is the side of the images in pixels (`Config.input_size`; None: `config.image_size`), which libraries'
    backbones and the baseline need. `weights_file` is the local copy of `config.weights` where that is not a local
    file: models read no storage. The global random state is left as it was.

    Raises:
        InputError: an unknown backbone, or weights that do not fit it.
        InputError: ImageNet weights could not be downloaded.
    """
    if weights_file is None and config.weights.startswith("s3://"):
        raise InputError(f"fetch {config.weights} first and give build_model its local copy as weights_file")

    input_size, loaded = input_size or config.image_size, None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well, which are not forked
        backbone = build_backbone(config.backbone, input_size, drop_path=config.drop_path, dims=config.sequence.dims)
        model = _build_heads(config, backbone, input_size)
        if config.weights == "imagenet":
            loaded = load_imagenet_weights(model.backbone)  # libraries draw weights before they load some

    if config.weights not in ("none", "imagenet"):
        loaded = load_backbone_weights(model.backbone, weights_file or Path(config.weights), source=config.weights)
    model.backbone.loaded = loaded
    if config.freeze_backbone:
        model.backbone.freeze()
    return model


class TooLarge(Exception):
    """A network of more parameters than were allowed."""


@contextlib.contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Raise `TooLarge` as soon as what is built in the block has more parameters; before they take memory."""
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total > parameters:
            raise TooLarge(f"more than {parameters} parameters")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _build_heads(config: ModelConfig, backbone: Backbone, input_size: int | None) -> nn.Module:
    """Build what comes after the backbone, and the model of both, with the settings that its family reads."""
    family = FAMILIES[config.name]
    own = {name: getattr(config, name) for name in family.reads}
    return resolve_name(f"{__name__}.{family.built_by}")(backbone, input_size=input_size, **own)


def num_parameters(module: nn.Module) -> int:
    """Count the parameters of `module`, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def non_finite(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that hold what is not a number or infinite."""
    return [name for name, tensor in module.state_dict().items() if not bool(torch.isfinite(tensor).all())]
