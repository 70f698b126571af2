"""What a teacher says where labels are missing: soft targets for exactly those tasks and units of a frame.

loss of a task = that of its labels + `teacher_weight` x sum over missing entries of weight x error / number of entries

An entry is a frame, and of AU one of its units. Entries are those of the whole global batch, labelled ones too: so what
a few say counts little, and the part of labels is what it was without a teacher.

VA     error: mean square of the differences to the teacher's values. Weight 1: a regression tells no confidence. Where
       it does not know, its value is near the mean of all, which asks for what its pupil would say anyhow.
EXPR   error: cross entropy to the teacher's probabilities. Weight: the largest of them.
AU     error: binary cross entropy to the teacher's probability. Weight: that of the likelier of on and off.

Entries of a weight below `teacher_confidence` are left out, as are padding and frames that are seen only for the sake
of others. So is what the training set has no label of at all: an average of one's own would only confirm itself.

The teacher reads the inputs that the model reads, after augmentation: a mouth that is erased there is told by neither.
It is no part of the module that is trained: no optimizer, checkpoint or hook sees it. A pass has no gradient, and
draws nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.constants import Constant
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.affect import Affect, AffectMeter, at_least_float32
from mtl_dist.objective.losses import Sums
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import Batch, Outputs
from mtl_dist.transfer import send

SHAPES = {"va": (2, 6), "expr": (2,), "au": (2,)}  # of the sums of labels


class Teacher(NamedTuple):
    """A model that is not trained, and what it is believed."""

    model: nn.Module  # on the device, in evaluation mode
    tasks: tuple[str, ...]


class _Asked(NamedTuple):
    """What is asked for of the entries of one task, (B, T, U): of AU the units, else one."""

    error: Tensor  # with gradients to the outputs
    weight: Tensor  # in [0, 1]
    labelled: Tensor  # bool


class Taught:
    """The objective (`losses.Objective`) of the three tasks, with targets of a teacher where labels are missing.

    Sums: those of `Affect`, flat, and behind them 3 numbers: weight x error of what is taught, its weight, and the
    number of entries.
    """

    def __init__(self, objective: Affect, teacher: Teacher, config: LossConfig, counts: LabelCounts):
        self.terms, self.fixed, self.after = objective.terms, objective.fixed, objective.after
        self.by_labels, self.teacher = objective, teacher
        self.share, self.least = config.teacher_weight, config.teacher_confidence
        self.begins_after, self.has_begun = config.teacher_after, not config.teacher_after
        labelled = {"va": [counts.va], "expr": [counts.expr], "au": counts.au}
        self.is_taught = {  # (U,) bool
            task: (torch.tensor(labelled[task]) > 0) & (task in teacher.tasks) & (config.weight(task) > 0)
            for task in self.terms
        }
        self._is_taught = {task: Constant(values) for task, values in self.is_taught.items()}

    def begin_epoch(self, epoch: int) -> None:
        self.has_begun = epoch >= self.begins_after

    def sums(self, outputs: Outputs, batch: Batch) -> Sums:
        of_labels = self.by_labels.sums(outputs, batch)
        nothing = dict.fromkeys(self.terms, outputs.va.new_zeros(3, dtype=torch.float64))
        of_teacher = self._taught_sums(outputs, batch) if self.has_begun else nothing
        return {term: torch.cat([of_labels[term].flatten(), of_teacher[term]]) for term in self.terms}

    def weight(self, term: str, total: Tensor) -> Tensor:
        of_labels, of_teacher = _split(term, total)
        return self.by_labels.weight(term, of_labels) + of_teacher[1]

    def loss(self, term: str, total: Tensor) -> Tensor:
        of_labels, of_teacher = _split(term, total)
        is_labelled = self.by_labels.weight(term, of_labels) > 0
        # Ones where nothing is labelled: 0 / 0 would be left out, but its gradient is none that can be.
        loss = self.by_labels.loss(term, torch.where(is_labelled, of_labels, 1.0))
        return torch.where(is_labelled, loss, 0.0) + self.share * of_teacher[0] / of_teacher[2].detach().clamp_min(1)

    def taught(self, total: Sums) -> Sums:
        """Return the weight of what is taught, as a share of all entries of the step."""
        parts = {task: _split(task, total[task])[1] for task in self.terms if self.is_taught[task].any()}
        return {task: weight / entries.clamp_min(1) for task, (_, weight, entries) in parts.items()}

    def meter(self) -> AffectMeter:
        return self.by_labels.meter()

    def _taught_sums(self, outputs: Outputs, batch: Batch) -> Sums:
        counts = send(batch.rows >= 0, outputs.va.device)[..., None]
        found = {}
        for task, (error, weight, labelled) in self._ask(outputs, batch).items():
            entries = counts & self._is_taught[task].like(counts)
            wanted = entries & ~labelled & (weight >= self.least)
            # where, not a product: what is not finite elsewhere must not poison the sum.
            parts = torch.where(wanted, weight * error, 0.0), torch.where(wanted, weight, 0.0), entries
            found[task] = torch.stack([part.double().sum() for part in parts])
        return found

    def _ask(self, outputs: Outputs, batch: Batch) -> dict[str, _Asked]:
        with torch.no_grad():
            said = self.teacher.model(batch.inputs, batch.valid)
            expressions = at_least_float32(said.expr_logits).softmax(-1)
            units = at_least_float32(said.au_logits).sigmoid()
            values = at_least_float32(said.va)
        va = (at_least_float32(outputs.va) - values).square().mean(-1, keepdim=True)
        expr = -(expressions * at_least_float32(outputs.expr_logits).log_softmax(-1)).sum(-1, keepdim=True)
        logits = at_least_float32(outputs.au_logits)
        au = F.binary_cross_entropy_with_logits(logits, units.to(logits), reduction="none")
        labels = batch.labels
        return {
            "va": _Asked(va, torch.ones_like(va), labels.va_mask[..., None]),
            "expr": _Asked(expr, expressions.amax(-1, keepdim=True), labels.expr_mask[..., None]),
            "au": _Asked(au, torch.maximum(units, 1 - units), labels.au_mask),
        }


def _split(term: str, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of labels, and the 3 numbers of what is taught."""
    return total[:-3].view(SHAPES[term]), total[-3:]
