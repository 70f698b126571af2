"""What a backbone is, and where those trained on ImageNet come from. `foreign.py` loads weights.

(N, 3, H, W) images normalised as for ImageNet -> (N, num_channels, h, w) features. Ours are in `backbones.py`, those of
torchvision and timm in `libraries.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError
from mtl_dist.tasks import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


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
        self.loaded: Any = None  # what it was given weights of: `foreign.Loaded`

    def freeze(self) -> None:
        """Keep all weights and running statistics as they are from now on, also in training; dropout is off."""
        self.is_frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.is_frozen)

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the last map of every resolution from a quarter of the image's on, finest first: (N, C, h, w) each."""
        return last_of_each(self.maps(images), images.shape[-1])

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield what every part makes of images."""
        for part in _parts(self):
            images = part(images)
            yield images

    def learn_inputs(self, mean: Tensor, std: Tensor) -> None:
        """Take in the statistics of the training set's features. Images are normalised before they come here."""

    def class_token(self, images: Tensor) -> Tensor:
        """Return the class token of a transformer, (N, num_channels). Raises `InputError` where there is none."""
        raise InputError(f"{type(self).__name__} has no class token: it has cells alone")

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download weights trained on ImageNet, by the names of our state dict. Raises `InputError`."""
        raise no_imagenet(type(self))


def last_of_each(maps: Iterable[Tensor], size: int) -> tuple[Tensor, ...]:
    """Return the last of maps of every resolution, a quarter, an eighth, ... of `size` pixels; convolutions without
    padding leave a cell or two less."""
    found: dict[int, Tensor] = {}
    for features in maps:
        if features.ndim == 4 and (halved := round(math.log2(size / features.shape[-1]))) >= 2:
            found[halved] = features
    return tuple(found.values())


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is run one after another, of sequences in sequences too."""
    for child in module.children():
        if type(child) is nn.Sequential:
            yield from _parts(child)
        else:
            yield child


class Renormalise(nn.Module):
    """Turn images normalised by ImageNet's statistics into images normalised by `mean` and `std`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        is_mean, is_std, mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std))
        self.register_buffer("scale", is_std / std, persistent=False)
        self.register_buffer("shift", (is_mean - mean) / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


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
