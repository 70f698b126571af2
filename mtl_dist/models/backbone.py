"""What a backbone is, and how it is given weights: those of a file, or those trained on ImageNet.

(N, 3, H, W) images normalised as for ImageNet -> (N, num_channels, h, w) features. Ours are in `backbones.py`, those of
torchvision and timm in `libraries.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

logger = logging.getLogger(__name__)

OWN_PREFIX = "backbone."  # of a backbone's tensors in the weights of our models


class Backbone(nn.Sequential):
    """Named children run in order, and the number of channels they end with.

    The library's names of its tensors are those of the state dict after `library_prefix`.
    """

    library_prefix = ""

    def __init__(self, children: Mapping[str, nn.Module], *, num_channels: int):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.num_channels = num_channels
        self.is_frozen = False

    def freeze(self) -> None:
        """Keep all weights and running statistics as they are from now on, also in training; dropout is off."""
        self.is_frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.is_frozen)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download weights trained on ImageNet, by the names of our state dict. Raises `InputError`."""
        raise no_imagenet(type(self))


def no_imagenet(kind: type[Backbone]) -> InputError:
    """What to say of a backbone that has no weights trained on ImageNet."""
    return InputError(
        f"torchvision has no ImageNet weights for {kind.__name__}; take --model.weights none, a FILE or "
        "s3://..., or --model.backbone inception_v3"
    )


def init_convs(module: nn.Module) -> None:
    """Draw the kernels of every `Conv2d` in `module` from He's normal (arXiv 1502.01852) and set their biases to 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def load_backbone_weights(backbone: Backbone, weights_file: Path, *, source: str | None = None) -> list[str]:
    """Load a local state dict file into `backbone`: `.safetensors`, or what `torch.load` reads with `weights_only`.

    The file may hold more than the backbone, as torchvision's classifiers do: entries of other names are left out and
    their names returned (and logged). Of a model of ours (a checkpoint's `model.safetensors`) its backbone is loaded.
    `source` is what messages call the file.

    Raises:
        InputError: no such file, no state dict in it, or an entry missing or of another shape; the message names it.
    """
    source = source or str(weights_file)
    state = _read_state_dict(Path(weights_file), source=source)
    if any(name.startswith(OWN_PREFIX) for name in state):
        state = {name.removeprefix(OWN_PREFIX): t for name, t in state.items() if name.startswith(OWN_PREFIX)}
        source += " (a model of ours)"
    elif backbone.library_prefix:
        state = {backbone.library_prefix + name: tensor for name, tensor in state.items()}
    _check_state_dict(backbone, state, source=source)
    return _copy_state_dict(backbone, state, source=source)


def load_imagenet_weights(backbone: Backbone) -> list[str]:
    """Load weights trained on ImageNet, downloaded into the library's cache at the first use.

    Raises:
        InputError: there are none for this backbone.
        InputError: the download failed; the message says what to do instead.
    """
    state = backbone.imagenet_state()
    _check_state_dict(backbone, state, source="the ImageNet weights")
    return _copy_state_dict(backbone, state, source="the ImageNet weights")


def download_torchvision(weights: WeightsEnum) -> dict[str, Tensor]:
    """Download a state dict of torchvision into torch's hub cache. Raises `InputError`."""
    try:
        return weights.get_state_dict(check_hash=True, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong hash is a RuntimeError
        raise download_failed(weights.url, error) from error


def download_failed(source: str, error: Exception) -> InputError:
    """What to say of ImageNet weights that could not be downloaded."""
    return InputError(
        f"could not download the ImageNet weights {source} ({error}). Give a file: --model.weights FILE or "
        "s3://...; random initialisation must be asked for by name: --model.weights none"
    )


def _read_state_dict(weights_file: Path, *, source: str) -> dict[str, Tensor]:
    if not weights_file.is_file():
        raise InputError(f"no weights file {source}; --model.weights takes a FILE, s3://..., imagenet or none")
    if weights_file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(weights_file)
        except SafetensorError as error:
            raise InputError(f"{source} is no safetensors file, or part of one: {error}") from error
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # half a file, other content, or objects whose loading would run code: of any kind
        raise InputError(  # torch's own words go on for a page, and advise to run what the file holds
            f"{source} holds no state dict of plain tensors ({type(error).__name__}); expected a .safetensors file, or "
            "what torch.save wrote of a state dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source} holds no state dict: expected a dictionary of tensors by name")
    return state


def _check_state_dict(backbone: Backbone, state: dict[str, Tensor], *, source: str) -> None:
    for name, tensor in backbone.state_dict().items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # files written before torch 0.4.1 have none
                continue
            raise InputError(
                f"{source} has no {name!r}, which {type(backbone).__name__} needs; was it made with another "
                "--model.backbone?"
            )
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name!r} has shape {tuple(state[name].shape)}, "
                f"{type(backbone).__name__} needs {tuple(tensor.shape)}; was it made with another --model.backbone or "
                "size of images?"
            )


def _copy_state_dict(backbone: Backbone, state: dict[str, Tensor], *, source: str) -> list[str]:
    own = backbone.state_dict()
    ignored = [name for name in state if name not in own]
    backbone.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    logger.info(
        "%s: %d tensors loaded, %d of other parts ignored (%s)",
        source,
        len(state) - len(ignored),
        len(ignored),
        ", ".join(dict.fromkeys(name.split(".")[0] for name in ignored)) or "none",
    )
    return ignored
