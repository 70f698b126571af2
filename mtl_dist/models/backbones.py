"""Convolutional backbones: (N, 3, H, W) normalised images -> (N, num_channels, h, w) features, and their weights.

`inception_v3` is what systems A and B were published with; `small` is for laptops, CI and the demo.
Both want H, W >= 75. Initial weights are drawn from torch's global generator.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.inception import Inception3, Inception_V3_Weights

from mtl_dist.errors import InputError

logger = logging.getLogger(__name__)

INCEPTION_LAST = "Mixed_6e"
SMALL_STEM_CHANNELS = 16
SMALL_STAGE_CHANNELS = (48, 96, 192)


class Backbone(nn.Sequential):
    """Named children run in order, and the number of channels they end with."""

    def __init__(self, children: Mapping[str, nn.Module], *, num_channels: int):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.num_channels = num_channels
        init_convs(self)


class InceptionV3(Backbone):
    """torchvision's InceptionV3 (arXiv 1512.00567) through `Mixed_6e`, without `AuxLogits` and `transform_input`.

    768 channels, 8,965,856 parameters; 17 x 17 cells for images of 299 pixels, 12 x 12 for 224, 5 x 5 for 112.
    The names in its state dict are torchvision's.
    """

    def __init__(self):
        # torchvision's initialisation (truncated normals for all 27 M parameters) would be thrown away below.
        children = dict(Inception3(aux_logits=False, init_weights=False).named_children())
        names = list(children)
        names = names[: names.index(INCEPTION_LAST) + 1]
        super().__init__({name: children[name] for name in names}, num_channels=768)


class SmallResNet(Backbone):
    """A residual network (arXiv 1512.03385) of three blocks that trains from scratch on a laptop.

    192 channels, 676,016 parameters, one cell for 16 x 16 pixels: 6 x 6 for images of 96 pixels.
    """

    def __init__(self):
        stem = nn.Sequential(
            nn.Conv2d(3, SMALL_STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(SMALL_STEM_CHANNELS),
            nn.ReLU(inplace=True),
        )
        widths = (SMALL_STEM_CHANNELS, *SMALL_STAGE_CHANNELS)
        stages = {f"stage{i}": ResidualBlock(widths[i - 1], widths[i]) for i in range(1, len(widths))}
        super().__init__({"stem": stem, **stages}, num_channels=widths[-1])


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a projection around them: (N, in, H, W) -> (N, out, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


BACKBONES: dict[str, type[Backbone]] = {"inception_v3": InceptionV3, "small": SmallResNet}


def build_backbone(name: str) -> Backbone:
    """Build a backbone by name, with random weights.

    Raises:
        InputError: the name is unknown.
    """
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name]()


def init_convs(module: nn.Module) -> None:
    """Draw the kernels of every `Conv2d` in `module` from He's normal (arXiv 1502.01852) and set their biases to 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def load_backbone_weights(backbone: Backbone, weights_file: Path) -> list[str]:
    """Load a local state dict file into `backbone`: `.safetensors`, or what `torch.load` reads with `weights_only`.

    The file may hold more than the backbone, as torchvision's classifiers do: entries of other names are left out and
    their names returned (and logged).

    Raises:
        InputError: no such file, no state dict in it, or an entry missing or of another shape; the message names it.
    """
    state = _read_state_dict(Path(weights_file))
    _check_state_dict(backbone, state, source=str(weights_file))
    return _copy_state_dict(backbone, state, source=str(weights_file))


def load_imagenet_weights(backbone: Backbone) -> list[str]:
    """Load torchvision's ImageNet weights, downloaded (104 MB) into torch's hub cache at the first use.

    Torchvision uses them with `transform_input`, which system B leaves out [code]; so do we.

    Raises:
        InputError: torchvision has no weights for this backbone.
        InputError: the download failed; the message says what to do instead.
    """
    if not isinstance(backbone, InceptionV3):
        raise InputError(
            f"torchvision has no ImageNet weights for {type(backbone).__name__}; take --model.weights none, a FILE or "
            "s3://..., or --model.backbone inception_v3"
        )
    weights = Inception_V3_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(check_hash=True, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong hash is a RuntimeError
        raise InputError(
            f"could not download the ImageNet weights {weights.url} ({error}). Give a file: --model.weights FILE or "
            "s3://...; random initialisation must be asked for by name: --model.weights none"
        ) from error
    return _copy_state_dict(backbone, state, source=weights.url)


def _read_state_dict(weights_file: Path) -> dict[str, Tensor]:
    if not weights_file.is_file():
        raise InputError(f"no weights file {weights_file}; --model.weights takes a FILE, s3://..., imagenet or none")
    if weights_file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(weights_file)
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:  # other content, or objects whose loading would run code
        raise InputError(f"{weights_file} holds no state dict of plain tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{weights_file} holds no state dict: expected a dictionary of tensors by name")
    return state


def _check_state_dict(backbone: Backbone, state: dict[str, Tensor], *, source: str) -> None:
    for name, tensor in backbone.state_dict().items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # files written before torch 0.4.1 have none
                continue
            raise InputError(f"{source} has no {name!r}, which {type(backbone).__name__} needs")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name!r} has shape {tuple(state[name].shape)}, "
                f"{type(backbone).__name__} needs {tuple(tensor.shape)}"
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
