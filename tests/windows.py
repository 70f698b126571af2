"""Made-up samples of several frames, some of them padding; and the same frames without it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Batch, Labels

LENGTHS = (3, 1, 4, 2, 4, 1)
DIMS = (5, 3)  # widths of two sets of features, which training finds in its data


def all_valid(inputs: Tensor) -> Tensor:
    """Say of (B, T, ...) inputs that no frame is padding: (B, T)."""
    return torch.ones(inputs.shape[:2], dtype=torch.bool)


def make_windows(shape: tuple[int, ...], *, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, dtype=torch.float32):
    """Return a batch of samples of so many frames, each of `shape`: on padding is what would spoil everything."""
    g, T = torch.Generator().manual_seed(seed), max(lengths)
    size = len(lengths)
    valid = torch.arange(T) < torch.tensor(lengths)[:, None]
    if dtype == torch.uint8:
        inputs = torch.randint(256, (size, T, *shape), generator=g, dtype=dtype)
    else:
        inputs = torch.randn(size, T, *shape, generator=g, dtype=dtype)
        inputs[~valid] = float("nan")
    labels = Labels(
        va=torch.rand(size, T, 2, generator=g) * 2 - 1,
        expr=torch.randint(0, NUM_EXPRESSIONS, (size, T), generator=g),
        au=torch.randint(0, 2, (size, T, NUM_AUS), generator=g).float(),
        va_mask=(torch.rand(size, T, generator=g) < 0.8) & valid,
        expr_mask=(torch.rand(size, T, generator=g) < 0.8) & valid,
        au_mask=(torch.rand(size, T, NUM_AUS, generator=g) < 0.8) & valid[..., None],
    )
    rows = torch.where(valid, torch.randperm(size * T, generator=g).reshape(size, T), -1)
    return Batch(inputs, valid, labels, rows, torch.arange(size) + 10)


def frames_alone(batch: Batch) -> Batch:
    """Return the frames of a batch that are there, each as a sample of one frame."""
    valid = batch.valid
    labels = Labels(*(tensor[valid][:, None] for tensor in batch.labels))
    rows = batch.rows[valid]
    return Batch(batch.inputs[valid][:, None], all_valid(rows[:, None]), labels, rows[:, None], rows)


def as_windows(batch: Batch, length: int) -> Batch:
    """Put the single images of a batch together as samples of up to `length` frames; the last is padded."""
    missing = -len(batch.samples) % length

    def put(tensor: Tensor, filling: float = 0) -> Tensor:
        padding = tensor.new_full((missing, *tensor.shape[1:]), filling)
        return torch.cat([tensor, padding]).reshape(-1, length, *tensor.shape[2:])

    inputs, valid, labels, rows, samples = batch
    return Batch(put(inputs, 255), put(valid), Labels(*map(put, labels)), put(rows, -1), samples[::length])
