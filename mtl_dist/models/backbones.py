"""Backbones by name, and our networks among them; `torchvision:NAME` and `timm:NAME` are in `libraries.py`.

`inception_v3` is what systems A and B were published with, `vgg16` what the baseline is; `small` and `vgg_small` stand
for them on laptops, in CI and in the demo. Initial weights are drawn from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError, nearest
from mtl_dist.families import FEATURES, OWN_BACKBONES
from mtl_dist.models.backbone import Backbone, download_torchvision, init_convs, no_imagenet
from mtl_dist.models.face_nets import STAGES, DenseFace, DenseNet121, IResNet

# torchvision is imported by what needs it: that takes a second, at every start of every rank.

INCEPTION_LAST = "Mixed_6e"
SMALL_STEM_CHANNELS = 16
SMALL_STAGE_CHANNELS = (48, 96, 192)
# Widths of the convolutions of VGG (arXiv 1409.1556, configuration D), "M" is a max-pool. The fifth pool is the
# baseline's: for the attention of the other models a cell stays 16 x 16 pixels.
VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
VGG_SMALL_WIDTHS = (16, "M", 32, "M", 64, "M", 96, "M", 96)


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


class Features(Backbone):
    """No network: rows of sets of features, side by side, standardised: (..., D) -> (..., D), D the sum of `dims`.

    Mean and deviation are those of the training set; they go with the weights into checkpoints and exports.
    """

    def __init__(self, dims: Sequence[int] = ()):
        if not dims:
            raise InputError(
                f"model.sequence.dims is empty, and model.backbone {FEATURES} reads rows of so many numbers: training "
                "fills it in from data.train; give the widths of the sets where a model is built without one"
            )
        super().__init__({"standardise": Standardise(sum(dims))}, num_channels=sum(dims))

    def learn_inputs(self, mean: Tensor, std: Tensor) -> None:
        """Standardise by these (D,) from now on. What is constant in the training set is not scaled."""
        if mean.shape != (self.num_channels,) or std.shape != mean.shape:
            raise InputError(
                f"features of {len(mean)} numbers a row, and the model is built for {self.num_channels} "
                "(model.sequence.dims); give the feature sets that it was trained on"
            )
        self.standardise.mean.copy_(mean)
        self.standardise.std.copy_(torch.where(std > 0, std, 1.0))


class Standardise(nn.Module):
    """(..., D) -> (..., D), of mean 0 and deviation 1 where the inputs have what it was told."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


VITS = [name for name, about in OWN_BACKBONES.items() if about.patch]  # in vit.py, which imports timm
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "inception_v3": InceptionV3,
    "densenet121": DenseNet121,
    "denseface": DenseFace,
    **{name: partial(IResNet, blocks) for name, blocks in STAGES.items()},
    "small": SmallResNet,
    "vgg16": VGG16,
    "vgg_small": VGGSmall,
    FEATURES: Features,
}


def build_backbone(
    name: str, input_size: int | None = None, *, drop_path: float = 0.0, dims: Sequence[int] = ()
) -> Backbone:
    """Build a backbone by name, with random weights, for images of `input_size` pixels a side.

    Those of libraries and ViTs need the size; the others take images of any. `drop_path` is for ViTs and timm's,
    `dims`, the widths of the sets, for features.

    Raises:
        InputError: the name is unknown, or the backbone has no features for images of that size.
    """
    library, colon, variant = name.partition(":")
    if colon:
        from mtl_dist.models.libraries import build_library_backbone  # importing timm takes seconds

        return build_library_backbone(library, variant, input_size=input_size, drop_path=drop_path)
    if name in VITS:
        from mtl_dist.models.vit import ViT

        if input_size is None:
            raise InputError(f"backbone {name} is built for one size of images; give model.image_size")
        return ViT(name, input_size, drop_path=drop_path)
    return Features(dims) if name == FEATURES else _backbone_class(name)()


def check_backbone(name: str, *, imagenet: bool) -> None:
    """Raise `InputError` for an unknown backbone, or one without the ImageNet weights asked for. Builds nothing."""
    library, colon, variant = name.partition(":")
    if colon:
        from mtl_dist.models.libraries import check_library_backbone

        check_library_backbone(library, variant, imagenet=imagenet)
        return
    if name in VITS and not imagenet:
        return
    kind = Backbone if name in VITS else _backbone_class(name)
    kind = getattr(kind, "func", kind)  # of a class with its sizes
    if imagenet and kind.imagenet_state is Backbone.imagenet_state:
        raise no_imagenet(kind)


def _backbone_class(name: str) -> Callable[[], Backbone]:
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}: {nearest(name, BACKBONES)}, or torchvision:NAME, timm:NAME")
    return BACKBONES[name]
