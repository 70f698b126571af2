"""Backbones: (N, 3, H, W) images normalised as for ImageNet -> (N, num_channels, h, w) features; their weights.

`inception_v3` is what systems A and B were published with, `vgg16` what the baseline is; `small` and `vgg_small` stand
for them on laptops, in CI and in the demo. `torchvision:NAME` and `timm:NAME` are in `libraries.py`.
Initial weights are drawn from torch's global generator.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError, nearest

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

# torchvision is imported by what needs it: that takes a second, at every start of every rank.

logger = logging.getLogger(__name__)

INCEPTION_LAST = "Mixed_6e"
SMALL_STEM_CHANNELS = 16
SMALL_STAGE_CHANNELS = (48, 96, 192)
# Widths of the convolutions of VGG (arXiv 1409.1556, configuration D), "M" is a max-pool. The fifth pool is the
# baseline's: for the attention of the other models a cell stays 16 x 16 pixels.
VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
VGG_SMALL_WIDTHS = (16, "M", 32, "M", 64, "M", 96, "M", 96)
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
        return super().train(mode and not self.is_frozen)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download weights trained on ImageNet, by the names of our state dict. Raises `InputError`."""
        raise _no_imagenet(type(self))


class InceptionV3(Backbone):
    """torchvision's InceptionV3 (arXiv 1512.00567) through `Mixed_6e`, without `AuxLogits` and `transform_input`.

    768 channels, 8,965,856 parameters; 17 x 17 cells for images of 299 pixels, 12 x 12 for 224, 5 x 5 for 112.
    The names in its state dict are torchvision's.
    """

    def __init__(self):
        from torchvision.models.inception import Inception3

        # torchvision's initialisation (truncated normals for all 27 M parameters) would be thrown away below.
        children = dict(Inception3(aux_logits=False, init_weights=False).named_children())
        names = list(children)
        names = names[: names.index(INCEPTION_LAST) + 1]
        super().__init__({name: children[name] for name in names}, num_channels=768)
        init_convs(self)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download torchvision's (104 MB). It uses them with `transform_input`, which system B leaves out; so do we."""
        from torchvision.models import Inception_V3_Weights

        return download_torchvision(Inception_V3_Weights.IMAGENET1K_V1)


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
        init_convs(self)


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


class VGG16(Backbone):
    """torchvision's VGG16 (arXiv 1409.1556) up to its fifth max-pool, which is the baseline's.

    512 channels, 14,714,688 parameters, one cell for 16 x 16 pixels. The names in its state dict are torchvision's.
    """

    def __init__(self):
        from torchvision.models.vgg import make_layers

        super().__init__({"features": make_layers(list(VGG16_WIDTHS))}, num_channels=VGG16_WIDTHS[-1])
        init_convs(self)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download torchvision's (528 MB)."""
        from torchvision.models import VGG16_Weights

        return download_torchvision(VGG16_Weights.IMAGENET1K_V1)


class VGGSmall(Backbone):
    """VGG's plan with one narrow convolution a stage and BatchNorm, so that it trains from scratch on a laptop.

    96 channels, 162,624 parameters, one cell for 16 x 16 pixels.
    """

    def __init__(self):
        from torchvision.models.vgg import make_layers

        layers = make_layers(list(VGG_SMALL_WIDTHS), batch_norm=True)
        super().__init__({"features": layers}, num_channels=VGG_SMALL_WIDTHS[-1])
        init_convs(self)


BACKBONES: dict[str, type[Backbone]] = {
    "inception_v3": InceptionV3,
    "small": SmallResNet,
    "vgg16": VGG16,
    "vgg_small": VGGSmall,
}


def build_backbone(name: str, input_size: int | None = None) -> Backbone:
    """Build a backbone by name, with random weights, for images of `input_size` pixels a side.

    Those of libraries need the size; ours take images of any.

    Raises:
        InputError: the name is unknown, or the backbone has no features for images of that size.
    """
    library, colon, variant = name.partition(":")
    if colon:
        from mtl_dist.models.libraries import build_library_backbone  # importing timm takes seconds

        return build_library_backbone(library, variant, input_size=input_size)
    return _backbone_class(name)()


def check_backbone(name: str, *, imagenet: bool) -> None:
    """Raise `InputError` for an unknown backbone, or one without the ImageNet weights asked for. Builds nothing."""
    library, colon, variant = name.partition(":")
    if colon:
        from mtl_dist.models.libraries import check_library_backbone

        check_library_backbone(library, variant, imagenet=imagenet)
        return
    kind = _backbone_class(name)
    if imagenet and kind.imagenet_state is Backbone.imagenet_state:
        raise _no_imagenet(kind)


def _backbone_class(name: str) -> type[Backbone]:
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}: {nearest(name, BACKBONES)}, or torchvision:NAME, timm:NAME")
    return BACKBONES[name]


def _no_imagenet(kind: type[Backbone]) -> InputError:
    return InputError(
        f"torchvision has no ImageNet weights for {kind.__name__}; take --model.weights none, a FILE or "
        "s3://..., or --model.backbone inception_v3"
    )


def flat_frames(inputs: Tensor) -> Tensor:
    """Give backbones what they read: the frames of (B, T, 3, H, W) images one after another, (B * T, 3, H, W)."""
    # Channels last is 10-25% faster on a CPU and what tensor cores read. It spreads from the images through every
    # layer, so parameters stay contiguous, as DeepSpeed's flat buffers and safetensors want them.
    return inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last)


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
