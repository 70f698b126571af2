"""The families of models and the backbones, by the names that configurations give them. Imports nothing heavy.

What is built for a name is in `models/`: `MODELS` and `BACKBONES`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mtl_dist.errors import nearest


class Family(NamedTuple):
    """A family of models: what is told of it, and what its class is built with."""

    title: str  # in tables
    what: str  # in a sentence
    paper: str
    reads: tuple[str, ...]  # settings of `model.` that are its own: given to its class by these names


class BackboneName(NamedTuple):
    """A backbone of ours."""

    what: str
    min_size: int = 1  # pixels a side of the images: below it nothing is left to pool


# In the order of the papers' tables.
FAMILIES: dict[str, Family] = {
    "baseline": Family(
        "baseline",
        "the challenge's baseline, fully connected layers over the backbone's features",
        "Kollias 2022, arXiv 2202.10659",
        reads=("dropout", "hidden"),
    ),
    "b": Family(
        "B (SMM-EmotionNet)",
        "SMM-EmotionNet, the parent of A",
        "Deng 2022, arXiv 2203.12845",
        reads=("dropout",),
    ),
    "a": Family(
        "A",
        "the members of the ensemble system",
        "Haider et al. 2022, arXiv 2207.10878",
        reads=("dropout",),
    ),
}

OWN_BACKBONES: dict[str, BackboneName] = {
    "inception_v3": BackboneName("what a and b were published with", min_size=75),
    "vgg16": BackboneName("the baseline's"),
    # It stands for InceptionV3: what runs with it runs with both.
    "small": BackboneName("InceptionV3's place on a laptop", min_size=75),
    "vgg_small": BackboneName("VGG16's place on a laptop"),
}
LIBRARIES = ("torchvision", "timm")


def describe_families() -> str:
    """What the help says of `model.name`."""
    return "; ".join(f"{name}: {family.what} ({family.paper})" for name, family in reversed(FAMILIES.items()))


def describe_backbones() -> str:
    """What the help says of `model.backbone`."""
    own = "; ".join(f"{name}: {backbone.what}" for name, backbone in OWN_BACKBONES.items())
    return (
        f"{own}; or any of a library: torchvision:convnext_tiny, timm:vit_small_patch16_224. Libraries' end where a "
        "cell is 16 x 16 pixels at most."
    )


def check_backbone_name(name: str) -> str:
    """Return the name of a backbone. Raises ValueError, with the nearest of ours, for what can be none."""
    library, colon, variant = name.partition(":")
    if not colon and name not in OWN_BACKBONES:
        raise ValueError(
            f"{nearest(name, OWN_BACKBONES)}; is it a library's? then timm:{name} or torchvision:{name}"
            if re.fullmatch(r"[\w.\-]+", name)
            else f"{nearest(name, OWN_BACKBONES)}; or torchvision:NAME, timm:NAME"
        )
    if colon and (library not in LIBRARIES or not re.fullmatch(r"[\w.\-]+", variant)):
        raise ValueError("expected torchvision:NAME or timm:NAME, such as timm:convnext_tiny")
    return name


def min_input_size(backbone: str) -> int:
    """Return the least side in pixels of a backbone's images; a library's is found out by building it."""
    return OWN_BACKBONES[backbone].min_size if backbone in OWN_BACKBONES else 1
