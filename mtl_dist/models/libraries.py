"""Backbones of torchvision and timm by name. Features are always (N, C, h, w), also those of Swin and ViT.

A network is cut after its last stage whose cells are 16 x 16 pixels at most, so that the attention has a grid to attend
to. This is ResNet's third stage of four, ConvNeXt's and Swin's third, and EfficientNet's fifth block. A ViT, with cells
of its patch size, ends after its last layer. What comes later is taken out: no parameter is left without a gradient.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import timm
import torch
import torchvision
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from mtl_dist.errors import InputError
from mtl_dist.models.backbone import (
    Backbone,
    Renormalise,
    download_failed,
    download_torchvision,
    last_of_each,
)
from mtl_dist.tasks import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

MAX_STRIDE = 16
PROBE_SIZE = 224  # pixels, at which strides are counted
# Children of torchvision's networks that follow the features, or are beside them.
TORCHVISION_HEADS = {"avgpool", "fc", "classifier", "norm", "permute", "flatten", "head", "dropout"}
TORCHVISION_HEADS |= {"aux1", "aux2", "AuxLogits"}
TORCHVISION_STAGES = {"features", "layers", "trunk_output", "blocks"}  # whose children are stages


class LibraryBackbone(Backbone):
    """A network of a library, cut after a stage. `shape` is (C, h, w) of its features.

    `mean` and `std` are those of the images it was trained on; `read_imagenet` downloads its weights by the library's
    names, which ours have after `prefix`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        prefix: str,
        num_channels: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        read_imagenet: Callable[[], dict[str, Tensor]],
    ):
        is_imagenet = tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD
        before = {} if is_imagenet else {"renormalise": Renormalise(mean, std)}
        super().__init__({**before, "net": net}, num_channels=num_channels)
        self.library_prefix = prefix
        self.read_imagenet = read_imagenet

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.net, TimmFeatures | Stages):
            return (self(images),)
        x = self.renormalise(images) if "renormalise" in self._modules else images
        return last_of_each(self.net.maps(x), images.shape[-1])

    def class_token(self, images: Tensor) -> Tensor:
        if not isinstance(self.net, TimmFeatures | TorchvisionViT):
            return super().class_token(images)
        return self.net.class_token(self.renormalise(images) if "renormalise" in self._modules else images)

    def imagenet_state(self) -> dict[str, Tensor]:
        return {self.library_prefix + name: tensor for name, tensor in self.read_imagenet().items()}


def build_library_backbone(
    library: str, name: str, *, input_size: int | None, drop_path: float = 0.0
) -> LibraryBackbone:
    """Build `library`:`name` with the library's random weights, for images of `input_size` pixels a side.

    `drop_path` is for timm's alone.

    Raises:
        InputError: the name is unknown, or the network does not take images of that size.
    """
    build = {"torchvision": _build_torchvision, "timm": _build_timm}.get(library)
    if build is None:
        raise InputError(f"unknown library {library!r} of backbone {library}:{name}; known: timm, torchvision")
    if input_size is None:
        raise InputError(f"backbone {library}:{name} is built for one size of images; give model.image_size")
    return build(name, input_size, **({"drop_path": drop_path} if drop_path else {}))


def check_library_backbone(library: str, name: str, *, imagenet: bool) -> None:
    """Raise `InputError` for a name `library` does not know, or one without the ImageNet weights asked for."""
    if library == "torchvision":
        _check_torchvision(name)
        return
    cfg = _find_timm(name)
    if imagenet and not cfg.has_weights:
        raise _no_timm_weights(name)


# --- torchvision ------------------------------------------------------------------------------------------------------


