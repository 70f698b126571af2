"""Which patches of an image a masked autoencoder hides: a pure function of (seed, epoch, row).

A row's patches are put in an order by 64-bit numbers, which are compared as integers: 24-bit fractions have ties, which
devices sort differently. A patch's place in that order travels as a fourth channel of its image, so that a batch is cut
and moved as any other; the model hides the patches of the last places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.data.augment import ImagePreparation, build_image_preparation, draw_bits
from mtl_dist.families import patch_size
from mtl_dist.tasks import Batch

MASKS = 1  # keeps these draws apart from those of augmentation


@dataclass(frozen=True)
class MaskedPreparation:
    """Prepares images as others do, and puts the places of their patches beside them."""

    images: ImagePreparation
    patch: int  # pixels a side
    seed: int

    def draw(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Return what is drawn for rows (B, T): (B, T, n) float32, of augmentation and then a place for every patch."""
        places = self._places(rows, seed=seed, epoch=epoch)
        return torch.cat([self.images.draw(rows, seed=seed, epoch=epoch), places], dim=-1)

    def __call__(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """Return (B, T, 4, H, W) float32. Evaluation hides what epoch 0 does."""
        if draws is None:
            images = self.images(batch, None)
            places = self._places(batch.rows, seed=self.seed, epoch=0).to(images.device)
        else:
            places = draws[..., -self._num_patches :]
            images = self.images(batch, draws[..., : -self._num_patches])
        cells = self.images.size // self.patch
        grid = places.unflatten(-1, (1, cells, cells)).repeat_interleave(self.patch, -1)
        return torch.cat([images, grid.repeat_interleave(self.patch, -2)], dim=2)

    @property
    def _num_patches(self) -> int:
        return (self.images.size // self.patch) ** 2

    def _places(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        return torch.from_numpy(draw_places(rows, self._num_patches, seed=seed, epoch=epoch)).float()


def build_masked_preparation(config: Config) -> MaskedPreparation:
    """Build what the inputs of a masked autoencoder are prepared by."""
    images, patch = build_image_preparation(config), patch_size(config.model.backbone)
    return MaskedPreparation(images, patch, config.run.seed)


def draw_places(rows: Tensor, num_patches: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the place of every patch of rows (...) in the order of hiding: (..., L), each 0 to L - 1 once."""
    bits = draw_bits(rows, num_patches, seed=seed, epoch=epoch, purpose=MASKS)
    return bits.argsort(-1, kind="stable").argsort(-1, kind="stable")
