"""Averages: of the weights over steps (`train.ema`), of BatchNorm's running statistics over ranks."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import Config


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


def freeze_batchnorm(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


@torch.no_grad()
def average_batchnorm(model: nn.Module, config: Config) -> None:
    """Make BatchNorm's running statistics the mean over ranks: rank 0's are saved, and each evaluates with its own."""
    if dist.get_world_size() == 1 or config.engine.batchnorm != "local":
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    flat = torch.cat(buffers)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([len(buffer) for buffer in buffers])):
        buffer.copy_(mean)