def _build_torchvision(name: str, size: int) -> LibraryBackbone:
    _check_torchvision(name)
    full_name = f"torchvision:{name}"
    kwargs: dict[str, Any] = {}
    if name.startswith("vit_"):
        kwargs = {"image_size": size}
    elif name.startswith("maxvit"):
        kwargs = {"input_size": (size, size)}
    elif name in ("googlenet", "inception_v3"):
        kwargs = {"init_weights": True}  # what leaving it out means, with a warning
    try:
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(full_name, size, error) from error

    def read_imagenet() -> dict[str, Tensor]:
        state = download_torchvision(torchvision.models.get_model_weights(name).DEFAULT)
        if name.startswith("vit_"):
            state = dict(interpolate_embeddings(size, model.patch_size, state))
        return state

    # Those two were trained on images in [-1, 1], which torchvision makes of ours where it loads their weights.
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if name in ("googlenet", "inception_v3") else {}
    net = TorchvisionViT(model) if name.startswith("vit_") else _cut_torchvision(model, kwargs)
    prefix = "net.model." if name.startswith("vit_") else "net."
    num_channels = _count_channels(net, size, full_name)
    return LibraryBackbone(net, prefix=prefix, num_channels=num_channels, **half, read_imagenet=read_imagenet)


def _check_torchvision(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(f"unknown backbone torchvision:{name}: {_nearest(name, known)}")


class TorchvisionViT(nn.Module):
    """A ViT of torchvision without its classifier: (N, 3, H, W) -> its tokens but the first, (N, C, h, w)."""

    def __init__(self, model: torchvision.models.VisionTransformer):
        super().__init__()
        self.model = model
        self.cells = model.image_size // model.patch_size
        model.heads = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 1:].transpose(1, 2).unflatten(2, (self.cells, self.cells))

    def class_token(self, images: Tensor) -> Tensor:
        """Return its first token, (N, C)."""
        return self.tokens(images)[:, 0]

    def tokens(self, images: Tensor) -> Tensor:
        """Return what it makes of images, (N, 1 + hw, C)."""
        tokens = self.model._process_input(images)
        tokens = torch.cat((self.model.class_token.expand(images.shape[0], -1, -1), tokens), dim=1)
        return self.model.encoder(tokens)


class Stages(nn.Module):
    """Named parts of a network, one after another. Their names in the state dict are those of the network."""

    def __init__(self, parts: dict[str, nn.Module], *, channels_last: bool):
        super().__init__()
        self.names = list(parts)
        self.channels_last = channels_last
        for name, part in parts.items():
            *outer, last = name.split(".")
            if outer and outer[0] not in self._modules:
                self.add_module(outer[0], nn.Module())
            (getattr(self, outer[0]) if outer else self).add_module(last, part)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images to the last stage's (N, C, h, w) features."""
        return list(self.maps(images))[-1]

    def maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the features after every part, (N, C, h, w) each."""
        for name in self.names:
            images = self.get_submodule(name)(images)
            yield images.permute(0, 3, 1, 2) if self.channels_last else images


def _cut_torchvision(model: nn.Module, kwargs: dict[str, Any]) -> Stages:
    """Run the network's stages one by one, and keep those to the last whose cells are small enough."""
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if name in TORCHVISION_STAGES:
            parts |= {f"{name}.{key}": part for key, part in child.named_children()}
        elif name not in TORCHVISION_HEADS:
            parts[name] = child
    channels_last = isinstance(model, torchvision.models.SwinTransformer)
    (size, _) = kwargs.get("input_size", (PROBE_SIZE, PROBE_SIZE))
    images, cells = torch.zeros(1, 3, size, size), []
    model.eval()
    with torch.inference_mode():
        for part in parts.values():
            images = part(images)
            cells.append(images.shape[1 if channels_last else 2])
    model.train()
    # Convolutions without padding leave a cell or two less than the size over the stride.
    fine = [number for number, count in enumerate(cells) if count >= size / (MAX_STRIDE * 2**0.5)]
    return Stages(dict(list(parts.items())[: fine[-1] + 1]), channels_last=channels_last)


# --- timm -------------------------------------------------------------------------------------------------------------


