"""Weights of others, as they are published: state dicts of tensors under their authors' names.

A file may hold its state dict below a key (`model`, `state_dict`, ...), with a prefix before all names (`module.`), and
beside an `argparse.Namespace`: nothing else is read. A `Layout` knows a publisher by its names and says what they are
in our backbones. Positions of a ViT that were trained on another grid are interpolated.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtl_dist.errors import InputError
from mtl_dist.models.backbone import Backbone

logger = logging.getLogger(__name__)

OWN_PREFIX = "backbone."  # of a backbone's tensors in the weights of our models
KEYS = ("model", "state_dict", "model_state_dict", "teacher", "student", "net", "params")  # a state dict lies below one
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")  # before all names
MAX_SHOWN = 6  # names in one message
POSITIONS = "pos_embed"

State = dict[str, Tensor]


class Layout(NamedTuple):
    """How some publisher names tensors."""

    title: str
    known_by: tuple[str, ...]  # names that all its files have
    rename: Callable[[State], State]  # to the names of timm, torchvision or insightface, which ours are after a prefix
    drop: tuple[str, ...] = ()  # beginnings of names that are of other parts: decoders, heads


class Loaded(NamedTuple):
    """What was made of a file."""

    layout: str
    num_loaded: int
    left_out: list[str]  # names in the file
    interpolated: list[str]  # our names
    notes: list[str]

    def __str__(self) -> str:
        parts = [f"{self.num_loaded} tensors loaded ({self.layout})"]
        if self.left_out:
            parts.append(f"{len(self.left_out)} of other parts left out ({_beginnings(self.left_out)})")
        parts += [f"{name} interpolated" for name in self.interpolated]
        return "; ".join([*parts, *self.notes])

    def note(self) -> dict[str, Any]:
        """What a checkpoint notes."""
        return self._replace(left_out=[_beginnings(self.left_out)] if self.left_out else [])._asdict()


# ---------------------------------------------------------------------------------------------------------- the layouts


def _as_it_is(state: State) -> State:
    return state


def _rename_hf(state: State) -> State:
    """ViTMAE of transformers, versions 4 and 5: q, k and v are one tensor each."""
    renames = (
        (r"^vit\.", ""),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^embeddings\.position_embeddings$", POSITIONS),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
        (r"^layernorm\.", "norm."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
    renamed: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.(q|k|v)\w*\.(weight|bias)", name):
            parts.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = tensor
        else:
            renamed[name] = tensor
    return renamed | {name: torch.cat([of[part] for part in "qkv"]) for name, of in parts.items() if len(of) == 3}


def _rename_dinov2(state: State) -> State:
    renamed = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): tensor for name, tensor in state.items()}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        # timm has no place for the class token where there are registers: what it has is in the token itself.
        positions = renamed[POSITIONS]
        if _is_square(positions.shape[1] - 1):
            renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
            renamed[POSITIONS] = positions[:, 1:]
    return renamed


def _rename_densenet(state: State) -> State:
    """Names of before torchvision 0.2, which a Python name cannot have: norm.1."""
    return {re.sub(r"\.(norm|relu|conv)\.(\d)\.", r".\1\2.", name): tensor for name, tensor in state.items()}


def _rename_pooled(state: State) -> State:
    """A ViT that was fine-tuned on the mean of its tokens has its last norm behind the mean."""
    return {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in state.items()}


DECODERS = ("decoder", "mask_token", "rep_decoder", "projector.", "predictor.", "target_", "head")
HF_DECODERS = ("decoder", "mask_token")
FINE_TUNED, DINO = "MAE, fine-tuned on the mean of tokens", "DINOv2"
HF_4, HF_5 = "ViTMAE of transformers 4", "ViTMAE of transformers 5"
PATCHES, QKV = "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"
QUERY_4, QUERY_5 = "encoder.layer.0.attention.attention.query.weight", "layers.0.attention.q_proj.weight"
# The first whose names a file has is its layout.
LAYOUTS = (
    Layout("insightface IResNet", ("prelu.weight", "layer1.0.prelu.weight"), _as_it_is, ("fc.", "features.")),
    Layout("DenseFace", ("features.conv0.weight", "features.norm3.weight"), _rename_densenet, ("classifier.",)),
    Layout("DenseNet", ("features.conv0.weight", "features.norm5.weight"), _rename_densenet, ("classifier.",)),
    Layout(DINO, (PATCHES, "blocks.0.ls1.gamma"), _rename_dinov2, ("mask_token", "head")),
    Layout(DINO, (PATCHES, "blocks.0.0.ls1.gamma"), _rename_dinov2, ("mask_token", "head")),
    Layout(FINE_TUNED, (QKV, "fc_norm.weight"), _rename_pooled, DECODERS),
    Layout("MAE", (QKV, "decoder_embed.weight"), _as_it_is, DECODERS),
    Layout("ViT of timm's names", (PATCHES, QKV), _as_it_is, DECODERS),
    Layout(HF_5, (QUERY_5,), _rename_hf, HF_DECODERS),
    Layout(HF_5, (f"vit.{QUERY_5}",), _rename_hf, HF_DECODERS),
    Layout(HF_4, (QUERY_4,), _rename_hf, HF_DECODERS),
    Layout(HF_4, (f"vit.{QUERY_4}",), _rename_hf, HF_DECODERS),
)
PLAIN = Layout("the backbone's own names", (), _as_it_is)


# ----------------------------------------------------------------------------------------------------------- loading


def load_backbone_weights(backbone: Backbone, weights_file: Path, *, source: str | None = None) -> Loaded:
    """Load a local file into `backbone`: `.safetensors`, or what `torch.load` reads with `weights_only`.

    Other parts that the file may hold, of classifiers and autoencoders, are left out and named. Of a model of ours (a
    checkpoint's `model.safetensors`) its backbone is loaded. `source` is what messages call the file.

    Raises:
        InputError: no such file, no state dict in it, or an entry missing or of another shape; the message names it.
    """
    source = source or str(weights_file)
    state = _unwrap(_read_file(Path(weights_file), source=source), source=source)
    if any(name.startswith(OWN_PREFIX) for name in state) and any(
        name in backbone.state_dict() for name in _without(OWN_PREFIX, state)
    ):
        layout, state = PLAIN._replace(title="a model of ours"), _without(OWN_PREFIX, state)
        source += " (a model of ours)"
        renamed = state
    else:
        found, layout = _find_layout(state)
        if layout is PLAIN and any(name.startswith(OWN_PREFIX) for name in state):
            found, source = _without(OWN_PREFIX, state), f"{source} (a model of ours)"
        state = found
        renamed = {name: t for name, t in layout.rename(state).items() if not _is_dropped(name, layout)}
        renamed = {backbone.library_prefix + name: tensor for name, tensor in renamed.items()}
    own = backbone.state_dict()
    if not own.keys() & renamed.keys():
        raise InputError(
            f"{source} has no tensor that {type(backbone).__name__} has: it begins with "
            f"{', '.join(list(state)[:MAX_SHOWN])}; give weights of this backbone, or another --model.backbone"
        )
    interpolated = _fit_positions(renamed, own)
    check_state_dict(backbone, renamed, source=source)
    ignored = copy_state_dict(backbone, renamed)
    dropped = [name for name in state if _is_dropped(name, layout)]
    notes = ["the norm was behind the mean of tokens, and is before it here"] if layout.rename is _rename_pooled else []
    left_out = [*dropped, *(name.removeprefix(backbone.library_prefix) for name in ignored)]
    loaded = Loaded(layout.title, len(renamed) - len(ignored), left_out, interpolated, notes)
    logger.info("%s: %s", source, loaded)
    return loaded


def load_embedding(embedding: nn.Module, weights_file: Path, *, source: str | None = None) -> None:
    """Load what a file has behind an IResNet, into `face_nets.Embedding`. Raises `InputError` where it has none."""
    source = source or str(weights_file)
    state = _find_layout(_unwrap(_read_file(Path(weights_file), source=source), source=source))[0]
    for name, tensor in embedding.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "not there"
            raise InputError(
                f"{source} has no embedding of faces: {name!r} is {found}; expected {tuple(tensor.shape)}, as "
                "insightface's IResNet has it"
            )
    embedding.load_state_dict(state, strict=False)


def load_imagenet_weights(backbone: Backbone) -> Loaded:
    """Load weights trained on ImageNet, downloaded into the library's cache at the first use.

    Raises:
        InputError: there are none for this backbone.
        InputError: the download failed; the message says what to do instead.
    """
    state = _rename_densenet(backbone.imagenet_state())
    check_state_dict(backbone, state, source="the ImageNet weights")
    ignored = copy_state_dict(backbone, state)
    return Loaded("ImageNet", len(state) - len(ignored), ignored, [], [])


def check_state_dict(backbone: Backbone, state: State, *, source: str) -> None:
    """Raise `InputError` for the first tensor of a backbone that a state dict lacks, or has in another shape."""
    for name, tensor in backbone.state_dict().items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # files written before torch 0.4.1 have none
                continue
            raise InputError(
                f"{source} has no {name!r}, which {type(backbone).__name__} needs; was it made with another "
                "--model.backbone?"
            )
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name!r} has shape {tuple(state[name].shape)}, "
                f"{type(backbone).__name__} needs {tuple(tensor.shape)}; was it made with another --model.backbone or "
                "size of images?"
            )


def copy_state_dict(backbone: Backbone, state: State) -> list[str]:
    """Copy what a backbone has of a state dict; return the names of the rest."""
    own = backbone.state_dict()
    backbone.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
    return [name for name in state if name not in own]


def _read_file(weights_file: Path, *, source: str) -> dict[str, Any]:
    if not weights_file.is_file():
        raise InputError(f"no weights file {source}; --model.weights takes a FILE, s3://..., imagenet or none")
    if weights_file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(weights_file)
        except SafetensorError as error:
            raise InputError(f"{source} is no safetensors file, or part of one: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of settings, which runs nothing
            content = torch.load(weights_file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # half a file, other content, or objects whose loading would run code: of any kind
        raise InputError(  # torch's own words go on for a page, and advise to run what the file holds
            f"{source} holds no state dict of plain tensors ({type(error).__name__}); expected a .safetensors file, or "
            "what torch.save wrote of a state dict"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{source} holds no state dict: expected a dictionary of tensors by name")
    return content


def _unwrap(content: dict[str, Any], *, source: str) -> State:
    """Return the tensors of a file: its own, or those below a usual key, without a prefix that all of them have."""
    inner = next((content[key] for key in KEYS if isinstance(content.get(key), dict) and _tensors(content[key])), None)
    state = _tensors(content) if inner is None else _tensors(inner)
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if not state or (inner is None and others):
        raise InputError(f"{source} holds no state dict: expected a dictionary of tensors by name")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = _without(prefix, state)
    return state


def _tensors(content: dict[Any, Any]) -> State:
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _without(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _find_layout(state: State) -> tuple[State, Layout]:
    """Return the layout whose names a state dict has, after a prefix perhaps, and the state dict without it."""
    for prefix in ("", *PREFIXES):
        found = _without(prefix, state)
        for layout in LAYOUTS:
            if all(name in found for name in layout.known_by):
                return found, layout
    return state, PLAIN


def _is_dropped(name: str, layout: Layout) -> bool:
    return bool(layout.drop) and name.startswith(layout.drop)


def _fit_positions(state: State, own: State) -> list[str]:
    """Interpolate a ViT's positions to the grid of ours, in place, as MAE does: bicubic, without antialiasing."""
    fitted = []
    for name, tensor in state.items():
        if not name.endswith(POSITIONS) or name not in own or tensor.ndim != 3 or tensor.shape == own[name].shape:
            continue
        from timm.layers import resample_abs_pos_embed

        (_, theirs, width), (_, ours, own_width) = tensor.shape, own[name].shape
        extra = next((n for n in (0, 1, 5) if _is_square(theirs - n) and _is_square(ours - n)), None)
        if width != own_width or extra is None:
            continue  # refused below, with both shapes
        cells = round((ours - extra) ** 0.5)
        state[name] = resample_abs_pos_embed(
            tensor, [cells, cells], num_prefix_tokens=extra, interpolation="bicubic", antialias=False
        )
        fitted.append(f"{name} ({round((theirs - extra) ** 0.5)}^2 -> {cells}^2 places)")
    return fitted


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _beginnings(names: list[str]) -> str:
    first = list(dict.fromkeys(name.split(".")[0] for name in names))
    return ", ".join(first[:MAX_SHOWN]) + (" ..." if len(first) > MAX_SHOWN else "")
