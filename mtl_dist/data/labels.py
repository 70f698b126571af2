"""The row numbers and labels of samples as one table, and what a batch has of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mtl_dist.tasks import NUM_AUS, Labels

# A sample's row number and labels side by side, as float64, which holds every row number that occurs exactly: a batch
# picks them with one copy a sample, and converts them all at once.
_WIDTHS = {"row": 1, "va": 2, "expr": 1, "au": NUM_AUS, "va_mask": 1, "expr_mask": 1, "au_mask": NUM_AUS}
_ROW, _VA, _EXPR, _AU, _VA_MASK, _EXPR_MASK, _AU_MASK = (
    slice(end - width, end) if width > 1 else end - 1
    for width, end in zip(_WIDTHS.values(), accumulate(_WIDTHS.values()))
)
TABLE_WIDTH = sum(_WIDTHS.values())
NO_ROW = np.array([-1.0] + [0.0] * (TABLE_WIDTH - 1))  # what padding has: row -1, and no labels


def make_table(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the row numbers and labels of n rows, arrays as of a `Sidecar`: (n, TABLE_WIDTH) float64."""
    return np.column_stack([arrays[name] for name in _WIDTHS]).astype(np.float64)


def split_table(table: np.ndarray) -> tuple[Labels, Tensor]:
    """Return the labels and the row numbers of (B, T, TABLE_WIDTH)."""
    # Converted and cut as arrays: a torch operation costs several of numpy's at this size.
    integers, floats, flags = (table.astype(dtype) for dtype in (np.int64, np.float32, bool))
    labels = Labels(
        va=torch.from_numpy(floats[..., _VA]),
        expr=torch.from_numpy(integers[..., _EXPR]),
        au=torch.from_numpy(floats[..., _AU]),
        va_mask=torch.from_numpy(flags[..., _VA_MASK]),
        expr_mask=torch.from_numpy(flags[..., _EXPR_MASK]),
        au_mask=torch.from_numpy(flags[..., _AU_MASK]),
    )
    return labels, torch.from_numpy(integers[..., _ROW])
