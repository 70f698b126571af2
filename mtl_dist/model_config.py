"""The settings of models, `model.` of the configuration tree: those of all, and of each family its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mtl_dist.families import FAMILIES, check_backbone_name, describe_backbones, describe_families, families_of
from mtl_dist.settings import Section, Varies

MAX_SIDE = 2048  # of an image, in pixels
# What a sequence model tells one by one, in this order, and the task whose loss each has.
PARTS = {"v": "va", "a": "va", "expr": "expr", "au": "au"}
Part = Literal[*PARTS]
RECURRENT = ("lstm", "gru")


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


class SequenceConfig(Section):
    """What system C has beside its backbone (arXiv 2207.09373, and its code)."""

    encoder: Literal["transformer", "lstm", "gru", "tcn", "frame"] = "transformer"
    """What reads a sequence. tcn: dilated convolutions, which see as much after a row as before it. frame: no row knows
    of another; what the others bring is to be compared with it."""
    bidirectional: bool = False
    """Of lstm and gru: read both ways. Each way is `hidden` wide."""
    framework: Literal["share", "share_bottom"] = "share"
    """share: all tasks are told from one encoder. share_bottom: its last layers are each task's own."""
    feed_source: tuple[Part, ...] = ()
    """Whose hidden states, before their last layer, are fed to others, without gradients to them."""
    feed_target: tuple[Part, ...] = ()
    """Who is fed with them, beside what all are told from."""
    hidden: int = Field(1024, ge=1, le=2**14)
    """Width of the encoder."""
    layers: int = Field(4, ge=1, le=64)
    private_layers: int = Field(3, ge=1, le=63)
    """Of share_bottom: so many of the layers are each task's own."""
    heads: int = Field(16, ge=1, le=256)
    """Of a transformer's attention. A task that is fed is wider, and has more heads of the same width."""
    ffn: int = Field(2048, ge=1, le=2**15)
    """Width inside a transformer's layers."""
    head_widths: tuple[Annotated[int, Field(ge=1, le=2**14)], ...] = Field((512, 256), min_length=1, max_length=8)
    """Widths of the fully connected layers of each task, before its last."""
    window: int = Field(64, ge=2, le=2**14)
    """Rows of a training sample. In evaluation transformer and tcn read windows of as many that overlap by half, and
    lstm and gru the whole video."""
    context: int = Field(0, ge=0, le=2**14)
    """Rows before a training sample's that are read with it and not learned from."""
    dims: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = ()
    """Widths of the feature sets that model.backbone features reads side by side. Filled in from data.train."""

    @field_validator("feed_source", "feed_target")
    @classmethod
    def _in_order(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(parts)) < len(parts):
            raise ValueError("expected each of them once")
        return tuple(part for part in PARTS if part in parts)

    @model_validator(mode="after")
    def _fits_together(self):
        both = set(self.feed_source) & set(self.feed_target)
        if both:
            raise ValueError(
                f"feed_source and feed_target both have {', '.join(sorted(both))}: what is fed is told first; leave "
                "it out of one of them"
            )
        if bool(self.feed_source) != bool(self.feed_target):
            given, missing = ("feed_source", "feed_target") if self.feed_source else ("feed_target", "feed_source")
            raise ValueError(f"{given} is given and {missing} is empty: give both, or neither")
        if self.framework == "share_bottom" and self.private_layers >= self.layers:
            raise ValueError(
                f"private_layers is {self.private_layers} and layers {self.layers}: no layer would be left to share; "
                "give fewer private ones, or framework share"
            )
        if self.bidirectional and self.encoder not in RECURRENT:
            raise ValueError(f"bidirectional is for {' and '.join(RECURRENT)}, and encoder is {self.encoder}")
        if self.encoder == "transformer":
            self._check_heads()
        return self

    def _check_heads(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is no multiple of heads {self.heads}")
        width, fed = self.hidden // self.heads, len(self.feed_source) * self.head_widths[-1]
        if self.framework == "share_bottom" and fed % width:
            raise ValueError(
                f"feed_target's layers would be {self.hidden + fed} wide (hidden {self.hidden}, and "
                f"{self.head_widths[-1]} of each of {len(self.feed_source)} sources): no multiple of a head's {width} "
                "(hidden / heads); change heads or the last of head_widths"
            )


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
    sequence: SequenceConfig = SequenceConfig()

    @model_validator(mode="after")
    def _takes_the_backbone(self):
        only, takers = FAMILIES[self.name].backbones, families_of(self.backbone)
        if only and self.backbone not in only:
            raise ValueError(f"name {self.name} takes no model.backbone {self.backbone}; expected {' or '.join(only)}")
        if self.name not in takers:
            raise ValueError(
                f"backbone {self.backbone} is for model.name {' or '.join(takers)}, not {self.name}; give a backbone "
                "of images, or that model"
            )
        return self
