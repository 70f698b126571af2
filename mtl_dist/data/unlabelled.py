"""Pictures as batches of which nothing is labelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from mtl_dist.tasks import NUM_AUS, Batch, Labels


def batched(pictures: Iterable[tuple[int, np.ndarray]], *, batch: int) -> Iterator[Batch]:
    """Stack (row, (S, S, 3) pixels) into batches without labels; the last is smaller."""
    pictures = iter(pictures)
    while taken := list(islice(pictures, batch)):
        yield unlabelled(np.stack([pixels for _, pixels in taken]), [row for row, _ in taken])


def unlabelled(pixels: np.ndarray, rows: Sequence[int]) -> Batch:
    """Return (n, H, W, 3) uint8 pixels as a batch without labels."""
    n = len(pixels)
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2)[:, None])
    numbers = torch.tensor(rows, dtype=torch.int64)
    return Batch(inputs, torch.ones(n, 1, dtype=torch.bool), no_labels(n, 1), numbers[:, None], numbers)


def no_labels(samples: int, frames: int) -> Labels:
    """Return the labels of (samples, frames) of which nothing is labelled."""
    shape = (samples, frames)
    return Labels(
        va=torch.zeros(*shape, 2),
        expr=torch.zeros(shape, dtype=torch.int64),
        au=torch.zeros(*shape, NUM_AUS),
        va_mask=torch.zeros(shape, dtype=torch.bool),
        expr_mask=torch.zeros(shape, dtype=torch.bool),
        au_mask=torch.zeros(*shape, NUM_AUS, dtype=torch.bool),
    )
