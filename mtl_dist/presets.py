"""Named complete configurations, and how a command puts preset, file and flags together."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import Field

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError, PlainParser, StorageError, nearest, plain_refusals
from mtl_dist.parsing import MAX_YAML_BYTES, parse_yaml
from mtl_dist.sections import EMA
from mtl_dist.settings import Section, unflatten
from mtl_dist.unread import check_read, is_written

# What the systems have in common on a laptop: random initialisation, for synthetic faces and first tries.
LAPTOP: dict[str, Any] = {
    "data": {"image_size": 96},
    "augment": {
        "crop_scale": [0.9, 1.0],
        "rotation": 4.0,
        "brightness": 0.15,
        "contrast": 0.15,
        "saturation": 0.15,
    },
    "loss": {"expr_weights": "balanced", "au_weights": "balanced"},
    "optim": {"name": "adamw", "lr": 6e-4, "weight_decay": 0.02, "warmup_steps": 50},
    "train": {"global_batch": 16, "epochs": 10},
    "checkpoint": {"keep_last": 1},
}

# How SMM-EmotionNet was trained (arXiv 2203.12845 and its code): three loaders filtered by label, batches of 24 of
# each, an eighth of the data an epoch, a cosine a step, crops of 299 out of 304, no clipping of gradients. The learning
# rate and the epochs are those that 2207.10878 tells of A. Colours are changed in a fixed order (data/augment.py).
PAPER: dict[str, Any] = {
    # The loader makes the 304: made 112 first, as is its default, images of `cropped` would lose detail.
    "data": {"image_size": 304, "sampling": "per_task", "epoch_fraction": 0.125},
    "augment": {
        "resize": 304,
        "rotation": 0.0,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "jitter_p": 0.8,
    },
    "optim": {"nesterov": False, "warmup_steps": 0, "final_lr": 0.0, "cosine_steps": 10_000, "clip_norm": None},
}

# A masked autoencoder by its paper (arXiv 2111.06377), with milder crops: faces are cut out already. The learning
# rate is its 1.5e-4 for 256 samples, times the batch.
MASKED: dict[str, Any] = {
    "augment": {"crop_scale": [0.7, 1.0], "rotation": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
    "optim": {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.05, "final_lr": 0.0, "clip_norm": None},
}
MAE: dict[str, Any] = {"name": "mae", "weights": "none"}
LAPTOP_DECODER = {"decoder_depth": 2, "decoder_heads": 4}

# System A's heads over a ViT that was trained on faces: rates that fall by depth, as public code fine-tunes such ones.
VIT: dict[str, Any] = {
    "data": {"image_size": 224},
    "model": {"name": "a", "backbone": "vit_base", "weights": "none", "drop_path": 0.1},
    "optim": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.05, "layer_decay": 0.65, "warmup_steps": 1000},
    "train": {"global_batch": 256, "ema": 0.999},
}

# Sequences of features, which no network of images goes before.
FEATURES: dict[str, Any] = {"name": "c", "backbone": "features", "weights": "none"}

# Each holds only what differs from the defaults of config.py.
PRESETS: dict[str, dict[str, Any]] = {
    # The challenge's winner (arXiv 2207.09373) as wide as it was published, with the loss of the score. Training counts
    # windows of 64 rows, and evaluation whole videos, the longest of which a batch is padded to.
    "c": {
        "model": FEATURES,
        "optim": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.02},
        "train": {"global_batch": 32, "eval_batch": 4},
    },
    # As published: three layers of each task's own, valence and units fed to arousal, square errors with weights of 12
    # for valence and for arousal (24 for our mean of both), 8 segments of 64 rows a step, 10 of 50 epochs of warm-up.
    # Not as published: theirs is a mean over padding and missing labels too, so that 24 was about 17.5 of ours; a step
    # was the same place of 8 videos, padded; the rate fell in a line. Positions, masks, tanh: models/sequence.py.
    "c-paper": {
        "model": FEATURES
        | {"sequence": {"framework": "share_bottom", "feed_source": ["v", "au"], "feed_target": ["a"]}},
        "loss": {"va": 24.0, "expr": 0.35, "va_ccc": 0.0, "va_mse": 1.0},
        "optim": {
            "name": "adamw",
            "lr": 5e-5,
            "betas": [0.5, 0.999],
            "weight_decay": 0.0,
            "warmup_steps": 3000,
            "final_lr": 0.0,
            "clip_norm": 5.0,
        },
        "train": {"global_batch": 8, "eval_batch": 4},
    },
    # C on a laptop: a GRU that reads both ways. Heads and ffn are for `--model.sequence.encoder transformer`, the layer
    # of each task's own for `--model.sequence.framework share_bottom`.
    "small-c": {
        "model": FEATURES
        | {
            "sequence": {
                "encoder": "gru",
                "bidirectional": True,
                "hidden": 128,
                "layers": 2,
                "private_layers": 1,
                "heads": 4,
                "ffn": 256,
                "head_widths": [128],
                "window": 48,
            }
        },
        "loss": LAPTOP["loss"],
        "optim": LAPTOP["optim"] | {"lr": 1e-3},
        "train": {"global_batch": 8, "epochs": 20, "eval_batch": 8},
        "checkpoint": LAPTOP["checkpoint"],
    },
    # 2Att-2Mt on AffectNet, whose recipe is not known: that of a later paper on the same data (CAGE), in two stages.
    "d": {
        "data": {"image_size": 224},
        "augment": {"rotation": 10.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "erase": 0.5},
        "model": {"name": "d", "backbone": "torchvision:resnet50"},
        "loss": {"au": 0.0, "va_mse": 1.0, "va_after": 5, "expr_weights": "balanced"},
        "optim": {"name": "adamw", "lr": 5e-5, "weight_decay": 0.05},
        "train": {"global_batch": 128, "epochs": 10},
    },
    # The stages of docs/winning.md: AffectNet, which has no action units; then the challenge's own set.
    "vit-affectnet": VIT
    | {
        "augment": {"rotation": 10.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "erase": 0.5},
        "loss": {"au": 0.0, "expr_weights": "balanced"},
        "train": VIT["train"] | {"epochs": 10},
    },
    "vit-affwild2": VIT
    | {
        "loss": {"expr_weights": "balanced", "au_weights": "balanced"},
        "optim": VIT["optim"] | {"lr": 2e-4, "freeze_backbone_for": 0.1},
        "train": VIT["train"] | {"epochs": 10},
    },
    "small-d": LAPTOP
    | {
        "model": {"name": "d", "backbone": "small", "weights": "none", "dropout": 0.0},
        "loss": LAPTOP["loss"] | {"va_mse": 1.0, "va_after": 4},
    },
    "mae": MASKED
    | {
        "data": {"image_size": 224},
        "model": MAE | {"backbone": "vit_base"},
        "optim": MASKED["optim"] | {"lr": 6e-4, "warmup_steps": 4000},
        "train": {"global_batch": 1024, "epochs": 200, "eval_every": 5},
    },
    "mae-tiny": MASKED
    | {
        "model": MAE | {"backbone": "vit_tiny", "masked": LAPTOP_DECODER | {"decoder_width": 128}},
        "optim": MASKED["optim"] | {"lr": 6e-4, "warmup_steps": 1000},
        "train": {"global_batch": 256, "epochs": 100, "eval_every": 5},
    },
    # Rendered faces are flat in most patches: in units of a patch's deviation the traces of JPEG would be learnt.
    "small-mae": MASKED
    | {
        "data": {"image_size": 96},
        "model": MAE | {"backbone": "vit_small", "masked": LAPTOP_DECODER | {"decoder_width": 64, "normalise": False}},
        "optim": MASKED["optim"] | {"lr": 1e-3, "warmup_steps": 100},
        "train": {"global_batch": 32, "epochs": 20},
        "checkpoint": {"keep_last": 1},
    },
    # SGD, lr 0.001, batch 24, 50 epochs, InceptionV3 at 299. Images are read at
    # 112 pixels, the size of cropped_aligned, and made larger on the device: `--data.image-size 299` keeps more of
    # `cropped`, whose images may be larger, at seven times the pixels to load.
    "a": {"model": {"name": "a", "image_size": 299}},
    # On our one masked batch.
    "b": {"model": {"name": "b", "image_size": 299}},
    # Both by the recipe that was published.
    "a-paper": PAPER | {"model": {"name": "a", "image_size": 299}},
    "b-paper": PAPER | {"model": {"name": "b", "image_size": 299}},
    # VGG16 with frozen convolutions. Theirs were trained on faces: give
    # such weights with model.weights. Images of 112 pixels, as the challenge hands them out; A's optimizer and epochs.
    "baseline": {"model": {"name": "baseline", "backbone": "vgg16", "freeze_backbone": True, "dropout": 0.5}},
    # A, B and the baseline on a laptop.
    "small": LAPTOP | {"model": {"name": "a", "backbone": "small", "weights": "none", "dropout": 0.0}},
    "small-b": LAPTOP | {"model": {"name": "b", "backbone": "small", "weights": "none", "dropout": 0.0}},
    # Frozen convolutions want trained ones: model.weights RUN, of a run with --model.no-freeze-backbone.
    "small-baseline": LAPTOP
    | {
        "model": {
            "name": "baseline",
            "backbone": "vgg_small",
            "weights": "none",
            "freeze_backbone": True,
            "hidden": 256,
            "dropout": 0.0,
        }
    },
}

Command = TypeVar("Command", bound=Section)


class CommandConfig(Config):
    """A command's flags: the whole configuration, and where it starts from."""

    preset: str = Field("a", description=f"Named complete configuration to start from: {', '.join(PRESETS)}.")
    config: str | None = None
    """YAML file (or s3:// URI) over the preset; flags go over both."""


