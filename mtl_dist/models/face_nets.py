"""Networks that know faces, IResNet and DenseFace, and DenseNet-121, with the names that their published weights have.

Where a class begins with `renormalise`, its weights were trained on images of other statistics than ImageNet's.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.models.backbone import Backbone, Renormalise, download_torchvision, init_convs
from mtl_dist.tasks import GREY

HALF = (0.5, 0.5, 0.5)  # mean and deviation of images in [-1, 1]
STAGES = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}


class IResNet(Backbone):
    """The residual network of ArcFace (Deng et al. 2019, arXiv 1801.07698) as insightface has it, to its last norm.

    512 channels, one cell for 16 x 16 pixels: 7 x 7 for images of 112 pixels. 11,179,008 parameters with 18 layers,
    21,292,736 with 34, 30,744,256 with 50, 52,309,568 with 100.
    """

    def __init__(self, blocks: tuple[int, int, int, int]):
        widths = (64, 64, 128, 256, 512)
        stages = {
            f"layer{stage}": nn.Sequential(
                *(
                    IBlock(widths[stage - 1] if place == 0 else widths[stage], widths[stage], stride=1 + (place == 0))
                    for place in range(count)
                )
            )
            for stage, count in enumerate(blocks, 1)
        }
        children = {
            "renormalise": Renormalise(HALF, HALF),
            "conv1": nn.Conv2d(3, 64, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(64),
            "prelu": nn.PReLU(64),
            **stages,
            "bn2": nn.BatchNorm2d(512),
        }
        super().__init__(children, num_channels=512)
        for child in self.modules():
            if isinstance(child, nn.Conv2d):
                nn.init.normal_(child.weight, std=0.1)


class Embedding(nn.Module):
    """What ArcFace has behind an IResNet: its cells (N, 512, 7, 7), of images of 112 pixels, as a vector (N, 512)."""

    def __init__(self, *, cells: int = 7):
        super().__init__()
        self.cells = cells
        self.fc = nn.Linear(512 * cells**2, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, cells: Tensor) -> Tensor:
        return self.features(self.fc(cells.flatten(1)))


class IBlock(nn.Module):
    """BN, convolution, BN, PReLU, convolution, BN, and a shortcut; nothing after their sum."""

    def __init__(self, in_channels: int, channels: int, *, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class DenseNet121(Backbone):
    """torchvision's DenseNet-121 (Huang et al. 2017, arXiv 1608.06993) without its classifier.

    1,024 channels, 6,953,856 parameters, one cell for 32 x 32 pixels: 3 x 3 for images of 112 pixels.
    """

    def __init__(self):
        from torchvision.models import densenet121

        super().__init__({"features": densenet121(weights=None).features, "relu": nn.ReLU()}, num_channels=1024)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Download torchvision's (31 MB)."""
        from torchvision.models import DenseNet121_Weights

        return download_torchvision(DenseNet121_Weights.IMAGENET1K_V1)


class DenseFace(Backbone):
    """DenseFace (Zhang et al. 2022, arXiv 2207.09373): a DenseNet of 100 layers of grey images, growing by 12.

    342 channels, 765,300 parameters, one cell for 8 x 8 pixels; trained on images of 64 pixels. Its released weights
    have names and shapes alone: that the first convolution is the one of stride 2, and that pixels are in [-1, 1], is
    our reading.
    """

    def __init__(self, *, growth: int = 12, layers: int = 16):
        channels, parts = 2 * growth, OrderedDict()
        parts["conv0"] = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False)
        for block in (1, 2, 3):
            parts[f"denseblock{block}"] = nn.Sequential(
                OrderedDict(
                    (f"denselayer{layer + 1}", DenseLayer(channels + layer * growth, growth)) for layer in range(layers)
                )
            )
            channels += layers * growth
            if block < 3:
                parts[f"transition{block}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        parts["norm3"] = nn.BatchNorm2d(channels)
        children = {"renormalise": Renormalise(HALF, HALF), "grey": Grey()}
        super().__init__(children | {"features": nn.Sequential(parts), "relu": nn.ReLU()}, num_channels=channels)
        init_convs(self)


class DenseLayer(nn.Module):
    """What a layer adds to all that came before it: (N, C, h, w) -> (N, C + growth, h, w)."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class Grey(nn.Module):
    """(N, 3, H, W) -> (N, 1, H, W)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shares", torch.tensor(GREY)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.shares).sum(1, keepdim=True)
