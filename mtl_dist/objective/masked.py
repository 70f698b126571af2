"""What a masked autoencoder learns: the pixels of hidden patches (He et al. 2022, arXiv 2111.06377).

loss = sum over hidden patches of all ranks of the mean square over their pixels / number of these patches
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.families import patch_size
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.losses import Sums
from mtl_dist.objective.scores import MASKED
from mtl_dist.tasks import IMAGENET_MEAN, IMAGENET_STD, Batch, Reconstruction

TERM = "masked"
EPS = 1e-6  # of a patch's variance
NUM_SHOWN = 8  # frames that a meter keeps for the picture


class Masked:
    """The objective (`losses.Objective`) of masked pre-training. Sums (2,): squared errors, each the mean over a hidden
    patch, and the number of these patches."""

    terms = (TERM,)

    @classmethod
    def build(cls, config: Config, counts: LabelCounts) -> Masked:
        patch = patch_size(config.model.backbone)
        return cls(size=config.input_size, patch=patch, normalises=config.model.masked.normalise)

    def __init__(self, *, size: int, patch: int, normalises: bool):
        self.fixed, self.after = {TERM: 1.0}, {}
        self.patch, self.normalises = patch, normalises
        self.num_patches, self.pixels = (size // patch) ** 2, 3 * patch**2

    def begin_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    def sums(self, outputs: Reconstruction, batch: Batch) -> Sums:
        target = wanted_pixels(outputs.patches, normalises=self.normalises)
        errors = (outputs.predicted.float() - target).square().mean(-1)
        # where, not a product: what is not finite in a patch that is seen must not poison the sum.
        total = torch.where(outputs.hidden, errors, 0.0).double().sum()
        return {TERM: torch.stack([total, outputs.hidden.double().sum()])}

    def weight(self, term: str, total: Tensor) -> Tensor:
        return total[1]

    def loss(self, term: str, total: Tensor) -> Tensor:
        return total[0] / total[1].detach()

    def taught(self, total: Sums) -> Sums:
        return {}

    def meter(self, *, num_shown: int = NUM_SHOWN) -> MaskedMeter:
        """Return a meter that keeps so many frames for its picture."""
        return MaskedMeter(self, num_shown)


class MaskedMeter:
    """Adds up the losses of frames, and what the best constant picture needs (`losses.Meter`)."""

    def __init__(self, objective: Masked, num_shown: int):
        self._objective, self._num_shown = objective, num_shown
        self._bad_rows: list[int] = []
        # Of the loss 2, then L counts of hidden patches, L x 3pp of their pixels, and L of their squares.
        self._sums = np.zeros(2 + objective.num_patches * (2 + objective.pixels))
        self._shown: list[list[np.ndarray]] = []

    def add(self, outputs: Reconstruction, batch: Batch) -> None:
        rows = batch.rows[batch.valid.cpu()]
        finite = outputs.predicted.isfinite().flatten(1).all(1).cpu()
        self._bad_rows += rows[~finite].tolist()
        loss = self._objective.sums(outputs, batch)[TERM]
        target = wanted_pixels(outputs.patches, normalises=self._objective.normalises)
        target = torch.where(outputs.hidden[..., None], target, 0.0).double()
        of_places = (outputs.hidden.double().sum(0), target.sum(0).flatten(), target.square().mean(-1).sum(0))
        self._sums += torch.cat([loss, *of_places]).cpu().numpy()
        if (room := self._num_shown - sum(len(shown[0]) for shown in self._shown)) > 0:
            self._shown.append([tensor[:room].cpu().float().numpy() for tensor in outputs])

    def bad_rows(self) -> list[int]:
        return self._bad_rows

    def sums(self) -> np.ndarray:
        return self._sums

    def scores(self, total: np.ndarray) -> dict[str, Any]:
        return _named(total[0] / max(total[1], 1), total)

    def floor(self, total: np.ndarray) -> dict[str, Any]:
        """Return the loss of the best constant picture: at every place the mean of what is hidden there."""
        num, pixels = self._objective.num_patches, self._objective.pixels
        count, sums, squares = np.split(total[2:], [num, num * (1 + pixels)])
        of_means = np.square(sums.reshape(num, pixels)).mean(1) / np.maximum(count, 1)
        return _named((squares - of_means).sum() / max(total[1], 1), total)

    def pictures(self) -> dict[str, np.ndarray]:
        """Return {"masked": (n H, 3 W, 3) uint8}: of some frames the picture, what is seen of it, and what is told."""
        if not self._shown:
            return {}
        predicted, patches, hidden = (np.concatenate(parts) for parts in zip(*self._shown))
        is_hidden = hidden[..., None] > 0
        if self._objective.normalises:  # told is what a patch is beside its own mean and deviation: those are lent
            predicted = predicted * patches.std(-1, ddof=1, keepdims=True) + patches.mean(-1, keepdims=True)
        seen = np.where(is_hidden, 0.0, patches)
        told = np.where(is_hidden, predicted, patches)
        columns = [join_patches(values, self._objective.patch) for values in (patches, seen, told)]
        pixels = np.concatenate(columns, axis=2) * IMAGENET_STD + IMAGENET_MEAN
        return {TERM: (pixels.clip(0, 1) * 255).round().astype(np.uint8).reshape(-1, *pixels.shape[2:])}


def join_patches(patches: np.ndarray, patch: int) -> np.ndarray:
    """Put patches (n, L, 3pp) together to images (n, H, W, 3)."""
    cells = round(patches.shape[1] ** 0.5)
    parts = patches.reshape(-1, cells, cells, patch, patch, 3)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(-1, cells * patch, cells * patch, 3)


def _named(loss: float, total: np.ndarray) -> dict[str, Any]:
    return {MASKED.key: float(loss), "frames": {TERM: int(total[1])}, "covers": [TERM]}


def wanted_pixels(patches: Tensor, *, normalises: bool) -> Tensor:
    """Return what is to be told of patches (n, L, 3pp): their pixels, or these in units of each patch's deviation."""
    patches = patches.float()
    if not normalises or not len(patches):
        return patches
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + EPS).sqrt()
