"""An exponential moving average of the weights, evaluated and saved in place of the last ones (`train.ema`)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Averages the parameters of `model` over its steps; buffers are taken as they are.

    Every rank holds the same average. The decay is min(decay, (1 + step) / (10 + step)), so that the first weights do
    not weigh for long; a function of the step alone, there is nothing to save but the average itself.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        for mine, current in zip(self.model.buffers(), model.buffers()):
            mine.copy_(current)
