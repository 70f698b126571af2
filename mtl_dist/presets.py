"""Named complete configurations, and how a command puts preset, file and flags together."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TypeVar

import tyro

from mtl_dist import storage
from mtl_dist.config import Config, Section, build_config, read_config_file
from mtl_dist.errors import InputError, nearest

# Each holds only what differs from the defaults of config.py.
PRESETS: dict[str, dict[str, Any]] = {
    # The ensemble system, arXiv 2207.10878: SGD, lr 0.001, batch 24, 50 epochs, InceptionV3 at 299.
    "a": {"model": {"name": "a", "image_size": 299}},
    # Its parent SMM-EmotionNet, arXiv 2203.12845, on our one masked batch.
    "b": {"model": {"name": "b", "image_size": 299}},
    # System A on a laptop: a small backbone from random initialisation, for synthetic faces and first tries.
    "small": {
        "data": {"image_size": 96},
        "augment": {
            "crop_scale": [0.9, 1.0],
            "rotation": 4.0,
            "brightness": 0.15,
            "contrast": 0.15,
            "saturation": 0.15,
        },
        "model": {"name": "a", "backbone": "small", "weights": "none", "dropout": 0.0},
        "loss": {"expr_weights": "balanced", "au_weights": "balanced"},
        "optim": {"name": "adamw", "lr": 6e-4, "weight_decay": 0.02, "warmup_steps": 50},
        "train": {"global_batch": 16, "epochs": 10},
        "checkpoint": {"keep_last": 1},
    },
}

Command = TypeVar("Command", bound=Section)


class CommandConfig(Config):
    """A command's flags: the whole configuration, and where it starts from."""

    preset: str = "a"
    """Named complete configuration to start from: a, b or small."""
    config: str | None = None
    """YAML file (or s3:// URI) over the preset; flags go over both."""


def parse_command(command: type[Command], args: list[str] | None, *, prog: str, description: str) -> Command:
    """Build a command's configuration: preset < --config FILE < flags. A wrong flag or value ends with exit code 2."""
    args = sys.argv[1:] if args is None else args
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default="a")
    early.add_argument("--config")
    try:
        known, _ = early.parse_known_args([part for part in args if part not in ("-h", "--help")])
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see {prog} --help") from None
    resolved = build_config(load_preset(known.preset), read_config_file(known.config) if known.config else {})
    sections = {name: getattr(resolved, name) for name in Config.model_fields}
    default = command(**sections, preset=known.preset, config=known.config)
    return tyro.cli(command, default=default, args=args, prog=prog, description=description)


def config_of(command: CommandConfig) -> Config:
    """Return the configuration alone, with absolute paths."""
    return with_absolute_paths(Config(**{name: getattr(command, name) for name in Config.model_fields}))


def with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute: under Ray every rank works in a directory of its own."""
    run, data, model = config.run, config.data, config.model
    weights = model.weights if model.weights in ("none", "imagenet") else storage.absolute(model.weights)
    cache_dir = data.cache_dir and data.cache_dir.expanduser().absolute()
    audit_dir = run.audit_dir and run.audit_dir.expanduser().absolute()
    sets = {"train": storage.absolute(data.train), "val": storage.absolute(data.val), "cache_dir": cache_dir}
    return config.model_copy(
        update={
            "run": run.model_copy(update={"storage": storage.absolute(run.storage), "audit_dir": audit_dir}),
            "data": data.model_copy(update=sets),
            "model": model.model_copy(update={"weights": weights}),
        }
    )


def load_preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}': {nearest(name, PRESETS)}")
    return PRESETS[name]
