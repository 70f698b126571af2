"""What is learned, and its losses of the whole global batch: exact for any split over ranks and micro-batches.

An `Objective` has terms, each with a loss. It reduces a batch to sums, which add up over micro-batches and ranks. It
computes the losses from the sums of all ranks. So a loss may be a ratio of sums, or no mean over samples at all, as CCC
is; and any labels may be missing anywhere.

The gradient of such a loss needs the sums S of all ranks. Every rank computes dL/dS from them (no gradient flows
through the all-reduce) and backpropagates <dL/dS, own sums>: by the chain rule the gradients of all ranks add up to
that of the one big batch. Since the engine averages gradients over R ranks, each rank's is scaled by R. A term that no
rank has anything to learn from contributes exactly 0, with zero gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.scores import Meter
from mtl_dist.spans import RANKS, span
from mtl_dist.tasks import Batch

Sums = dict[str, Tensor]  # by term


class Objective(Protocol):
    """What is learned: terms, that a balancer weighs."""

    terms: tuple[str, ...]
    fixed: dict[str, float]  # by term: the weight that its loss has before a balancer multiplies it
    after: dict[str, int]  # by term: epochs that are trained without it first; those that are not there: none

    @classmethod
    def build(cls, config: Config, counts: LabelCounts) -> Objective:
        """Build what is configured; `counts` are of the training set."""
        ...

    def begin_epoch(self, epoch: int) -> None:
        """Take note of the epoch that is trained next."""

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Reduce a batch to sums, float64, with gradients to the outputs. They add over any split of a batch."""

    def weight(self, term: str, total: Tensor) -> Tensor:
        """Return how much there is to learn a term from, (); 0: nothing."""

    def loss(self, term: str, total: Tensor) -> Tensor:
        """Return a term's loss (), of its sums over all ranks. Where its weight is 0, nobody reads the value."""

    def taught(self, total: Sums) -> Sums:
        """Return how much of each term is a teacher's, () in [0, 1]; nothing where there is none."""

    def meter(self) -> Meter:
        """Return a new meter, which has seen no batch."""
        ...


def add_sums(mine: Sums | None, other: Sums) -> Sums:
    """Add the sums of two batches; None: of none."""
    return other if mine is None else {term: mine[term] + part for term, part in other.items()}


@span(RANKS)
def total_sums(local: Sums) -> Sums:
    """Add up over all ranks, without gradients. A collective where there are several ranks."""
    flat = torch.cat([part.detach().flatten() for part in local.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.split([part.numel() for part in local.values()])
    return {term: part.view(like.shape) for (term, like), part in zip(local.items(), parts)}


def find_present(objective: Objective, total: Sums) -> dict[str, Tensor]:
    """Return {term: () bool}: whether any rank has something to learn it from."""
    return {term: objective.weight(term, total[term]) > 0 for term in objective.terms}


def global_losses(objective: Objective, local: Sums, total: Sums, *, scale: float) -> dict[str, Tensor]:
    """Return {term: loss}: the value is that of `total`, the gradient this part's share of it, times `scale`.

    `scale` undoes the averages taken later: the number of ranks times the number of micro-batches of a step.
    """
    losses = {}
    for term, is_present in find_present(objective, total).items():
        leaf = total[term].clone().requires_grad_()
        with torch.enable_grad():
            value = objective.loss(term, leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        value, slope = (torch.where(is_present, found, 0.0) for found in (value.detach(), slope))
        share = (slope * local[term]).sum() * scale
        losses[term] = value + share - share.detach()  # the value of the whole, the gradient of the share
    return losses
