"""The plain mean of several models, of one view or of both. What each wants to see of a frame is its `Cut`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mtl_dist.config import Config
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.unlabelled import unlabelled
from mtl_dist.errors import InputError
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.evaluate import predict
from mtl_dist.runs.weights import Weights, load_weights
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Batch


class Cut(NamedTuple):
    """Pictures of one view and size, which the models that want them share."""

    view: str | None  # None: no model tells
    size: int  # pixels a side


class Loaded(NamedTuple):
    """A model with its weights on a device, and its configuration."""

    model: nn.Module
    config: Config


class Summed(NamedTuple):
    """The sum of what several models say of rows."""

    predicted: PredictedRows
    num_models: int


def find_views(runs: Sequence[str], models: Sequence[Weights]) -> tuple[str, ...]:
    """Return the views that models were trained on, in the order of `runs`, their URIs.

    Of a checkpoint that tells no view the others decide. Raises `InputError` where these are of two.
    """
    views = tuple(dict.fromkeys(model.view for model in models if model.view))
    silent = [run for run, model in zip(runs, models) if not model.view]
    if len(views) > 1 and silent:
        raise InputError(
            f"{silent[0]} does not tell its view, and the other runs are of {' and '.join(views)}; predict with it "
            "apart"
        )
    return views


def group_by_cut(models: Sequence[Weights]) -> dict[Cut, list[Weights]]:
    """Return the models of every cut, both in the order in which they come."""
    views = {model.view for model in models if model.view}
    only = views.pop() if len(views) == 1 else None
    groups: dict[Cut, list[Weights]] = {}
    for model in models:
        groups.setdefault(Cut(model.view or only, model.config.data.image_size), []).append(model)
    return groups


class Mean:
    """The plain mean of models that stay on a device, of pictures in memory."""

    def __init__(self, models: Sequence[Weights], device: torch.device):
        self.device = device
        self._groups = {cut: load_all(own, device) for cut, own in group_by_cut(models).items()}

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What the models want to see of a frame."""
        return tuple(self._groups)

    def __call__(self, pictures: Mapping[Cut, np.ndarray]) -> Predictions:
        """Predict n frames, of each the pictures (n, size, size, 3) uint8 of every cut, in the order of frames."""
        parts = []
        for cut, loaded in self._groups.items():
            batch = unlabelled(pictures[cut], range(len(pictures[cut])))
            parts.append(Summed(sum_predictions(loaded, [batch], self.device), len(loaded)))
        return mean_rows(parts)[0].predictions


def load_all(models: Iterable[Weights], device: torch.device) -> list[Loaded]:
    """Build models on a device, in evaluation mode. Raises `InputError`."""
    return [Loaded(load_weights(weights).to(device), weights.config) for weights in models]


def sum_predictions(loaded: Sequence[Loaded], batches: Sequence[Batch], device: torch.device) -> PredictedRows:
    """Return the sum of what models of one cut say of the frames of batches."""
    total = None
    for model, config in loaded:
        bf16 = config.engine.autocast == "bf16"
        own = predict(model, batches, prepare=build_preparation(config), device=device, bf16=bf16)
        total = own if total is None else total._replace(predictions=_add(total.predictions, own.predictions))
    assert total is not None
    return total


def mean_rows(parts: Sequence[Summed]) -> tuple[PredictedRows, np.ndarray]:
    """Return the mean over all models, rows in ascending order; and (n,) how many models have seen each.

    A row that some models have not seen, for there is no such picture in their view, is the mean of the others.
    """
    rows = np.unique(np.concatenate([part.predicted.rows for part in parts]))
    counts = np.zeros(len(rows), np.int64)
    sums, targets = (
        [np.zeros((len(rows), *array.shape[1:]), array.dtype) for array in arrays]
        for arrays in (parts[0].predicted.predictions, parts[0].predicted.targets)
    )
    for predicted, num_models in parts:
        places = np.searchsorted(rows, predicted.rows)
        counts[places] += num_models
        for total, own in zip(sums, predicted.predictions):
            total[places] += own
        for known, own in zip(targets, predicted.targets):
            known[places] = own
    mean = Predictions(*(total / counts[:, None].astype(total.dtype) for total in sums))
    return PredictedRows(rows, mean, Targets(*targets)), counts


def no_predictions() -> Predictions:
    """Return what is predicted of no frame."""
    return Predictions(*(np.zeros((0, width), np.float32) for width in (2, NUM_EXPRESSIONS, NUM_AUS)))


def _add(mine: Predictions, other: Predictions) -> Predictions:
    return Predictions(*(a + b for a, b in zip(mine, other)))
