"""Model, objective and balancer behind one forward: what the engine wraps; a step is one forward, one backward."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.config import Config
from mtl_dist.families import objective_of
from mtl_dist.objective.balancing import build_balancer
from mtl_dist.objective.losses import Objective, Sums, find_present, global_losses, total_sums
from mtl_dist.tasks import Batch, LabelCounts, Outputs


class StepLoss(NamedTuple):
    """The loss of one step, and what it is made of."""

    total: Tensor  # () what backward is called on
    terms: dict[str, Tensor]  # term -> () loss of the global batch, detached
    present: dict[str, Tensor]  # term -> () bool, whether the global batch has something to learn it from
    weights: dict[str, Tensor]  # term -> () its loss's weight in `total`, detached


class ObjectiveModule(nn.Module):
    """`model` with the objective of the whole global batch, and the balancer of the name `balancing`.

    `passes`: a batch is cut into so many equal parts, each a forward pass with BatchNorm statistics of its own.
    """

    def __init__(self, model: nn.Module, objective: Objective, *, balancing: str = "fixed", passes: int = 1):
        super().__init__()
        self.passes = passes
        self.model = model
        self.objective = objective
        self.balancer = build_balancer(balancing, objective.fixed)

    def forward(self, batch: Batch, total: Sums | None = None, *, parts: int = 1) -> StepLoss:
        """Return the loss of a global step of which this is one of `parts` micro-batches of this rank.

        `batch` is prepared, and on the device. `total`: the sums of the whole step over all ranks where they are known
        (from `sums`, with several micro-batches); else this batch's are added up over the ranks here.
        """
        local = self.objective.sums(self._predict(batch), batch)
        total = total if total is not None else total_sums(local)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        losses = global_losses(self.objective, local, total, scale=ranks * parts)
        present = find_present(self.objective, total)
        values = {term: loss.detach() for term, loss in losses.items()}
        weights = self.balancer.weights(values, present).clone()
        return StepLoss(self.balancer(losses, present), values, present, dict(zip(self.objective.terms, weights)))

    @torch.no_grad()
    def sums(self, batch: Batch) -> Sums:
        """Return this batch's sums alone, leaving BatchNorm's running statistics as they are."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        kept = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            return self.objective.sums(self._predict(batch), batch)
        finally:
            for norm, momentum in zip(norms, kept):
                norm.momentum = momentum

    def _predict(self, batch: Batch) -> Any:
        if self.passes == 1:
            return self.model(batch.inputs, batch.valid)
        size = len(batch.inputs) // self.passes
        passes = zip(batch.inputs.split(size), batch.valid.split(size))
        return Outputs(*(torch.cat(parts) for parts in zip(*(self.model(*each) for each in passes))))


def build_objective(config: Config, counts: LabelCounts) -> Objective:
    """Build what the configured model is trained for; `counts` are of the training set."""
    kind = resolve_name(f"mtl_dist.objective.{objective_of(config.model.name).built_by}")
    return kind.build(config, counts)
