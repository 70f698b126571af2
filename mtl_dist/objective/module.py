"""Model, objective and balancer behind one forward: what the engine wraps; a step is one forward, one backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.batchnorm import counts_kept, statistics_kept
from mtl_dist.config import Config
from mtl_dist.families import objective_of
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.gradients import (
    Held,
    build_balancer,
    gram_matrix,
    hold_shared,
    term_gradients,
    total_gram,
    trunk_loss,
)
from mtl_dist.objective.losses import Objective, Sums, find_present, global_losses, total_sums
from mtl_dist.tasks import Batch, Outputs


class StepLoss(NamedTuple):
    """The loss of one step, and what it is made of."""

    total: Tensor  # () what backward is called on
    terms: dict[str, Tensor]  # term -> () loss of the global batch, detached
    present: dict[str, Tensor]  # term -> () bool, whether the global batch has something to learn it from
    weights: dict[str, Tensor]  # term -> () its loss's weight in `total`, or its gradient's in the trunk; detached
    sums: Sums  # of the whole step, over all ranks
    gram: Tensor | None = None  # (K, K) products of the losses' gradients by what all terms share, where looked at


class ObjectiveModule(nn.Module):
    """`model` with the objective of the whole global batch, and the balancer of the name `balancing`.

    `passes`: a batch is cut into so many equal parts, each a forward pass with BatchNorm statistics of its own.
    `shared`: the submodule of the model that makes the last tensor that all terms share ("": there is none).
    """

    def __init__(
        self, model: nn.Module, objective: Objective, *, balancing: str = "fixed", passes: int = 1, shared: str = ""
    ):
        super().__init__()
        self.passes, self.shared = passes, shared
        self.model = model
        self.objective = objective
        self.balancer = build_balancer(balancing, objective.fixed)
        self.compiled: Callable | None = None  # what runs in the model's place where nothing looks inside

    def forward(
        self,
        batch: Batch,
        total: Sums | None = None,
        gram: Tensor | None = None,
        *,
        parts: int = 1,
        looks_at_gradients: bool = False,
    ) -> StepLoss:
        """Return the loss of a global step of which this is one of `parts` micro-batches of this rank.

        `batch` is prepared, and on the device. `total`: the sums of the whole step over all ranks where they are known
        (from `sums`, with several micro-batches); else this batch's are added up over the ranks here. `gram` likewise.
        """
        looks = self.looks_at_gradients(looks_at_gradients)
        with self._holding_shared() if looks else contextlib.nullcontext([]) as held:
            local = self.objective.sums(self._predict(batch, looks=looks), batch)
        total = total if total is not None else total_sums(local)
        losses = global_losses(self.objective, local, total, scale=_num_ranks() * parts)
        present = find_present(self.objective, total)
        values = {term: loss.detach() for term, loss in losses.items()}
        weights = self.balancer.weights(values, present).clone()
        minimised = self.balancer(losses, present)
        if looks:
            gradients = term_gradients(losses, held)
            gram = gram if gram is not None else total_gram(self._gram(gradients, total, parts))
        if self.balancer.reads_gradients:
            weights *= self.balancer.shares(gram, present)
            minimised = minimised + trunk_loss(held, gradients, weights)
        told = gram if looks_at_gradients else None
        return StepLoss(minimised, values, present, dict(zip(self.objective.terms, weights)), total, told)

    def looks_at_gradients(self, wanted: bool) -> bool:
        """Whether a step's gradients are looked at: where the balancer reads them, or where it is wanted and can be.

        Passes of their own rows for each task have nothing to compare.
        """
        return self.balancer.reads_gradients or (wanted and bool(self.shared) and self.passes == 1)

    @torch.no_grad()
    def sums(self, batch: Batch) -> Sums:
        """Return this batch's sums alone, leaving BatchNorm's running statistics as they are."""
        with statistics_kept(self.model):
            return self.objective.sums(self._predict(batch), batch)

    def gram(self, batch: Batch, total: Sums, *, parts: int) -> Tensor:
        """Return this batch's part (K, K) of the Gram matrix of a step with these sums, as `sums` does."""
        with statistics_kept(self.model), counts_kept(self.model), self._holding_shared() as held:
            local = self.objective.sums(self._predict(batch, looks=True), batch)
        losses = global_losses(self.objective, local, total, scale=_num_ranks() * parts)
        return self._gram(term_gradients(losses, held), total, parts)

    def _gram(self, gradients: Sequence[Sequence[Tensor]], total: Sums, parts: int) -> Tensor:
        return gram_matrix(gradients, next(iter(total.values())), scale=_num_ranks() * parts)

    def _holding_shared(self) -> contextlib.AbstractContextManager[list[Held]]:
        return hold_shared(self.model, self.shared, cut=self.balancer.reads_gradients)

    def _predict(self, batch: Batch, *, looks: bool = False) -> Any:
        model = self.model if looks or not self.compiled else self.compiled
        if self.passes == 1:
            return model(batch.inputs, batch.valid)
        size = len(batch.inputs) // self.passes
        passes = zip(batch.inputs.split(size), batch.valid.split(size))
        return Outputs(*(torch.cat(parts) for parts in zip(*(model(*each) for each in passes))))


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def build_objective(config: Config, counts: LabelCounts) -> Objective:
    """Build what the configured model is trained for; `counts` are of the training set."""
    kind = resolve_name(f"mtl_dist.objective.{objective_of(config.model.name).built_by}")
    return kind.build(config, counts)