def _build_timm(name: str, size: int, *, drop_path: float = 0.0) -> LibraryBackbone:
    full_name, cfg = f"timm:{name}", _find_timm(name)
    # Networks of one size are told ours; the others take images of any.
    kwargs = {"img_size": size} if cfg.fixed_input_size and cfg.input_size[-1] != size else {}
    try:
        model = timm.create_model(name, **kwargs, **({"drop_path_rate": drop_path} if drop_path else {}))
    except TypeError as error:  # a network of no such layers, or of one size that cannot be told another
        if "drop_path_rate" in str(error):
            raise InputError(f"backbone {full_name} has no path to drop; leave --model.drop-path out") from None
        if "img_size" not in str(error):
            raise
        raise _wrong_size(full_name, size, f"it takes {cfg.input_size[-1]} only") from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(full_name, size, error) from error
    net = TimmFeatures(model, full_name)

    def read_imagenet() -> dict[str, Tensor]:
        return _download_timm(name, cfg, kwargs)

    num_channels = _count_channels(net, size, full_name)
    return LibraryBackbone(
        net, prefix="net.model.", num_channels=num_channels, mean=cfg.mean, std=cfg.std, read_imagenet=read_imagenet
    )


class TimmFeatures(nn.Module):
    """A network of timm up to one of its intermediate features: (N, 3, H, W) -> (N, C, h, w).

    The prefix tokens of transformers are dropped and the others laid out as the grid they come from. A ViT's last
    features go through its last norm.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
            raise InputError(f"timm gives no intermediate features of {name}; take another backbone")
        strides = [int(stage["reduction"]) for stage in model.feature_info]
        finest = max(MAX_STRIDE, min(strides))
        self.stage = max(number for number, stride in enumerate(strides) if stride <= finest)
        self.norm = self.stage == len(strides) - 1
        model.prune_intermediate_layers([self.stage], prune_norm=not self.norm, prune_head=True)
        self.model = model

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the features of every stage up to ours, (N, C, h, w) each."""
        return self.model.forward_intermediates(
            images, indices=list(range(self.stage + 1)), norm=self.norm, intermediates_only=True
        )

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.model.forward_intermediates(
            images, indices=[self.stage], norm=self.norm, intermediates_only=True
        )
        return features

    def class_token(self, images: Tensor) -> Tensor:
        """Return its class token, (N, C). Raises `InputError` where it has none."""
        if getattr(self.model, "cls_token", None) is None:
            raise InputError(f"timm's {type(self.model).__name__} has no class token: it has cells alone")
        ((_, first),) = self.model.forward_intermediates(
            images, indices=[self.stage], norm=self.norm, intermediates_only=True, return_prefix_tokens=True
        )
        return first[:, 0]


def _find_timm(name: str) -> PretrainedCfg:
    """Find what timm knows of a name: the size, mean and deviation of its images, where its weights are."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"unknown backbone timm:{name}: {_nearest(architecture, timm.list_models())}")
    try:
        return get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:  # no weights of that tag
        known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(f"backbone timm:{architecture} has no weights {tag!r}; known: {', '.join(known)}") from error


def _no_timm_weights(name: str) -> InputError:
    return InputError(f"timm has no weights for {name}; take --model.weights none, a FILE or s3://...")


def _download_timm(name: str, cfg: PretrainedCfg, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    if not cfg.has_weights:
        raise _no_timm_weights(name)
    try:  # timm fits them to the size of the images: positions are interpolated
        return timm.create_model(name, pretrained=True, **kwargs).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # Hugging Face's are among them
        raise download_failed(f"of timm:{name}", error) from error


# --- both -------------------------------------------------------------------------------------------------------------


def _count_channels(net: nn.Module, size: int, name: str) -> int:
    """Run the network once, on an image of the size it is for; return how many channels its features have.

    Raises `InputError` where it does not take it.
    """
    net.eval()
    try:
        with torch.inference_mode():
            features = net(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(name, size, error) from error
    net.train()
    channels, height, width = features.shape[1:]
    if min(height, width) < 2:
        raise _wrong_size(name, size, f"it has {height} x {width} cells for them")
    logger.info("%s: %d channels, %d x %d cells for images of %d pixels", name, channels, height, width, size)
    return channels


def _wrong_size(name: str, size: int, reason: object) -> InputError:
    words = " ".join(str(reason).split())
    return InputError(f"backbone {name} does not take images of {size} pixels ({words}); give another model.image_size")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "see the library's list of models"
