"""The search space: distributions by the dotted paths of the configuration, from a YAML file or the default."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError, nearest
from mtl_dist.families import objective_of
from mtl_dist.parsing import MAX_YAML_BYTES, parse_yaml
from mtl_dist.settings import flatten, unflatten
from mtl_dist.unread import find_unread, why_unread

# Learning rates relative to the preset's are found in `default_space`; loss weights matter by their ratios.
LOSS_WEIGHTS = {"loguniform": [0.3, 3.0]}
LR_SPAN = 4.0
KINDS = ("uniform", "loguniform", "integer", "choice")
# What best.yaml leaves to the run that uses it, and no space may hold: a setting, or a whole section.
OWN_SETTINGS = (
    "run.", "ray.", "data.train", "data.val", "data.fold", "data.cache_dir", "engine.device", "engine.threads"
)  # fmt: skip
DRAWS = 200  # configurations that are built before anything starts

Space = dict[str, dict[str, list]]


def default_space(config: Config) -> Space:
    """Search the learning rate within a factor of 4 of the configured one, and loss weights where there are some."""
    lr = config.optim.lr
    has_weights = "loss" not in objective_of(config.model.name).ignores
    weights = {f"loss.{task}": LOSS_WEIGHTS for task in ("va", "expr", "au") if has_weights}
    space = {"optim.lr": {"loguniform": [lr / LR_SPAN, lr * LR_SPAN]}, **weights}
    check_draws("the default search space", space, config)
    return space


def is_own(key: str) -> bool:
    """Whether a setting is a run's own: best.yaml leaves it out."""
    return key.startswith(OWN_SETTINGS)


def read_space(path: Path, config: Config) -> Space:
    """Read a space such as `optim.lr: {loguniform: [1e-4, 1e-2]}`. Raises `InputError` naming path, kind and values."""
    try:
        loaded = parse_yaml(storage.read_bytes(str(path), max_bytes=MAX_YAML_BYTES))
    except (OSError, InputError, yaml.YAMLError) as error:
        raise InputError(f"search space {path} cannot be read: {error}; give a YAML file") from None
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(
            f"search space {path} is empty; expected lines such as 'optim.lr: {{loguniform: [1e-4, 1e-2]}}'"
        )
    known = flatten(config)
    for key, distribution in loaded.items():
        if key not in known:
            raise InputError(f"{path}: unknown configuration key '{key}': {nearest(str(key), known)}")
        if is_own(key):
            raise InputError(
                f"{path}: {key} is a run's own setting, which best.yaml leaves out; expected what decides the score, "
                "such as optim.lr"
            )
        _check_distribution(f"{path}: {key}", distribution)
        _check_ends(f"{path}: {key}", key, distribution, config)
    check_draws(str(path), loaded, config)
    return loaded


def build_param_space(space: Space) -> dict[str, Any]:
    """Turn a space into Ray Tune's distributions, by the same dotted paths."""
    from ray import tune

    make = {
        "uniform": lambda ends: tune.uniform(*ends),
        "loguniform": lambda ends: tune.loguniform(*ends),
        "integer": lambda ends: tune.randint(ends[0], ends[1] + 1),  # Ray leaves the upper end out
        "choice": tune.choice,
    }
    return {key: make[kind](values) for key, distribution in space.items() for kind, values in distribution.items()}


def check_draws(where: str, space: Space, config: Config) -> None:
    """Raise `InputError` where a draw from the space is no valid configuration: settings must fit together too."""
    rng, base = np.random.default_rng(0), json.loads(config.model_dump_json())
    refused, unread = [], dict.fromkeys(space, "")
    for _ in range(DRAWS):
        params = {key: draw_from(distribution, rng) for key, distribution in space.items()}
        try:
            found = find_unread(build_config(base, unflatten(params)))
        except InputError as error:
            refused.append((params, error))
        else:
            unread = {key: why for key in unread if (why := why_unread(key, found))}
    if refused:
        params, error = refused[0]
        drawn = ", ".join(f"{key} {value!r}" for key, value in params.items())
        raise InputError(
            f"{where}: {len(refused)} of {DRAWS} drawn configurations are invalid, such as {drawn}: {error}; narrow "
            "the space"
        )
    if unread:
        raise InputError(f"{where}: {'; '.join(f'nothing reads {key}: {why}' for key, why in unread.items())}")


def draw_from(distribution: dict[str, list], rng: np.random.Generator) -> Any:
    """Draw a value as Ray does: both ends of `integer` may come."""
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return values[rng.integers(len(values))]
    low, high = values
    if kind == "integer":
        return int(rng.integers(low, high, endpoint=True))
    return float(rng.uniform(low, high) if kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high))))


def _check_ends(where: str, key: str, distribution: dict[str, list], config: Config) -> None:
    """Raise where an end, or a choice, is no valid configuration, or where whole numbers would be drawn as others."""
    ((kind, values),) = distribution.items()
    base = json.loads(config.model_dump_json())
    for value in values:
        try:
            built = flatten(build_config(base, unflatten({key: value})))[key]
        except InputError as error:
            raise InputError(f"{where}: {kind} has {value!r}: {error}") from None
    if kind in ("uniform", "loguniform"):
        middle = draw_from(distribution, np.random.default_rng(0))
        try:
            build_config(base, unflatten({key: middle}))
        except InputError as error:
            if isinstance(built, int) and not isinstance(built, bool):
                raise InputError(
                    f"{where} takes whole numbers, and {kind} draws others, such as {middle:g}; expected "
                    f"'{key}: {{integer: {[math.ceil(values[0]), math.floor(values[1])]}}}'"
                ) from None
            raise InputError(f"{where}: {error}") from None


def _floats(values: list) -> Iterator[float]:
    for value in values:
        if isinstance(value, float):
            yield value
        elif isinstance(value, list):  # a choice of pairs, such as augment.crop_scale's
            yield from _floats(value)


def _check_distribution(where: str, distribution: Any) -> None:
    if not isinstance(distribution, dict) or len(distribution) != 1 or next(iter(distribution)) not in KINDS:
        raise InputError(f"{where} is {distribution!r}; expected one of {', '.join(KINDS)} with its values")
    ((kind, values),) = distribution.items()
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {kind} has {values!r}; expected a list")
    if not all(math.isfinite(value) for value in _floats(values)):
        raise InputError(f"{where}: {kind} has {values!r}; expected finite values")
    if kind == "choice":
        return
    numbers = int if kind == "integer" else int | float
    if len(values) != 2 or not all(isinstance(v, numbers) and not isinstance(v, bool) for v in values):
        what = "two whole numbers" if kind == "integer" else "two numbers"
        raise InputError(f"{where}: {kind} has {values!r}; expected {what}, [low, high] (write 1e-4 as 1.0e-4)")
    if not values[0] < values[1]:
        raise InputError(f"{where}: {kind} has {values!r}; expected [low, high] with low < high")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"{where}: loguniform from {values[0]}; expected a positive low end")
