"""The challenge's baseline: VGG16's convolutions, frozen, and fully connected layers for all tasks.

inputs -> backbone -> max-pool, mean over cells -> two fully connected layers -> one layer of 2 + 8 + 12 outputs
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist.models.backbone import Backbone
from mtl_dist.models.per_frame import PerFrame
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Outputs

MAX_CELLS = 7  # a side, as in torchvision's VGG
CELL_PIXELS = 32  # a side, after the max-pool


class Baseline(PerFrame):
    """VGG's classifier (arXiv 1409.1556) over a backbone; its last layer serves all tasks (arXiv 2202.10659).

    The paper trains the fully connected layers alone: `model.freeze_backbone`, as the presets have it. VA is bounded by
    tanh, as in our other models. `input_size` is the side of the images in pixels; 224 where it is not given.

    torchvision always pools to 7 x 7 cells, also where an image has fewer. Here there are as many cells as the image
    has, 3 x 3 for 112 pixels. A linear layer over these can compute whatever one over pooled cells can, with fewer
    weights.
    """

    def __init__(self, backbone: Backbone, *, dropout: float, hidden: int, input_size: int | None):
        super().__init__()
        cells = min(MAX_CELLS, max(1, (input_size or MAX_CELLS * CELL_PIXELS) // CELL_PIXELS))
        self.backbone = backbone
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(cells), nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(backbone.num_channels * cells**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )
        self.outputs = nn.Linear(hidden, 2 + NUM_EXPRESSIONS + NUM_AUS)
        for linear in (self.hidden[0], self.hidden[3]):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)

    def predict_images(self, images: Tensor) -> Outputs:
        outputs = self.outputs(self.hidden(self.pool(self.backbone(images))))
        va, expr, au = outputs.split((2, NUM_EXPRESSIONS, NUM_AUS), dim=-1)
        return Outputs(torch.tanh(va), expr, au)
