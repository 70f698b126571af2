"""From task losses to one scalar. A balancer never calls backward, and gives the same value on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist.config import LossConfig
from mtl_dist.tasks import TASKS


class FixedWeights(nn.Module):
    """Weighted sum of the task losses; those of arXiv 2207.10878 are all 1."""

    def __init__(self, config: LossConfig):
        super().__init__()
        self.weights = {task: config.weight(task) for task in TASKS}

    def forward(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return sum(self.weights[task] * losses[task] for task in TASKS)


class UncertaintyWeights(nn.Module):
    """Learned homoscedastic uncertainty: sum of exp(-s) w loss + s / 2 (Kendall et al. 2018, arXiv 1705.07115).

    A task's term counts only in steps where some rank has its labels: else s would drift down without evidence.
    """

    def __init__(self, config: LossConfig):
        super().__init__()
        self.weights = {task: config.weight(task) for task in TASKS}
        self.log_variance = nn.Parameter(torch.zeros(len(TASKS)))

    def forward(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        terms = []
        for task, s in zip(TASKS, self.log_variance):
            if self.weights[task]:
                terms.append(torch.where(present[task], torch.exp(-s) * self.weights[task] * losses[task] + s / 2, 0.0))
        return torch.stack(terms).sum()


def build_balancer(config: LossConfig) -> nn.Module:
    return {"fixed": FixedWeights, "uncertainty": UncertaintyWeights}[config.balancing](config)
