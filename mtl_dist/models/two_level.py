"""System D, 2Att-2Mt (Wang et al. 2018, arXiv 1811.12139): two levels of attention, and expressions come before VA.

No code, sizes or losses were published but the abstract: all below it are our reading.

backbone -> a map a resolution -> attention to positions -> a vector a map -> attention to layers -> z
z -> expressions                    c = relu(W z), logits of c
z, c -> valence and arousal         tanh(W relu(W [z; c]))
z -> action units                   which the paper has not; ours
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError
from mtl_dist.model_config import TwoLevelConfig
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.per_frame import PerFrame
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Outputs

WIDTH = 256  # of the vector of a map, and of z
HIDDEN = 128  # of what expressions, and valence and arousal, are told from


class PositionAttention(nn.Module):
    """Where to look in a map: (N, C, h, w) -> the map, enhanced there, and the places (N, 1, h, w) in [0, 1]."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 8, 1)
        self.score = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, 1, 1),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.sigmoid(self.score(features))
        return features * (1 + places), places


class LayerAttention(nn.Module):
    """Which layers to listen to: (N, L, WIDTH) -> (N, WIDTH), the mean of a two-way GRU's states by learned weights.

    Structured self-attention of one hop (Lin et al. 2017, arXiv 1703.03130).
    """

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, layers: Tensor) -> Tensor:
        states, _ = self.gru(layers)
        return (self.score(torch.tanh(self.key(states))).softmax(1) * states).sum(1)


class AllLayers(nn.Module):
    """What stands in the place of `LayerAttention` without it: (N, L, WIDTH) -> (N, WIDTH), of all vectors as one."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.linear = nn.Linear(num_layers * WIDTH, WIDTH)

    def forward(self, layers: Tensor) -> Tensor:
        return torch.relu(self.linear(layers.flatten(1)))


class TwoLevelNet(PerFrame):
    """System D. The parts of `two_level` can be switched off one by one."""

    def __init__(self, backbone: Backbone, *, dropout: float, two_level: TwoLevelConfig, input_size: int):
        super().__init__()
        channels = _count_channels(backbone, input_size)
        self.backbone, self.config = backbone, two_level
        self.positions = nn.ModuleList(
            PositionAttention(count) if two_level.position_attention else nn.Identity() for count in channels
        )
        self.vectors = nn.ModuleList(nn.Sequential(nn.Linear(count, WIDTH), nn.LayerNorm(WIDTH)) for count in channels)
        self.layers = LayerAttention() if two_level.layer_attention else AllLayers(len(channels))
        self.dropout = nn.Dropout(dropout)
        self.categorical = nn.Linear(WIDTH, HIDDEN)
        self.expr = nn.Linear(HIDDEN, NUM_EXPRESSIONS)
        self.dimensional = nn.Linear(WIDTH + HIDDEN * two_level.categorical_feedback, HIDDEN)
        self.va = nn.Linear(HIDDEN, 2)
        self.au = nn.Linear(WIDTH, NUM_AUS)

    def predict_images(self, images: Tensor) -> Outputs:
        vectors = []
        for features, positions, vector in zip(self.backbone.pyramid(images), self.positions, self.vectors):
            enhanced = positions(features)[0] if self.config.position_attention else features
            vectors.append(torch.relu(vector(enhanced.mean((2, 3)))))
        z = self.dropout(self.layers(torch.stack(vectors, 1)))
        c = torch.relu(self.categorical(z))
        told = c.detach() if self.config.detach_categorical else c
        d = torch.relu(self.dimensional(torch.cat([z, told], 1) if self.config.categorical_feedback else z))
        return Outputs(torch.tanh(self.va(d)), self.expr(c), self.au(z))


def _count_channels(backbone: Backbone, input_size: int) -> list[int]:
    """Run the backbone once to find its maps. Raises `InputError` where there are not two at least."""
    was_training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        maps = backbone.pyramid(torch.zeros(1, 3, input_size, input_size))
    backbone.train(was_training)
    if len(maps) < 2:
        raise InputError(
            "model.name d attends to several maps of a backbone, and this one has one; give another --model.backbone"
        )
    return [features.shape[1] for features in maps]
