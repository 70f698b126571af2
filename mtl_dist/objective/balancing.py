"""From the losses of an objective's terms to one scalar: sum of weight x loss, the weights fixed or found in training.

A balancer never calls backward. All it sees are losses of the whole global batch, and in `gradients` products of their
gradients, so its weights are the same on every rank. What it learns is in parameters and buffers, which checkpoints
hold. A term that has nothing to learn from in a step adds nothing to its loss and changes no weight. One exception: the
optimizer's momentum does not know of this, and goes on changing learned uncertainties.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

TINY = 1e-8  # losses are taken to be at least so large where they are divided by


class Balancer(nn.Module):
    """Fixed weights; those of arXiv 2207.10878 are all 1. The others multiply them with what they find."""

    looks_after_steps = False  # whether `stepped` wants the losses of the same batch after the step
    reads_gradients = False  # whether the trunk is weighed by `gradients.GradientBalancer.shares`

    def __init__(self, fixed: Mapping[str, float]):
        super().__init__()
        self.terms = tuple(fixed)
        self.register_buffer("fixed", torch.tensor(list(fixed.values()), dtype=torch.float64), False)
        self._configured = tuple(fixed.values())

    def forward(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return what is minimised. `losses` are 0 where the global batch has nothing of a term."""
        weights = self.weights(losses, present)
        return sum(weight * losses[term] for term, weight in zip(self.terms, weights))

    @torch.no_grad()
    def weights(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return the weights (K,) that the losses of this step have."""
        return self.fixed

    def stepped(self, losses: dict[str, Tensor], present: dict[str, Tensor], after: dict[str, Tensor] | None) -> None:
        """Take note of an optimizer step: its losses, and where `looks_after_steps` those of its batch after it."""

    def begin_epoch(self, epoch: int, after: Mapping[str, int]) -> None:
        """Give terms their configured weights, or 0 in the epochs that are trained without them: a pure function of
        the epoch. `after` has how many epochs these are."""
        weights = [
            weight * (epoch >= after.get(term, 0)) for term, weight in zip(self.terms, self._configured, strict=True)
        ]
        self.fixed.copy_(torch.tensor(weights, dtype=torch.float64))

    def finished_epoch(self) -> None:
        """Take note that an epoch is over."""

    def stack(self, values: dict[str, Tensor]) -> Tensor:
        """Return the values of all terms, (K,)."""
        return torch.stack([values[term] for term in self.terms])


class UncertaintyWeights(Balancer):
    """Learned homoscedastic uncertainty: sum of exp(-s) w loss + s / 2 (Kendall et al. 2018, arXiv 1705.07115).

    A term counts only in steps where some rank has something of it: else s would drift down without evidence.
    """

    def __init__(self, fixed: Mapping[str, float]):
        super().__init__(fixed)
        self.log_variance = nn.Parameter(torch.zeros(len(fixed)))

    def forward(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        parts = []
        for term, s, weight in zip(self.terms, self.log_variance, self.fixed):
            parts.append(torch.where(present[term] & (weight > 0), torch.exp(-s) * weight * losses[term] + s / 2, 0.0))
        return torch.stack(parts).sum()

    @torch.no_grad()
    def weights(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fixed * torch.exp(-self.log_variance)


class DynamicWeightAverage(Balancer):
    """Weights K softmax(r / 2), where r = a term's mean loss in the last epoch / that in the epoch before (Liu et al.
    2019, MTAN, arXiv 1803.10704, equation 7). A loss that falls slowly weighs more. The weights add up to K, the number
    of terms.

    A mean is over the steps that the term is present in. A term without two means yet has r = 1; one that never was
    present has no part in the sum. Weights change between epochs only.
    """

    TEMPERATURE = 2.0
    MAX_RATIO = 1000.0  # no weight is left for another term long before, and exp overflows at 1420

    def __init__(self, fixed: Mapping[str, float]):
        super().__init__(fixed)
        for name in ("sums", "counts", "last", "before"):  # a mean of 0: there is none yet
            self.register_buffer(name, torch.zeros(len(fixed), dtype=torch.float64))
        self.register_buffer("found", torch.ones(len(fixed), dtype=torch.float64))

    @torch.no_grad()
    def weights(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.fixed * self.found

    @torch.no_grad()
    def stepped(self, losses: dict[str, Tensor], present: dict[str, Tensor], after: dict[str, Tensor] | None) -> None:
        here = self.stack(present)
        self.sums += torch.where(here, self.stack(losses), 0.0)
        self.counts += here

    @torch.no_grad()
    def finished_epoch(self) -> None:
        seen = self.counts > 0
        self.before.copy_(torch.where(seen, self.last, self.before))
        self.last.copy_(torch.where(seen, self.sums / self.counts.clamp_min(1), self.last))
        ratio = torch.where(self.before > 0, self.last / self.before.clamp_min(TINY), 1.0)
        taking_part = (self.last > 0) & (self.fixed > 0)
        shares = torch.where(taking_part, torch.exp(ratio.clamp_max(self.MAX_RATIO) / self.TEMPERATURE), 0.0)
        found = taking_part.sum() * shares / shares.sum().clamp_min(TINY)
        self.found.copy_(torch.where(taking_part, found, self.found))
        self.sums.zero_()
        self.counts.zero_()


class FAMO(Balancer):
    """Fast adaptive multitask optimization (Liu et al. 2023, arXiv 2306.03792, algorithm 1): weights c z / loss.

    So all losses fall at the same relative rate. z = softmax(logits), and c makes the weights add up to 1.

    After a step, Adam (learning rate 0.025) updates the logits by how much the log-loss of each term fell on the same
    batch. This takes one more forward pass, without gradients, as in the authors' code; the weight decay is its
    default. Their cheaper variant compares the losses of successive batches instead. These differ by more than a step
    changes them. A step's softmax, c and update are over the terms that are present. Adam counts the steps of each
    logit by itself.
    """

    LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 0.025, 1e-2, (0.9, 0.999), 1e-8
    looks_after_steps = True

    def __init__(self, fixed: Mapping[str, float]):
        super().__init__(fixed)
        for name in ("logits", "mean", "mean_square", "steps"):
            self.register_buffer(name, torch.zeros(len(fixed), dtype=torch.float64))

    @torch.no_grad()
    def weights(self, losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        ratio = self._softmax(self._taking_part(present)) / self.stack(losses).clamp_min(TINY)
        return self.fixed * ratio / ratio.sum().clamp_min(TINY)

    @torch.no_grad()
    def stepped(self, losses: dict[str, Tensor], present: dict[str, Tensor], after: dict[str, Tensor] | None) -> None:
        taking_part = self._taking_part(present)
        z = self._softmax(taking_part)
        fall = self.stack(losses).clamp_min(TINY).log() - self.stack(after).clamp_min(TINY).log()
        fall = torch.where(taking_part, fall, 0.0)
        # The gradient of <z, fall> by the logits. Descending it, what fell more than the others weighs less.
        gradient = z * (fall - (z * fall).sum()) + self.WEIGHT_DECAY * self.logits
        self._adam(torch.where(taking_part, gradient, 0.0), taking_part)

    def _taking_part(self, present: dict[str, Tensor]) -> Tensor:
        return self.stack(present) & (self.fixed > 0)

    def _softmax(self, taking_part: Tensor) -> Tensor:
        shares = torch.where(taking_part, torch.exp(self.logits - self.logits.amax()), 0.0)
        return shares / shares.sum().clamp_min(TINY)

    def _adam(self, gradient: Tensor, taking_part: Tensor) -> None:
        first, second = self.BETAS
        self.steps += taking_part
        self.mean.copy_(torch.where(taking_part, torch.lerp(gradient, self.mean, first), self.mean))
        self.mean_square.copy_(
            torch.where(taking_part, torch.lerp(gradient**2, self.mean_square, second), self.mean_square)
        )
        steps = self.steps.clamp_min(1)
        spread = (self.mean_square / (1 - second**steps)).sqrt() + self.EPS
        update = self.LEARNING_RATE * self.mean / (1 - first**steps) / spread
        self.logits -= torch.where(taking_part, update, 0.0)


BALANCERS: dict[str, type[Balancer]] = {
    "fixed": Balancer,
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
}
