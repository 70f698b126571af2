"""Model, losses and balancer behind one forward: what the engine wraps, so that a step is one forward, one backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.config import LossConfig
from mtl_dist.objective.balancing import build_balancer
from mtl_dist.objective.losses import TaskSums, build_task_weights, global_losses, labelled, task_sums
from mtl_dist.tasks import Batch, LabelCounts, Outputs


class StepLoss(NamedTuple):
    total: Tensor  # () what backward is called on
    tasks: dict[str, Tensor]  # task -> () loss of the global batch, detached
    present: dict[str, Tensor]  # task -> () bool, whether the global batch has its labels
    weights: Tensor  # (3,) of the tasks' losses in `total`, detached


class ObjectiveModule(nn.Module):
    """`model` with the objective of the whole global batch.

    `passes`: a batch is cut into so many equal parts, each a forward pass with BatchNorm statistics of its own.
    """

    def __init__(self, model: nn.Module, config: LossConfig, counts: LabelCounts, *, passes: int = 1):
        super().__init__()
        self.passes = passes
        self.model = model
        self.balancer = build_balancer(config)
        self.weights = build_task_weights(config, counts)

    def forward(self, batch: Batch, total: TaskSums | None = None, *, parts: int = 1) -> StepLoss:
        """Return the loss of a global step of which this is one of `parts` micro-batches of this rank.

        `batch` is prepared, and on the device. `total`: the sums of the whole step over all ranks where they are known
        (from `sums`, with several micro-batches); else this batch's are added up over the ranks here.
        """
        local = task_sums(self._predict(batch), batch.labels, self.weights)
        total = total if total is not None else local.detached_total()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        losses, present = global_losses(local, total, scale=ranks * parts), labelled(total)
        values = {task: loss.detach() for task, loss in losses.items()}
        weights = self.balancer.weights(values, present).clone()
        return StepLoss(self.balancer(losses, present), values, present, weights)

    @torch.no_grad()
    def sums(self, batch: Batch) -> TaskSums:
        """Return this batch's sums alone, leaving BatchNorm's running statistics as they are."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        kept = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            return task_sums(self._predict(batch), batch.labels, self.weights)
        finally:
            for norm, momentum in zip(norms, kept):
                norm.momentum = momentum

    def _predict(self, batch: Batch) -> Outputs:
        if self.passes == 1:
            return self.model(batch.inputs, batch.valid)
        size = len(batch.inputs) // self.passes
        passes = zip(batch.inputs.split(size), batch.valid.split(size))
        return Outputs(*(torch.cat(parts) for parts in zip(*(self.model(*each) for each in passes))))
