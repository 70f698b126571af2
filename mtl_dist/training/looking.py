"""A step that is looked at once its loss is there: it is recorded, or ends the run where its loss is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.gradients import describe_gram
from mtl_dist.objective.losses import Objective
from mtl_dist.objective.module import StepLoss
from mtl_dist.predicting.evaluate import list_rows
from mtl_dist.ranks import gather_lists
from mtl_dist.training.instruments import Instruments
from mtl_dist.training.pace import GIB
from mtl_dist.training.pending import Pending
from mtl_dist.training.setup import Setup
from mtl_dist.training.times import Parts, own_seconds


class Taken(NamedTuple):
    """A step whose loss has not been looked at yet: looking makes the host wait for the device."""

    step: int
    epoch: int
    lr: float
    rates: dict[str, float]  # of groups of parameters, where they have others
    found: Pending[tuple[StepLoss, Tensor | float | None]]  # with the norm of its gradients, where it is known
    parts: Parts
    rows: list[int]
    took_s: float  # since the step before was done, the wait for data included
    waited_s: float


def look_at(taken: Taken, setup: Setup, objective: Objective, seen: Instruments, *, saved_step: int | None) -> None:
    """Record a step. Raises `NonFiniteLoss`, on all ranks: they hold the same values. `saved_step`: of the newest
    checkpoint."""
    loss, norm = taken.found.read()
    losses = {term: float(value) for term, value in loss.terms.items()} | {"total": float(loss.total)}
    weights = {term: float(weight) for term, weight in loss.weights.items()}
    wrong = {f"weight of {term}": weight for term, weight in weights.items() if not math.isfinite(weight)}
    if wrong or not all(map(math.isfinite, losses.values())):
        shown = ", ".join(f"{name} {value:g}" for name, value in (losses | wrong).items())
        rows = list_rows(gather_lists(taken.rows))
        raise NonFiniteLoss(f"step {taken.step}: the loss is not finite ({shown}); its rows: {rows}")
    present = {term for term, is_present in loss.present.items() if bool(is_present)}
    learned = setup.config.loss.balancing != "fixed"
    losses = {name: value for name, value in losses.items() if name == "total" or name in present}
    norm = None if norm is None or not math.isfinite(float(norm)) else float(norm)
    images = setup.config.train.global_batch * max(len(setup.data.tasks), 1)
    seen.tracker.step(
        taken.step,
        setup.total_steps,
        taken.epoch,
        taken.lr,
        losses,
        weights={term: weight for term, weight in weights.items() if learned and term in present},
        taught={term: float(share) for term, share in objective.taught(loss.sums).items()},
        gradients={} if loss.gram is None else describe_gram(loss.gram, tuple(loss.terms), present),
        gradient_norm=norm,
        rates=taken.rates,
        images=images,
        took_s=taken.took_s,
        waited_s=taken.waited_s,
        saved_step=saved_step,
    )
    _show(taken, setup, losses, norm=norm, saved_step=saved_step)
    _time(taken, setup, seen, images=images)


def _show(taken: Taken, setup: Setup, losses: dict[str, float], *, norm: float | None, saved_step: int | None) -> None:
    """Show a step to whoever watches the cluster; rank 0 also what is the same on all ranks."""
    own = {"step_s": taken.took_s, "data_wait_s": taken.waited_s, "images_per_s": len(taken.rows) / taken.took_s}
    setup.context.observe(**own)
    if setup.context.rank == 0:
        known = {"gradient_norm": norm, "checkpoint_step": saved_step}
        known = {name: value for name, value in known.items() if value is not None}
        setup.context.observe(step=taken.step, lr=taken.lr, loss=losses, **known)


def _time(taken: Taken, setup: Setup, seen: Instruments, *, images: int) -> None:
    """Add a step to the minute's, and tell of that where it is over, or the run."""
    seen.pace.add(taken.parts.read(), images=images, took_s=taken.took_s)
    last_step = setup.data.steps_per_epoch * setup.config.last_epoch
    if told := seen.pace.take(is_last=taken.step == last_step):
        seen.tracker.timed(taken.step, taken.epoch, told)
        memory = {"gpu_memory_bytes": told["gpu_gib"] * GIB} if "gpu_gib" in told else {}
        setup.context.observe(part_s=told["seconds"], own_s=own_seconds(told["seconds"]), **memory)
