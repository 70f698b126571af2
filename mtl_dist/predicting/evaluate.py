"""Predict a shard set, each row exactly once over all ranks, and score it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.data.augment import normalise
from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, metric_sums
from mtl_dist.ranks import gather_lists
from mtl_dist.tasks import Batch

MAX_LISTED = 32  # rows in one message


class Predicted(NamedTuple):
    """Predictions of n rows with what they are compared to."""

    rows: np.ndarray  # (n,) int64
    predictions: Predictions
    targets: Targets


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    size: int,
    bf16: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Predicted:
    """Predict batches of single images; `size` is the side of the model's input. The model is left in its mode."""
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        inputs = normalise(batch.inputs.to(device, non_blocking=True), size)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = model(inputs)
        probabilities = (
            outputs.va.float(),
            outputs.expr_logits.float().softmax(-1),
            outputs.au_logits.float().sigmoid(),
        )
        parts.append([t.flatten(0, 1).cpu().numpy() for t in (batch.rows, *probabilities, *batch.labels)])
        progress(len(batch.rows))
    model.train(was_training)
    if not parts:
        return _nothing()
    rows, va, expr, au, *labels = (np.concatenate(column) for column in zip(*parts))
    return Predicted(rows, Predictions(va, expr, au), Targets(*labels))


def finite_rows(predictions: Predictions) -> np.ndarray:
    """(n,) bool: whether all that is predicted of a frame is finite."""
    return np.logical_and.reduce([np.isfinite(values).all(-1) for values in predictions])


def check_predictions(predicted: Predicted, step: int) -> None:
    """Raise on all ranks where any rank predicted what is not finite: NaN is scored as Neutral, without a unit on.

    Every rank calls it.
    """
    if bad := gather_lists(predicted.rows[~finite_rows(predicted.predictions)].tolist()):
        raise NonFiniteLoss(
            f"evaluation after step {step}: predictions of {len(bad)} row(s) are not finite: {list_rows(bad)}"
        )


def list_rows(rows: list[int]) -> str:
    """Name rows in ascending order, the first of many."""
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return f"{', '.join(map(str, sorted(rows)[:MAX_LISTED]))}{more}"


def total_sums(predicted: Predicted) -> MetricSums:
    """Reduce this rank's predictions to metric sums and add them up over all ranks: one all-reduce."""
    flat = torch.from_numpy(metric_sums(predicted.predictions, predicted.targets).flatten())
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        flat = flat.to(device)
        dist.all_reduce(flat)
    return MetricSums.unflatten(flat.cpu().numpy())


def _nothing() -> Predicted:
    """The share of a rank that has no row to evaluate."""
    va, expr, au = np.zeros((0, 2)), np.zeros((0, 8)), np.zeros((0, 12))
    masks = (np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, 12), bool))
    return Predicted(np.zeros(0, np.int64), Predictions(va, expr, au), Targets(va, np.zeros(0, np.int64), au, *masks))
