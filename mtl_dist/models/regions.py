"""From features to one embedding for every face region: what systems A and B share.

features (N, C, h, w) -> `SpatialAttention`: maps (N, 17, h, w)
                      -> `RegionEmbeddings`: (N, 17, 16)
                      -> `RegionTransformer`: tokens (N, 17, 16)

A region is an action unit: first the 12 that are scored, in the order of `tasks.AUS`, then five "hidden" ones.
Source: SMM-EmotionNet (Deng 2022, arXiv 2203.12845) and its code; system A (arXiv 2207.10878) builds on it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.models.backbone import init_convs
from mtl_dist.tasks import AUS

HIDDEN_AUS = (5, 9, 14, 16, 17)
NUM_REGIONS = len(AUS) + len(HIDDEN_AUS)  # 17
EMBEDDING_DIM = 16
NUM_ATTENTION_HEADS = 8
FEED_FORWARD_DIM = 1024


class SpatialAttention(nn.Module):
    """One attention map a region: features (N, C, h, w) -> maps (N, 17, h, w) in (0, 1).

    With `prediction_head` it also holds the 1 x 1 convolution of B's code whose predictions no loss reads. It is there
    for B's parameter count, is not run and asks for no gradient, so no optimizer, decay or all-reduce touches it.
    """

    def __init__(self, num_channels: int, *, prediction_head: bool = False):
        super().__init__()
        width = 4 * NUM_REGIONS
        self.maps = nn.Sequential(
            nn.Conv2d(num_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, NUM_REGIONS, 1),
            nn.BatchNorm2d(NUM_REGIONS),
            nn.ReLU(inplace=True),
            nn.Conv2d(NUM_REGIONS, NUM_REGIONS, 1),
            nn.Sigmoid(),
        )
        if prediction_head:
            self.unused_prediction = nn.Conv2d(NUM_REGIONS, NUM_REGIONS, 1).requires_grad_(False)
        init_convs(self)

    def forward(self, features: Tensor) -> Tensor:
        return self.maps(features)


class RegionEmbeddings(nn.Module):
    """Embed every region: features (N, C, h, w) and maps (N, 17, h, w) -> (N, 17, 16).

    Region r is conv3x3(x * map_r + x) -> BN -> ReLU -> conv1x1 -> BN -> ReLU -> mean over h, w -> linear. The 17 run
    side by side as groups of channels: BatchNorm has statistics by channel, so one over 17 * 16 is 17 over 16.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        width = NUM_REGIONS * EMBEDDING_DIM
        self.gated_conv = GatedConv(num_channels)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 1, groups=NUM_REGIONS)
        self.norm2 = nn.BatchNorm2d(width)
        self.linear = RegionLinear(EMBEDDING_DIM, EMBEDDING_DIM)
        init_convs(self)

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.gated_conv(features, maps)))
        hidden = torch.relu(self.norm2(self.conv(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)).unflatten(1, (NUM_REGIONS, EMBEDDING_DIM)))


class GatedConv(nn.Module):
    """3 x 3 convolutions of x * map_r + x for every region r: (N, C, h, w), (N, 17, h, w) -> (N, 17 * 16, h, w).

    The gate is one number for a cell and region, so it can be applied after the sum over channels. One matrix product
    computes what the *ungated* x contributes at every kernel position. The gate then scales 16 * 9 numbers of each
    region and cell, instead of C. `fold` adds the contributions where they belong. It is the arithmetic of 17
    convolutions, but the 17 gated copies of x (362 MB for 24 images of 299 pixels) never exist.

    Forward and backward on two cores, not measured on a GPU: 24 images of 112 pixels took 23 ms, as 17 convolutions
    32 ms, as one with 17 groups 58-120 ms; 8 images of 299 pixels took 78, 110 and 293 ms.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(NUM_REGIONS * EMBEDDING_DIM, num_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(NUM_REGIONS * EMBEDDING_DIM))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        n, c, h, w = features.shape
        # A convolution *gathers* what `fold` *scatters*: the kernel is turned by 180 degrees.
        kernel = self.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, c, 1, 1)  # (17 * 16 * 9, C, 1, 1)
        contributions = F.conv2d(features, kernel).reshape(n, NUM_REGIONS, 9 * EMBEDDING_DIM, h * w)
        contributions = contributions * (1 + maps).reshape(n, NUM_REGIONS, 1, h * w)
        gathered = F.fold(contributions.flatten(1, 2), (h, w), kernel_size=3, padding=1)
        return gathered + self.bias[:, None, None]


class RegionLinear(nn.Module):
    """A linear map of its own for every region: (N, 17, in) -> (N, 17, out)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # nn.Linear's
        self.weight = nn.Parameter(torch.empty(NUM_REGIONS, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(NUM_REGIONS, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.einsum("nri,roi->nro", x, self.weight)
        return projected if self.bias is None else projected + self.bias


class RegionTransformer(nn.Module):
    """Sinusoidal positions and one post-norm encoder layer over the regions: (N, 17, 16) -> (N, 17, 16)."""

    def __init__(self, *, dropout: float):
        super().__init__()
        self.register_buffer("positions", sinusoidal_positions(NUM_REGIONS, EMBEDDING_DIM), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.TransformerEncoderLayer(
            EMBEDDING_DIM, NUM_ATTENTION_HEADS, FEED_FORWARD_DIM, dropout, activation="gelu", batch_first=True
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layer(self.dropout(embeddings + self.positions))


def sinusoidal_positions(num_positions: int, dim: int) -> Tensor:
    """Return the (num_positions, dim) table of arXiv 1706.03762, section 3.5: sines at even, cosines at odd places."""
    frequencies = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
