"""Task losses of the whole global batch, exact for any split over ranks and micro-batches and any missing labels.

The batch is first reduced to sums (`TaskSums`), which simply add over micro-batches and ranks:

    EXPR, AU   loss = sum over labelled entries of all ranks / their weight over all ranks
    VA         loss = 1 - (CCC_V + CCC_A) / 2, CCC from the moments (n, Sx, Sy, Sxx, Syy, Sxy) of all ranks

CCC is no mean of samples, so its gradient needs the global moments M. Every rank computes dL/dM from the summed
moments (no gradient flows through the all-reduce) and backpropagates <dL/dM, own moments>: by the chain rule the
gradients of all ranks add up to that of the one big batch. Since the engine averages gradients over R ranks, each
rank's term is scaled by R. A task without a label on any rank contributes exactly 0, with zero gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtl_dist.config import LossConfig
from mtl_dist.tasks import TASKS, LabelCounts, Labels, Outputs

MAX_CLASS_WEIGHT = 20.0
CCC_EPS = 1e-8  # variance below which neither predictions nor labels vary: no concordance to speak of


class TaskSums(NamedTuple):
    """Additive sums of a batch, float64: what the losses of any union of batches are computed from."""

    va: Tensor  # (2, 6): n, sum x, sum y, sum xx, sum yy, sum xy; x predicted, y labelled; valence, arousal
    expr: Tensor  # (2,): sum of weighted cross entropies, sum of the weights
    au: Tensor  # (2,): sum of binary cross entropies, number of labelled entries

    def detached_total(self) -> TaskSums:
        """Add up over all ranks, without gradients. A collective where there are several ranks."""
        flat = torch.cat([part.detach().flatten() for part in self])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        va, expr, au = flat.split([12, 2, 2])
        return TaskSums(va.view(2, 6), expr, au)

    def plus(self, other: TaskSums) -> TaskSums:
        return TaskSums(*(mine + theirs for mine, theirs in zip(self, other)))


class TaskWeights(NamedTuple):
    """Class weights inside the task losses; empty tensors mean none."""

    expr: Tensor  # (8,) or (0,), float64
    au: Tensor  # (12,) pos_weight or (0,), float64
    label_smoothing: float


def build_task_weights(config: LossConfig, counts: LabelCounts) -> TaskWeights:
    """Compute class weights from the label counts of the training index.

    EXPR: rows / (8 * class), of mean 1 over the data, 0 for a class that does not occur. AU: negatives / positives.
    None is less than 1/20 or more than 20: a unit that is always on has a gradient, and a rare one is no noise alone.
    """
    expr = au = torch.zeros(0)
    if config.expr_weights == "balanced":
        classes = torch.tensor(counts.expr_classes, dtype=torch.float64)
        present = (classes > 0).sum()
        weights = (classes.sum() / (present * classes).clamp_min(1)).clamp(1 / MAX_CLASS_WEIGHT, MAX_CLASS_WEIGHT)
        expr = torch.where(classes > 0, weights, 0.0)
    if config.au_weights == "balanced":
        positives, labelled = (torch.tensor(n, dtype=torch.float64) for n in (counts.au_positives, counts.au))
        au = ((labelled - positives) / positives.clamp_min(1)).clamp(1 / MAX_CLASS_WEIGHT, MAX_CLASS_WEIGHT)
    return TaskWeights(expr, au, config.label_smoothing)


def task_sums(outputs: Outputs, labels: Labels, weights: TaskWeights) -> TaskSums:
    """Reduce predictions (B, T, ...) and labels to `TaskSums`, with gradients to the predictions."""
    return TaskSums(
        _moments(outputs.va, labels.va, labels.va_mask),
        _expr_sums(outputs, labels, weights),
        _au_sums(outputs, labels, weights),
    )


def global_losses(local: TaskSums, total: TaskSums, *, scale: float) -> dict[str, Tensor]:
    """Return {task: loss}: the value is that of `total`, the gradient this part's share of it, times `scale`.

    `scale` undoes the averages taken later: the number of ranks times the number of micro-batches of a step.
    """
    losses = {}
    for name, part, whole in zip(TASKS, local, total):
        leaf = whole.clone().requires_grad_()
        with torch.enable_grad():
            value = _loss_of(name, leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        share = (slope * part).sum() * scale
        losses[name] = value.detach() + share - share.detach()  # the value of the whole, the gradient of the share
    return losses


def concordance(moments: Tensor) -> Tensor:
    """CCC (...,) of moments (..., 6): 2 cov / (var + var + (mean difference)^2), population moments (Lin 1989)."""
    n, sx, sy, sxx, syy, sxy = moments.unbind(-1)
    n = n.clamp_min(1)
    mean_x, mean_y = sx / n, sy / n
    spread = (sxx / n - mean_x**2) + (syy / n - mean_y**2) + (mean_x - mean_y) ** 2
    return 2 * (sxy / n - mean_x * mean_y) / (spread + CCC_EPS)


def labelled(total: TaskSums) -> dict[str, Tensor]:
    """Return {task: bool tensor}: whether any rank has a label of the task."""
    return {"va": total.va[0, 0] > 0, "expr": total.expr[1] > 0, "au": total.au[1] > 0}


def _loss_of(task: str, whole: Tensor) -> Tensor:
    if task == "va":
        value = 1 - concordance(whole).mean()
        return torch.where(whole[0, 0] > 0, value, 0.0 * value)
    return whole[0] / torch.where(whole[1] > 0, whole[1], 1.0).detach()


def _moments(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(2, 6) moments over the entries where mask (B, T) is True."""
    keep = mask.unsqueeze(-1).double()
    # where, not a product: a prediction that is not finite where nothing is labelled must not poison the sum.
    x = torch.where(mask.unsqueeze(-1), predicted.double(), 0.0)
    y = target.double() * keep
    terms = (keep.expand_as(y), x, y, x * x, y * y, x * y)
    return torch.stack([term.sum((0, 1)) for term in terms], dim=-1)


def _expr_sums(outputs: Outputs, labels: Labels, weights: TaskWeights) -> Tensor:
    logits = _at_least_float32(outputs.expr_logits.flatten(0, 1))
    target, mask = labels.expr.flatten(), labels.expr_mask.flatten()
    class_weights = weights.expr.to(logits) if len(weights.expr) else None
    loss = F.cross_entropy(
        logits, target, weight=class_weights, reduction="none", label_smoothing=weights.label_smoothing
    )
    weight = torch.ones_like(loss) if class_weights is None else class_weights[target]
    return torch.stack([torch.where(mask, loss, 0.0).double().sum(), torch.where(mask, weight, 0.0).double().sum()])


def _au_sums(outputs: Outputs, labels: Labels, weights: TaskWeights) -> Tensor:
    logits = _at_least_float32(outputs.au_logits)
    pos_weight = weights.au.to(logits) if len(weights.au) else None
    loss = F.binary_cross_entropy_with_logits(logits, labels.au.to(logits), pos_weight=pos_weight, reduction="none")
    return torch.stack([torch.where(labels.au_mask, loss, 0.0).double().sum(), labels.au_mask.double().sum()])


def _at_least_float32(logits: Tensor) -> Tensor:
    """Undo autocast: a loss in bfloat16 has three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
