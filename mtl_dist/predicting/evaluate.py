"""Predict a shard set, each row exactly once over all ranks, and score it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

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
def forward_all(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    size: int,
    bf16: bool = False,
    forward: Callable[[Tensor, Tensor], Any] | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """Yield every batch, as it came, with the model's outputs of it, on the device: `tasks.Outputs`.

    `size` is the side of the model's input. `forward` is what else of the model is asked than its own forward, with
    the same arguments: inputs and which frames are valid. The model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            there = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                outputs = (forward or model)(normalise(there.inputs, size), there.valid)
            yield batch, outputs
    finally:
        model.train(was_training)


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    size: int,
    bf16: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Predicted:
    """Predict every frame of batches that is there, padding is none. `progress` is told of frames."""
    parts = []
    for batch, outputs in forward_all(model, batches, device=device, size=size, bf16=bf16):
        probabilities = (
            outputs.va.float(),
            outputs.expr_logits.float().softmax(-1),
            outputs.au_logits.float().sigmoid(),
        )
        valid = batch.valid.numpy()
        parts.append([tensor.cpu().numpy()[valid] for tensor in (batch.rows, *probabilities, *batch.labels)])
        progress(int(valid.sum()))
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
