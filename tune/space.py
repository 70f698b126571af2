"""The search space: distributions by the dotted paths of the configuration, from a YAML file or the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mtl_dist.config import Config, build_config, flatten, unflatten
from mtl_dist.errors import InputError, nearest

# Learning rates relative to the preset's are found in `default_space`; loss weights matter by their ratios.
LOSS_WEIGHTS = {"loguniform": [0.3, 3.0]}
LR_SPAN = 4.0
KINDS = ("uniform", "loguniform", "choice")

Space = dict[str, dict[str, list]]


def default_space(config: Config) -> Space:
    """Search the three loss weights, and the learning rate within a factor of 4 of the configured one."""
    lr = config.optim.lr
    weights = {f"loss.{task}": LOSS_WEIGHTS for task in ("va", "expr", "au")}
    return {"optim.lr": {"loguniform": [lr / LR_SPAN, lr * LR_SPAN]}, **weights}


def read_space(path: Path, config: Config) -> Space:
    """Read a space such as `optim.lr: {loguniform: [1e-4, 1e-2]}`. Raises `InputError` naming path, kind and values."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"search space {path} cannot be read: {error}; give a YAML file") from None
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(
            f"search space {path} is empty; expected lines such as 'optim.lr: {{loguniform: [1e-4, 1e-2]}}'"
        )
    known = flatten(config)
    for key, distribution in loaded.items():
        if key not in known:
            raise InputError(f"{path}: unknown configuration key '{key}': {nearest(str(key), known)}")
        _check_distribution(f"{path}: {key}", distribution)
        for value in next(iter(distribution.values())):  # both ends, or every choice, must be a valid configuration
            build_config(json.loads(config.model_dump_json()), unflatten({key: value}))
    return loaded


def build_param_space(space: Space) -> dict[str, Any]:
    """Turn a space into Ray Tune's distributions, by the same dotted paths."""
    from ray import tune

    make = {
        "uniform": lambda ends: tune.uniform(*ends),
        "loguniform": lambda ends: tune.loguniform(*ends),
        "choice": tune.choice,
    }
    return {key: make[kind](values) for key, distribution in space.items() for kind, values in distribution.items()}


def _check_distribution(where: str, distribution: Any) -> None:
    if not isinstance(distribution, dict) or len(distribution) != 1 or next(iter(distribution)) not in KINDS:
        raise InputError(f"{where} is {distribution!r}; expected one of {', '.join(KINDS)} with its values")
    ((kind, values),) = distribution.items()
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {kind} has {values!r}; expected a list")
    if kind == "choice":
        return
    if len(values) != 2 or not all(isinstance(v, int | float) for v in values) or not values[0] < values[1]:
        raise InputError(f"{where}: {kind} has {values!r}; expected [low, high] with low < high (write 1e-4 as 1.0e-4)")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"{where}: loguniform from {values[0]}; expected a positive low end")
