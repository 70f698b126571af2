"""What a step draws at random, keyed by where it is: augmentation by rows, dropout by the micro-batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_dist.data.augment import Preparation


def draw_passes(prepare: Preparation, rows: Tensor, *, seed: int, epoch: int, passes: int) -> Tensor:
    """Draw what rows (B, T) are prepared with: (B, T, n).

    The batch is `passes` equal parts, such as one a task. A row that is in several has other draws in each.
    """
    parts = enumerate(rows.tensor_split(passes))
    return torch.cat([prepare.draw(part, seed=seed, epoch=epoch * passes + number) for number, part in parts])


def seed_dropout(seed: int, step: int, rank: int, part: int) -> None:
    """Key torch's generator, which only dropout draws from, by (seed, step, rank, part): there is no state to save."""
    (key,) = np.random.SeedSequence([seed, step, rank, part]).generate_state(1, np.uint64)
    torch.manual_seed(int(key >> np.uint64(1)))
