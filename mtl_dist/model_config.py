"""The settings of models, `model.` of the configuration tree: those of all, and of each family its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mtl_dist.families import FAMILIES, check_backbone_name, describe_backbones, describe_families
from mtl_dist.settings import Section, Varies

MAX_SIDE = 2048  # of an image, in pixels


class MaskedConfig(Section):
    """What a masked autoencoder has beside its backbone (arXiv 2111.06377)."""

    share: Annotated[float, Varies.BY_RUN] = Field(0.75, gt=0, lt=1)
    """Share of an image's patches that are hidden."""
    normalise: bool = True
    """Tell the pixels of a patch in units of its own deviation, from its own mean."""
    decoder_width: int = Field(512, ge=8, le=2**13)
    decoder_depth: int = Field(8, ge=1, le=64)
    decoder_heads: int = Field(16, ge=1, le=256)

    @model_validator(mode="after")
    def _fits_together(self):
        if self.decoder_width % (4 * self.decoder_heads):
            raise ValueError(
                f"decoder_width {self.decoder_width} is no multiple of 4 x decoder_heads {self.decoder_heads}"
            )
        return self


class TwoLevelConfig(Section):
    """Parts of system D that can be switched off (arXiv 1811.12139)."""

    position_attention: bool = True
    """Enhance every map where a learned mask says."""
    layer_attention: bool = True
    """Weigh the maps' vectors by a two-way GRU and self-attention; without, all are taken as one vector."""
    categorical_feedback: bool = True
    """Tell valence and arousal from what expressions are told from, too."""
    detach_categorical: bool = False
    """Without gradients from valence and arousal to it."""


class ModelConfig(Section):
    name: Literal[*FAMILIES] = Field("a", description=describe_families())
    backbone: Annotated[str, AfterValidator(check_backbone_name)] = Field(
        "inception_v3", description=describe_backbones()
    )
    weights: Annotated[str, Varies.BY_RUN] = "imagenet"
    """The backbone's: imagenet (downloaded), a file or s3:// URI of a state dict, one of our runs or checkpoints, whose
    backbone is taken, or none: random initialisation."""
    freeze_backbone: bool = False
    """Train what comes after the backbone only; its weights and BatchNorm statistics stay as they are."""
    image_size: int | None = Field(None, ge=32, le=MAX_SIDE)
    """Side of the model's input after cropping on the device; None: data.image_size."""
    hidden: int = Field(4096, ge=1, le=2**16)
    """Width of two fully connected layers."""
    dropout: Annotated[float, Varies.BY_RUN] = Field(0.3, ge=0, lt=1)
    drop_path: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, lt=1)
    """Of a ViT of ours, or a network of timm that knows it: how often its last block is left out in training; earlier
    ones less often, in proportion."""
    masked: MaskedConfig = MaskedConfig()
    two_level: TwoLevelConfig = TwoLevelConfig()
