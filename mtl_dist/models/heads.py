"""From region vectors to predictions. N frames, R regions, D numbers a region."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_dist.tasks import NUM_AUS


class AUHead(nn.Module):
    """One linear classifier an action unit, read from its own region: (N, R >= 12, D) -> logits (N, 12).

    Region i of the first 12 is action unit i of `tasks.AUS` (arXiv 2203.12845, 2207.10878).
    """

    def __init__(self, dim: int):
        super().__init__()
        bound = 1 / math.sqrt(dim)  # nn.Linear's
        self.weight = nn.Parameter(torch.empty(NUM_AUS, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(NUM_AUS))

    def forward(self, regions: Tensor) -> Tensor:
        return (regions[:, :NUM_AUS] * self.weight).sum(-1) + self.bias


class RegionMeanHead(nn.Module):
    """Fully connected layers applied to every region, then the mean over regions: (N, R, D) -> (N, out).

    `widths` is (D, hidden..., out), ReLU between the layers; (D, out) is linear.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        linears = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
        for linear in linears[:-1]:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers = [layer for linear in linears for layer in (linear, nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, regions: Tensor) -> Tensor:
        return self.layers(regions).mean(dim=1)
