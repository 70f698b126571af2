"""Vision transformers that masked pre-training begins with (Dosovitskiy et al. 2021, arXiv 2010.11929).

Built of timm's parts: the names after `net.model.` are timm's, which facebookresearch's MAE has too. Positions begin as
the fixed sines of MAE (He et al. 2022, arXiv 2111.06377); images are normalised by ImageNet's statistics.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mtl_dist.families import patch_size
from mtl_dist.models.backbone import Backbone

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Size(NamedTuple):
    """Width and depth of a transformer."""

    width: int
    depth: int
    heads: int


SIZES = {
    "vit_base": Size(768, 12, 12),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(128, 6, 4),
}


class ViT(Backbone):
    """A vision transformer without a classifier: (N, 3, H, W) -> its patches' tokens, (N, width, H / p, W / p)."""

    library_prefix = "net.model."

    def __init__(self, name: str, input_size: int, *, drop_path: float = 0.0):
        size, patch = SIZES[name], patch_size(name)
        super().__init__({"net": Tokens(size, patch, input_size, drop_path)}, num_channels=size.width)
        self.patch = patch

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps after each third of the blocks: all are of one resolution."""
        return self.net.thirds(images)

    def class_token(self, images: Tensor) -> Tensor:
        return self.net.model.forward_features(images)[:, 0]


class Tokens(nn.Module):
    """The transformer; what it makes of every patch, laid out as the grid they come from."""

    def __init__(self, size: Size, patch: int, input_size: int, drop_path: float):
        super().__init__()
        self.model = VisionTransformer(
            img_size=input_size,
            patch_size=patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            num_classes=0,
            drop_path_rate=drop_path,
            norm_layer=LAYER_NORM,
        )
        init_like_mae(self.model)
        with torch.no_grad():
            self.model.pos_embed.copy_(sine_positions(size.width, input_size // patch))

    def thirds(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens after each third of the blocks, through the last norm, as maps."""
        depth = len(self.model.blocks)
        indices = [depth // 3 - 1, 2 * depth // 3 - 1, depth - 1]
        return tuple(self.model.forward_intermediates(images, indices=indices, norm=True, intermediates_only=True))

    def forward(self, images: Tensor) -> Tensor:
        cells = self.model.patch_embed.grid_size
        return self.model.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, cells)


def sine_positions(width: int, cells: int) -> Tensor:
    """Return MAE's positions (1, 1 + cells^2, width): half of the width for the column, then half for the row.

    Each half is sines, then cosines, of 1 / 10000^(i / (width / 4)); the class token's are 0.
    """
    frequencies = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.divmod(np.arange(cells**2), cells)
    parts = []
    for place in (columns, rows):
        angles = np.outer(place, frequencies)
        parts += [np.sin(angles), np.cos(angles)]
    positions = np.concatenate([np.zeros((1, width)), np.concatenate(parts, axis=1)])
    return torch.from_numpy(positions).float()[None]


def init_like_mae(module: nn.Module) -> None:
    """Draw weights as MAE does: Xavier's uniform for linear layers and patches, normal of 0.02 for the class token."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d):  # of the patches
            nn.init.xavier_uniform_(child.weight.view(len(child.weight), -1))
            nn.init.zeros_(child.bias)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
