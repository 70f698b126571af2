"""What becomes of the cells of a picture: one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist.features.options import Pool
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.face_nets import Embedding
from mtl_dist.models.per_frame import channels_last


class Pooled(nn.Module):
    """A backbone, and how its cells are pooled: images (N, 3, H, W), normalised as for ImageNet -> (N, width).

    `embedding` is for the pool of that name.
    """

    def __init__(self, backbone: Backbone, pool: Pool, embedding: Embedding | None = None):
        super().__init__()
        self.backbone, self.pool, self.embedding = backbone, pool, embedding

    def forward(self, images: Tensor) -> Tensor:
        images = channels_last(images)
        if self.pool == "cls":
            return self.backbone.class_token(images)
        cells = self.backbone(images)
        if self.pool == "embedding":
            return self.embedding(cells)
        flat = cells.flatten(2)
        pooled = {"mean": lambda: flat.mean(2), "max": lambda: flat.amax(2)}
        kinds = ("mean", "max") if self.pool == "mean_max" else (self.pool,)
        return torch.cat([pooled[kind]() for kind in kinds], dim=1)

    def width(self, size: int) -> int:
        """Return how many numbers it makes of an image of `size` pixels a side. Raises `InputError`."""
        self.eval()
        with torch.inference_mode():
            return self(torch.zeros(1, 3, size, size)).shape[1]
