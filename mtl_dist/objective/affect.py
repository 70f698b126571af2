"""What is learned of faces: valence and arousal, expressions, action units. Their losses, and how they are scored.

EXPR, AU   loss = sum over labelled entries of all ranks / their weight over all ranks; an entry's is its cross entropy,
           which `expr_focal`, `expr_prior`, `au_gamma_pos`, `au_gamma_neg` and `au_margin` change
VA         loss = `va_ccc` x (1 - (CCC_V + CCC_A) / 2), CCC from the moments (n, Sx, Sy, Sxx, Syy, Sxy) of all ranks;
           and `va_mse` times the mean square error, from the same
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.constants import Constant
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.losses import Sums
from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, metric_sums
from mtl_dist.objective.scores import constant_scores, scores
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, TASKS, Batch, Labels, Outputs

MAX_CLASS_WEIGHT = 20.0
CCC_EPS = 1e-8  # variance below which neither predictions nor labels vary: no concordance to speak of


class ClassWeights(NamedTuple):
    """Weights of classes inside the losses; empty tensors mean none."""

    expr: Tensor  # (8,) or (0,), float64
    au: Tensor  # (12,) pos_weight or (0,), float64


class Affect:
    """The objective (`losses.Objective`) of the three tasks; sums are

    va (2, 6): n, sum x, sum y, sum xx, sum yy, sum xy; x predicted, y labelled; valence, arousal
    expr (2,): sum of weighted cross entropies, sum of the weights
    au (2,): sum of binary cross entropies, number of labelled entries
    """

    terms = TASKS

    @classmethod
    def build(cls, config: Config, counts: LabelCounts) -> Affect:
        return cls(config.loss, counts)

    def __init__(self, config: LossConfig, counts: LabelCounts):
        self.fixed = {task: config.weight(task) for task in TASKS}
        self.va_ccc, self.va_mse, self.after = config.va_ccc, config.va_mse, {"va": config.va_after}
        self.classes, self.label_smoothing = build_class_weights(config, counts), config.label_smoothing
        self.expr_focal, log_prior = config.expr_focal, build_log_prior(config, counts)
        # None where there is none.
        self._expr_weights, self._au_weights, self._log_prior = (
            Constant(values) if len(values) else None for values in (*self.classes, log_prior)
        )
        self.au_gammas, self.au_margin = (config.au_gamma_pos, config.au_gamma_neg), config.au_margin

    def begin_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    def sums(self, outputs: Outputs, batch: Batch) -> Sums:
        labels = batch.labels
        return {
            "va": _moments(outputs.va, labels.va, labels.va_mask),
            "expr": self._expr_sums(outputs, labels),
            "au": self._au_sums(outputs, labels),
        }

    def weight(self, term: str, total: Tensor) -> Tensor:
        return total[0, 0] if term == "va" else total[1]

    def loss(self, term: str, total: Tensor) -> Tensor:
        if term != "va":
            return total[0] / total[1].detach()
        loss = self.va_ccc * (1 - concordance(total).mean())
        return loss + self.va_mse * mean_square_error(total).mean() if self.va_mse else loss

    def taught(self, total: Sums) -> Sums:
        return {}

    def meter(self) -> AffectMeter:
        return AffectMeter()

    def _expr_sums(self, outputs: Outputs, labels: Labels) -> Tensor:
        logits = at_least_float32(outputs.expr_logits.flatten(0, 1))
        target, mask = labels.expr.flatten(), labels.expr_mask.flatten()
        classes = self._expr_weights.like(logits) if self._expr_weights else None
        logits = logits + self._log_prior.like(logits) if self._log_prior else logits
        loss = F.cross_entropy(logits, target, weight=classes, reduction="none", label_smoothing=self.label_smoothing)
        if self.expr_focal:
            loss = loss * _power(1 - logits.softmax(-1).gather(-1, target[:, None])[:, 0], self.expr_focal)
        weight = torch.ones_like(loss) if classes is None else classes[target]
        return torch.stack([torch.where(mask, loss, 0.0).double().sum(), torch.where(mask, weight, 0.0).double().sum()])

    def _au_sums(self, outputs: Outputs, labels: Labels) -> Tensor:
        logits = at_least_float32(outputs.au_logits)
        pos_weight = self._au_weights.like(logits) if self._au_weights else None
        if any(self.au_gammas) or self.au_margin:
            loss = asymmetric_loss(logits, labels.au.to(logits), *self.au_gammas, self.au_margin, pos_weight=pos_weight)
        else:
            loss = F.binary_cross_entropy_with_logits(
                logits, labels.au.to(logits), pos_weight=pos_weight, reduction="none"
            )
        return torch.stack([torch.where(labels.au_mask, loss, 0.0).double().sum(), labels.au_mask.double().sum()])


def build_class_weights(config: LossConfig, counts: LabelCounts) -> ClassWeights:
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
    return ClassWeights(expr, au)


def build_log_prior(config: LossConfig, counts: LabelCounts) -> Tensor:
    """Return what the logits of expressions are plus in the loss, (8,) float64; empty: nothing.

    A class without any label counts as one with one: its logit would be minus infinity.
    """
    if not config.expr_prior:
        return torch.zeros(0)
    classes = torch.tensor(counts.expr_classes, dtype=torch.float64).clamp_min(1)
    return config.expr_prior * (classes / classes.sum()).log()


def asymmetric_loss(
    logits: Tensor, on: Tensor, gamma_pos: float, gamma_neg: float, margin: float, *, pos_weight: Tensor | None = None
) -> Tensor:
    """Return the loss of every entry, of the shape of `logits`; `on` is 1 or 0 (Ben-Baruch et al. 2021, arXiv
    2009.14119, equations 5 to 7). A unit that is off has its probability less the margin, and not below 0.

    The gradient goes through the factors, as the equations have it.
    """
    p = logits.sigmoid()
    positive = -F.logsigmoid(logits) * _power(1 - p, gamma_pos)
    positive = positive if pos_weight is None else positive * pos_weight
    if margin:
        shifted = (p - margin).clamp_min(0)
        negative = -torch.log1p(-shifted) * _power(shifted, gamma_neg)
    else:
        negative = -F.logsigmoid(-logits) * _power(p, gamma_neg)
    return torch.where(on > 0, positive, negative)


def _power(share: Tensor, exponent: float) -> Tensor:
    """A power in [0, 1] whose gradient is finite at 0, too."""
    return share.clamp_min(1e-8) ** exponent


def concordance(moments: Tensor) -> Tensor:
    """CCC (...,) of moments (..., 6): 2 cov / (var + var + (mean difference)^2), population moments (Lin 1989)."""
    n, sx, sy, sxx, syy, sxy = moments.unbind(-1)
    n = n.clamp_min(1)
    mean_x, mean_y = sx / n, sy / n
    spread = (sxx / n - mean_x**2) + (syy / n - mean_y**2) + (mean_x - mean_y) ** 2
    return 2 * (sxy / n - mean_x * mean_y) / (spread + CCC_EPS)


def mean_square_error(moments: Tensor) -> Tensor:
    """Mean square difference (...,) of moments (..., 6)."""
    n, _, _, sxx, syy, sxy = moments.unbind(-1)
    return (sxx - 2 * sxy + syy) / n.clamp_min(1)


def _moments(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(2, 6) moments over the entries where mask (B, T) is True."""
    keep = mask.unsqueeze(-1).double()
    # where, not a product: a prediction that is not finite where nothing is labelled must not poison the sum.
    x = torch.where(mask.unsqueeze(-1), predicted.double(), 0.0)
    y = target.double() * keep
    terms = (keep.expand_as(y), x, y, x * x, y * y, x * y)
    return torch.stack([term.sum((0, 1)) for term in terms], dim=-1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Undo autocast: a loss in bfloat16 has three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class PredictedRows(NamedTuple):
    """Predictions of n rows with what they are compared to."""

    rows: np.ndarray  # (n,) int64
    predictions: Predictions
    targets: Targets


def finite_rows(predictions: Predictions) -> np.ndarray:
    """(n,) bool: whether all that is predicted of a frame is finite."""
    return np.logical_and.reduce([np.isfinite(values).all(-1) for values in predictions])


class AffectMeter:
    """Keeps the predictions of every frame (`losses.Meter`)."""

    def __init__(self):
        self._parts: list[list[np.ndarray]] = [_no_frames()]

    def add(self, outputs: Outputs, batch: Batch) -> None:
        probabilities = (
            outputs.va.float(),
            outputs.expr_logits.float().softmax(-1),
            outputs.au_logits.float().sigmoid(),
        )
        valid = batch.valid.numpy()
        parts = [tensor.cpu().numpy()[valid] for tensor in (batch.rows, *probabilities, *batch.labels)]
        self._parts.append(parts)

    def predicted(self) -> PredictedRows:
        """Return the predictions of all frames that were there."""
        parts = self._parts[1:] or self._parts
        rows, va, expr, au, *labels = (np.concatenate(column) for column in zip(*parts))
        return PredictedRows(rows, Predictions(va, expr, au), Targets(*labels))

    def bad_rows(self) -> list[int]:
        frames = self.predicted()
        return frames.rows[~finite_rows(frames.predictions)].tolist()

    def sums(self) -> np.ndarray:
        frames = self.predicted()
        return metric_sums(frames.predictions, frames.targets).flatten()

    def scores(self, total: np.ndarray) -> dict[str, Any]:
        return scores(MetricSums.unflatten(total))

    def floor(self, total: np.ndarray) -> dict[str, Any]:
        return constant_scores(MetricSums.unflatten(total))

    def pictures(self) -> dict[str, np.ndarray]:
        return {}


def _no_frames() -> list[np.ndarray]:
    """What a rank has that has no frame to predict."""
    va, expr, au = np.zeros((0, 2)), np.zeros((0, NUM_EXPRESSIONS)), np.zeros((0, NUM_AUS))
    masks = (np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, NUM_AUS), bool))
    return [np.zeros(0, np.int64), va, expr, au, va, np.zeros(0, np.int64), au, *masks]
