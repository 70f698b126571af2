"""Another run that teaches this one what is not labelled: what `loss.teacher` stands for, and whether it fits.

Every rank calls these, but rank 0 alone chooses, as of what a run begins from (`start.py`). A run that continues is
taught by the same weights as before, also where its teacher has a better checkpoint by now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.index import Sets
from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES, FEATURES, objective_of, reads_videos
from mtl_dist.ranks import on_rank_0
from mtl_dist.runs.checkpoint import MODEL
from mtl_dist.runs.weights import Weights, load_weights, open_weights
from mtl_dist.sections import EMA
from mtl_dist.tasks import TASKS

TAUGHT_BY = "taught_by"  # of state.json: `note_teacher`


def find_teacher(config: Config, train: Sets, known: dict[str, Any] | None) -> Weights | None:
    """Find the run that teaches; None where there is none. Raises `InputError`.

    `known` is what a checkpoint of this run notes of its teacher: only those weights will do then.
    """
    given = config.loss.teacher
    if given in ("", EMA) or not objective_of(config.model.name).reads_labels:
        return None
    with _naming_the_setting():
        weights = open_weights(given)
    if known and _sha256(weights) != known["sha256"]:
        weights = _open_known(given, known, now=weights)
    if misfit := _find_misfit(weights, config, train):
        raise InputError(f"loss.teacher {weights.uri} {misfit}; give another one, or leave it out")
    return weights


def find_teacher_on_ranks(config: Config, train: Sets, known: dict[str, Any] | None) -> Weights | None:
    """Return what rank 0 finds, at this node's path."""

    def find() -> tuple[Weights, str] | None:
        weights = find_teacher(config, train, known)
        return weights and (weights, _place_of(weights, config))

    if (found := on_rank_0(find)) is None:
        return None
    weights, place = found
    uri = config.loss.teacher.rstrip("/") + place
    return weights._replace(checkpoint=weights.checkpoint._replace(uri=uri))


def load_teacher(weights: Weights) -> nn.Module:
    """Build the teacher on the CPU, in evaluation mode, not to be trained. Raises `InputError`."""
    with _naming_the_setting():
        return load_weights(weights).requires_grad_(False)


def taught_tasks(weights: Weights) -> tuple[str, ...]:
    """Return what a run can teach: tasks with a loss and, where it was evaluated, a score. Other heads say noise."""
    scores, loss = weights.checkpoint.scores, weights.config.loss
    return tuple(task for task in TASKS if loss.weight(task) and (task in scores or not scores))


def note_teacher(weights: Weights, config: Config) -> dict[str, Any]:
    """Return what a run keeps of its teacher in its state.json."""
    about = {"uri": weights.uri, "place": _place_of(weights, config), "step": weights.checkpoint.step}
    return about | {"sha256": _sha256(weights)}


def describe_teacher(weights: Weights) -> str:
    """Say who teaches what."""
    return f"{weights.uri}, step {weights.checkpoint.step}: {', '.join(taught_tasks(weights))}"


def _open_known(given: str, known: dict[str, Any], *, now: Weights) -> Weights:
    """Open the weights that taught so far, which are no longer those that `loss.teacher` stands for."""
    if known["place"]:
        with contextlib.suppress(InputError):
            weights = open_weights(given.rstrip("/") + known["place"])
            if _sha256(weights) == known["sha256"]:
                return weights
    raise InputError(
        f"loss.teacher {given} stands for other weights now ({now.uri}, sha256 {_sha256(now)}) than those that taught "
        f"this run ({known['uri']}, sha256 {known['sha256']}); put those back, or give the run another --run.name"
    )


def _find_misfit(weights: Weights, config: Config, train: Sets) -> str:
    """Say why the teacher cannot read what this run reads, or has nothing to teach; empty where it can."""
    model, own = weights.config.model, config.model
    if FAMILIES[model.name].objective != FAMILIES[own.name].objective:
        return f"is {FAMILIES[model.name].what}: it predicts no labels"
    if (model.backbone == FEATURES) != (own.backbone == FEATURES):
        return f"has model.backbone {model.backbone}, and this run {own.backbone}: they do not read the same inputs"
    if reads_videos(model.name) and not reads_videos(own.name):
        return "reads videos, and this run single pictures"
    if model.backbone == FEATURES and model.sequence.dims != own.sequence.dims:
        return f"reads rows of {list(model.sequence.dims)} numbers, and this run of {list(own.sequence.dims)}"
    extractors = weights.extractors
    if extractors and [each.identity for each in extractors] != [each.identity for each in train.extractors]:
        return f"reads features of {', '.join(each.name for each in extractors)}, and {train} has others"
    theirs, mine = weights.config.input_size, config.input_size
    if model.backbone != FEATURES and theirs != mine:
        return f"reads pictures of {theirs} pixels a side, and this run of {mine} (data.image_size, model.image_size)"
    if weights.view and weights.view != train.view:
        return f"was trained on {weights.view} pictures, and {train} holds {train.view}"
    if not any(config.loss.weight(task) for task in taught_tasks(weights)):
        known = ", ".join(taught_tasks(weights)) or "no task"
        return f"has nothing to teach this run: it was trained for and scored on {known}"
    return ""


def _place_of(weights: Weights, config: Config) -> str:
    """Return what comes after `loss.teacher` in the URI of the weights: the same on all nodes."""
    return storage.absolute(weights.uri).removeprefix(storage.absolute(config.loss.teacher.rstrip("/")))


def _sha256(weights: Weights) -> str:
    return weights.checkpoint.files[MODEL]["sha256"]


@contextlib.contextmanager
def _naming_the_setting() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"loss.teacher: {error}") from None
