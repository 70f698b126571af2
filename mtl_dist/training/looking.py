"""A step that is looked at once its loss is there: it is recorded, or ends the run where its loss is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.gradients import describe_gram
from mtl_dist.objective.losses import Objective
from mtl_dist.objective.module import StepLoss
from mtl_dist.predicting.evaluate import list_rows
from mtl_dist.ranks import gather_lists
from mtl_dist.training.pending import Pending
from mtl_dist.training.setup import Setup
from mtl_dist.training.tracking import NoTracker, Tracker


class Taken(NamedTuple):
    """A step whose loss has not been looked at yet: looking makes the host wait for the device."""

    step: int
    epoch: int
    lr: float
    loss: Pending[StepLoss]
    rows: list[int]
    took_s: float  # since the step before was done, the wait for data included
    waited_s: float


def look_at(
    taken: Taken, setup: Setup, objective: Objective, tracker: Tracker | NoTracker, *, saved_step: int | None
) -> None:
    """Record a step. Raises `NonFiniteLoss`, on all ranks: they hold the same values. `saved_step`: of the newest
    checkpoint."""
    loss = taken.loss.read()
    losses = {term: float(value) for term, value in loss.terms.items()} | {"total": float(loss.total)}
    weights = {term: float(weight) for term, weight in loss.weights.items()}
    wrong = {f"weight of {term}": weight for term, weight in weights.items() if not math.isfinite(weight)}
    if wrong or not all(map(math.isfinite, losses.values())):
        shown = ", ".join(f"{name} {value:g}" for name, value in (losses | wrong).items())
        rows = list_rows(gather_lists(taken.rows))
        raise NonFiniteLoss(f"step {taken.step}: the loss is not finite ({shown}); its rows: {rows}")
    present = {term for term, is_present in loss.present.items() if bool(is_present)}
    learned = setup.config.loss.balancing != "fixed"
    tracker.step(
        taken.step,
        setup.total_steps,
        taken.epoch,
        taken.lr,
        {name: value for name, value in losses.items() if name == "total" or name in present},
        weights={term: weight for term, weight in weights.items() if learned and term in present},
        taught={term: float(share) for term, share in objective.taught(loss.sums).items()},
        gradients={} if loss.gram is None else describe_gram(loss.gram, tuple(loss.terms), present),
        images=setup.config.train.global_batch * max(len(setup.data.tasks), 1),
        took_s=taken.took_s,
        waited_s=taken.waited_s,
        saved_step=saved_step,
    )
