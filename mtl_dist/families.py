"""The families of models and the backbones, by the names that configurations give them. Imports nothing heavy.

A new family is a file in `models/` and an entry here.
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
    built_by: str  # its class, MODULE:CLASS in `models/`
    reads: tuple[str, ...]  # settings of `model.` that are its own: given to its class by these names
    objective: str = "affect"  # what it is trained for, of `OBJECTIVES`
    shared: str = ""  # its submodule that makes the last tensor all tasks share
    backbones: tuple[str, ...] = ()  # the only ones that it takes; none: any


class ObjectiveName(NamedTuple):
    """What models are trained for."""

    built_by: str  # its class, MODULE:CLASS in `objective/`
    prepared_by: str  # what makes its models' inputs, MODULE:FUNCTION in `data/`
    score: str  # the key of the score that its checkpoints compete by
    reads_labels: bool
    ignores: tuple[str, ...] = ()  # settings and sections that nothing of it reads


class BackboneName(NamedTuple):
    """A backbone of ours."""

    what: str
    min_size: int = 1  # pixels a side of the images: below it nothing is left to pool
    patch: int = 0  # pixels a side of a ViT's patches
    families: tuple[str, ...] = ()  # the only ones that take it; none: any
    prepared_by: str = ""  # what makes its inputs, in the place of the objective's
    ignores: tuple[str, ...] = ()  # settings and sections that nothing reads where it is chosen


OBJECTIVES: dict[str, ObjectiveName] = {
    "affect": ObjectiveName("affect:Affect", "augment:build_image_preparation", "p", reads_labels=True),
    "masked": ObjectiveName(
        "masked:Masked",
        "masks:build_masked_preparation",
        "masked_loss",
        reads_labels=False,
        ignores=("loss", "data.sampling"),
    ),
}

# In the order of the papers' tables.
FAMILIES: dict[str, Family] = {
    "baseline": Family(
        "baseline",
        "the challenge's baseline, fully connected layers over the backbone's features",
        "Kollias 2022, arXiv 2202.10659",
        built_by="baseline:Baseline",
        reads=("dropout", "hidden"),
        shared="hidden",
    ),
    "b": Family(
        "B (SMM-EmotionNet)",
        "SMM-EmotionNet, the parent of A",
        "Deng 2022, arXiv 2203.12845",
        built_by="emotionnet:SMMEmotionNet",
        reads=("dropout",),
        shared="regions",
    ),
    "a": Family(
        "A",
        "the members of the ensemble system",
        "Haider et al. 2022, arXiv 2207.10878",
        built_by="emotionnet:EnsembleNet",
        reads=("dropout",),
        shared="regions",
    ),
    "c": Family(
        "C (sequences)",
        "encoders of whole videos over features of their frames, in three frameworks of tasks",
        "Zhang et al. 2022, arXiv 2207.09373",
        built_by="sequence:SequenceNet",
        reads=("dropout", "sequence"),
        shared="trunk",
    ),
    "d": Family(
        "D (2Att-2Mt)",
        "2Att-2Mt, attention to positions and layers, and expressions before valence and arousal",
        "Wang et al. 2018, arXiv 1811.12139, by its abstract",
        built_by="two_level:TwoLevelNet",
        reads=("dropout", "two_level"),
        shared="dropout",
    ),
    "mae": Family(
        "MAE",
        "a masked autoencoder, which learns a ViT from faces without labels",
        "He et al. 2022, arXiv 2111.06377",
        built_by="mae:MaskedAutoencoder",
        reads=("masked",),
        objective="masked",
        backbones=("vit_small", "vit_tiny", "vit_base"),
    ),
}

FEATURES = "features"
OWN_BACKBONES: dict[str, BackboneName] = {
    "inception_v3": BackboneName("what a and b were published with", min_size=75),
    "vgg16": BackboneName("the baseline's"),
    # It stands for InceptionV3: what runs with it runs with both.
    "small": BackboneName("InceptionV3's place on a laptop", min_size=75),
    "vgg_small": BackboneName("VGG16's place on a laptop"),
    "iresnet18": BackboneName("ArcFace's, of 18 layers", min_size=32),
    "iresnet34": BackboneName("of 34", min_size=32),
    "iresnet50": BackboneName("of 50", min_size=32),
    "iresnet100": BackboneName("of 100", min_size=32),
    "densenet121": BackboneName("torchvision's to its end", min_size=64),
    "denseface": BackboneName("a DenseNet of grey faces, 64 pixels", min_size=32),
    "vit_base": BackboneName("the autoencoder's, 86 M parameters", patch=16),
    "vit_tiny": BackboneName("a ViT of 5.5 M", patch=16),
    "vit_small": BackboneName("a ViT's place on a laptop", patch=8),
    FEATURES: BackboneName(
        "no network: sets of features, standardised",
        families=("c",),
        prepared_by="features:build_feature_preparation",
        ignores=("augment", "data.image_size", "model.image_size", "model.freeze_backbone", "optim.backbone_lr"),
    ),
}
LIBRARIES = ("torchvision", "timm")


def objective_of(model_name: str) -> ObjectiveName:
    """Return what a family of models is trained for."""
    return OBJECTIVES[FAMILIES[model_name].objective]


def reads_videos(model_name: str) -> bool:
    """Whether a sample of a family's models is rows of a video, and not one picture."""
    return "sequence" in FAMILIES[model_name].reads


def preparation_of(model_name: str, backbone: str) -> str:
    """Return what makes the inputs of a family's models with this backbone, MODULE:FUNCTION in `data/`."""
    own = OWN_BACKBONES[backbone].prepared_by if backbone in OWN_BACKBONES else ""
    return own or objective_of(model_name).prepared_by


def families_of(backbone: str) -> tuple[str, ...]:
    """Return the families that take a backbone, as far as the backbone is asked."""
    return (OWN_BACKBONES[backbone].families if backbone in OWN_BACKBONES else ()) or tuple(FAMILIES)


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


def patch_size(backbone: str) -> int:
    """Return the pixels a side of a patch of our ViTs; 0 for other networks."""
    return OWN_BACKBONES[backbone].patch if backbone in OWN_BACKBONES else 0


def takes_drop_path(backbone: str) -> bool:
    """Whether a backbone may be one of layers that drop path and layer decay are for."""
    return backbone.startswith("timm:") or patch_size(backbone) > 0


def min_input_size(backbone: str) -> int:
    """Return the least side in pixels of a backbone's images; a library's is found out by building it."""
    return OWN_BACKBONES[backbone].min_size if backbone in OWN_BACKBONES else 1
