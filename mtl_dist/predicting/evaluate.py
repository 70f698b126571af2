"""What a model says of batches: its outputs, predictions of every frame, or scores over all ranks."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.data.augment import Preparation
from mtl_dist.device import MEMORY_REMEDY, free_memory, is_out_of_memory
from mtl_dist.errors import InputError, NonFiniteLoss
from mtl_dist.objective.affect import AffectMeter, PredictedRows
from mtl_dist.objective.losses import Objective
from mtl_dist.ranks import gather_lists
from mtl_dist.spans import EVALUATION, span
from mtl_dist.tasks import SET_BITS, Batch

MAX_LISTED = 32  # rows in one message

_most_samples: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # of a model that ran out


@torch.no_grad()
def forward_all(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    prepare: Preparation,
    device: torch.device,
    bf16: bool = False,
    forward: Callable[[Tensor, Tensor], Any] | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """Yield every batch, as it came, with what the model makes of it, on the device: `tasks.Outputs`, say.

    `forward` is asked in the model's place where that is wanted, with the same arguments: inputs, and which frames are
    valid. The model is in evaluation mode meanwhile. What runs out of memory is done again in batches of half as many
    samples, which are yielded in their order; the model gets no larger ones from then on. Raises `InputError` where one
    sample does not fit.
    """

    def pass_on(batch: Batch) -> Any:
        there = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return (forward or model)(prepare(there, None), there.valid)

    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            first, num_samples = 0, len(batch.samples)
            while first < num_samples:
                size = min(_most_samples.get(model, sys.maxsize), num_samples - first)
                part = batch if size == num_samples else batch.take(slice(first, first + size))
                try:
                    outputs = pass_on(part)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    outputs = None
                if outputs is None:  # not in the handler: the exception holds what the pass has made
                    _most_samples[model] = _halve(size)
                    continue
                yield part, outputs
                first += size
    finally:
        model.train(was_training)


def _halve(size: int) -> int:
    """Return how many samples batches have from now on, and say so."""
    if size == 1:
        raise InputError(f"out of memory with a batch of one sample: {MEMORY_REMEDY}")
    free_memory()
    less = math.ceil(size / 2)
    print(f"note: out of memory: batches of {less} sample(s) instead of {size} from here on", flush=True)
    return less


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    prepare: Preparation,
    device: torch.device,
    bf16: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> PredictedRows:
    """Predict every frame of batches that is there, padding is none. `progress` is told of frames."""
    meter = AffectMeter()
    for batch, outputs in forward_all(model, batches, prepare=prepare, device=device, bf16=bf16):
        meter.add(outputs, batch)
        progress(int(batch.valid.sum()))
    return meter.predicted()


class Scored(NamedTuple):
    """What an evaluation found."""

    scores: dict[str, Any]
    floor: dict[str, Any]  # those of the best constant predictor
    pictures: dict[str, np.ndarray]  # of this rank's first frames, where there is something to look at


@span(EVALUATION)
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    step: int,
    progress: Callable[[int], None],
    **how: Any,
) -> Scored:
    """Score this rank's batches and those of all others; every rank calls it. `how`: of `forward_all`.

    Raises `NonFiniteLoss` where any rank predicted what is not finite.
    """
    meter = objective.meter()
    for batch, outputs in forward_all(model, batches, **how):
        meter.add(outputs, batch)
        progress(int(batch.valid.sum()))
    check_predictions(meter.bad_rows(), step)
    total = _total(meter.sums())
    return Scored(meter.scores(total), meter.floor(total), meter.pictures())


def check_predictions(bad_rows: list[int], step: int) -> None:
    """Raise on all ranks where any rank predicted what is not finite: NaN is scored as Neutral, without a unit on.

    Every rank calls it, with its rows of such predictions.
    """
    if bad := gather_lists(bad_rows):
        raise NonFiniteLoss(
            f"evaluation after step {step}: predictions of {len(bad)} row(s) are not finite: {list_rows(bad)}"
        )


def list_rows(rows: list[int]) -> str:
    """Name rows in ascending order, the first of many."""
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return f"{', '.join(map(_row_name, sorted(rows)[:MAX_LISTED]))}{more}"


def _row_name(row: int) -> str:
    number, own = divmod(row, 1 << SET_BITS)
    return f"{own} of set {number + 1}" if number else str(own)


def _total(sums: np.ndarray) -> np.ndarray:
    """Add up (n,) float64 over all ranks: one all-reduce."""
    flat = torch.from_numpy(sums)
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        flat = flat.to(device)
        dist.all_reduce(flat)
    return flat.cpu().numpy()
