"""Systems A and B: single images; one set of parts, two sets of heads.

inputs -> backbone -> attention maps -> 17 region embeddings -+-> transformer -> AU: one classifier a region
                                                              +-> projections -> EXPR and VA: mean over regions
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_dist.models.backbone import Backbone
from mtl_dist.models.heads import AUHead, RegionMeanHead
from mtl_dist.models.per_frame import PerFrame, channels_last
from mtl_dist.models.regions import (
    EMBEDDING_DIM,
    RegionEmbeddings,
    RegionLinear,
    RegionTransformer,
    SpatialAttention,
)
from mtl_dist.tasks import NUM_EXPRESSIONS, Outputs


class EmotionNet(PerFrame):
    """What A and B share; the EXPR and VA heads' hidden widths and B's unused prediction head are what differs."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        dropout: float,
        expr_hidden: Sequence[int],
        va_hidden: Sequence[int],
        prediction_head: bool,
    ):
        super().__init__()
        self.backbone = backbone
        self.attention = SpatialAttention(backbone.num_channels, prediction_head=prediction_head)
        self.regions = RegionEmbeddings(backbone.num_channels)
        self.transformer = RegionTransformer(dropout=dropout)
        self.projections = RegionLinear(EMBEDDING_DIM, EMBEDDING_DIM, bias=False)
        self.heads = nn.ModuleDict(
            {
                "va": RegionMeanHead((EMBEDDING_DIM, *va_hidden, 2)),
                "expr": RegionMeanHead((EMBEDDING_DIM, *expr_hidden, NUM_EXPRESSIONS)),
                "au": AUHead(EMBEDDING_DIM),
            }
        )

    def predict_images(self, images: Tensor) -> Outputs:
        """VA is bounded by tanh, which is ours: the papers regress without saying how they stay in [-1, 1]."""
        features = self.backbone(images)
        embeddings = self.regions(features, self.attention(features))
        tokens = self.transformer(embeddings)
        projected = self.projections(embeddings)
        return Outputs(
            va=torch.tanh(self.heads["va"](projected)),
            expr_logits=self.heads["expr"](projected),
            au_logits=self.heads["au"](tokens),
        )

    def attention_maps(self, images: Tensor) -> Tensor:
        """Return the spatial attention of every region, (N, 17, h, w) in [0, 1], of normalised (N, 3, H, W) images."""
        return self.attention(self.backbone(channels_last(images)))


class EnsembleNet(EmotionNet):
    """System A: one member of the ensemble (Haider et al. 2022, arXiv 2207.10878).

    The paper says three fully connected layers for EXPR and two for VA; the widths 16 -> 512 -> 128 -> 8 and
    16 -> 128 -> 2 are our reading. As in B they read every region's projected embedding before the transformer
    and average over regions.
    """

    def __init__(self, backbone: Backbone, *, dropout: float, input_size: int | None = None):
        super().__init__(backbone, dropout=dropout, expr_hidden=(512, 128), va_hidden=(128,), prediction_head=False)


class SMMEmotionNet(EmotionNet):
    """System B (Deng 2022, arXiv 2203.12845): linear heads; 2,402,397 parameters after the InceptionV3 backbone."""

    def __init__(self, backbone: Backbone, *, dropout: float, input_size: int | None = None):
        super().__init__(backbone, dropout=dropout, expr_hidden=(), va_hidden=(), prediction_head=True)