def parse_command(command: type[Command], args: list[str] | None, *, prog: str, description: str) -> Command:
    """Build a command's configuration: preset < --config FILE < flags. A wrong flag or value ends with exit code 2."""
    args = sys.argv[1:] if args is None else args
    early = PlainParser(add_help=False, allow_abbrev=False, prog=prog)
    early.add_argument("--preset", default="a")
    early.add_argument("--config")
    known, _ = early.parse_known_args([part for part in args if part not in ("-h", "--help")])
    preset, file = load_preset(known.preset), read_config_file(known.config) if known.config else {}
    resolved = build_config(preset, file)
    sections = {name: getattr(resolved, name) for name in Config.model_fields}
    default = command(**sections, preset=known.preset, config=known.config)
    with plain_refusals(prog):
        found = tyro.cli(command, default=default, args=args, prog=prog, description=description)
    check_read(found, build_config(preset), *([resolved] if is_written(file) else []))
    return found


def read_config_file(uri: str) -> dict[str, Any]:
    """Read a YAML configuration (nested or with dotted keys), local or on s3://, as a nested dict."""
    try:
        loaded = parse_yaml(storage.read_bytes(uri, max_bytes=MAX_YAML_BYTES))
    except StorageError:  # an OSError too, but the same command may succeed later
        raise
    except OSError as error:
        raise InputError(f"configuration {uri} cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(f"configuration {uri} is not YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"configuration {uri} holds a {type(loaded).__name__}; expected a mapping of sections")
    return unflatten(loaded)


def config_of(command: CommandConfig) -> Config:
    """Return the configuration alone, with absolute paths. Raises `InputError` for storage that goes with a Ray job."""
    storage.check_lasting(command.run.storage, flag="--run.storage")
    storage.check_lasting(str(command.run.audit_dir or ""), flag="--run.audit-dir")
    return with_absolute_paths(Config(**{name: getattr(command, name) for name in Config.model_fields}))


def with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute: under Ray every rank works in a directory of its own."""
    run, data, model, loss = config.run, config.data, config.model, config.loss
    weights = model.weights if model.weights in ("none", "imagenet") else storage.absolute(model.weights)
    own = {"storage": storage.absolute(run.storage), "start": run.start and storage.absolute(run.start)}
    own["audit_dir"] = run.audit_dir and run.audit_dir.expanduser().absolute()
    cache_dir = data.cache_dir and data.cache_dir.expanduser().absolute()
    train, val = (tuple(map(storage.absolute, uris)) for uris in (data.train, data.val))
    sets = {"train": train, "val": val, "cache_dir": cache_dir}
    teacher = loss.teacher if loss.teacher == EMA else storage.absolute(loss.teacher)
    return config.model_copy(
        update={
            "run": run.model_copy(update=own),
            "data": data.model_copy(update=sets),
            "model": model.model_copy(update={"weights": weights}),
            "loss": loss.model_copy(update={"teacher": teacher}),
        }
    )


def load_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset, nested by section. Raises `InputError` for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}': {nearest(name, PRESETS)}")
    return PRESETS[name]
