"""The tiny runs whose values are kept, and how they are read off."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mtl_dist.config import Config, build_config
from mtl_dist.presets import load_preset
from mtl_dist.runs.checkpoint import committed
from mtl_dist.training.tracking import read_records
from tests.conftest import run_here
from tests.test_recipes import run_ranks

HERE = Path(__file__).parent
VALUES = HERE / "values.json"
PRESETS = ("small", "small-b", "small-baseline")
SAMPLINGS = ("masked", "per_task")
BALANCERS = ("fixed", "uncertainty", "dwa", "famo")
SCORES = ("p", "ccc_v", "ccc_a", "expr", "au", "au_accuracy")
TINY: dict[str, Any] = {
    "data": {"image_size": 80, "workers": 0, "epoch_fraction": 0.5},
    "train": {"global_batch": 8, "epochs": 3, "eval_every": 3, "ema": 0.5},
    "model": {"hidden": 8},
    "optim": {"warmup_steps": 1},
    "engine": {"threads": 1, "device": "cpu"},
    "checkpoint": {"keep_last": 1},
}
# Beside the product: no average of weights, and what a run may do else.
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {"train": {"ema": 0.0}},
    "sgd": {"optim": {"name": "sgd", "lr": 0.01}},
    "frozen": {"engine": {"batchnorm": "frozen"}},
    "accumulation": {"train": {"accumulation": 2}},
    "unweighted": {"loss": {"expr_weights": "none", "au_weights": "none", "label_smoothing": 0.1}},
    "resized": {"augment": {"resize": 90, "hue": 0.1, "erase": 0.5}},
}
# How far from the values may be what another processor computes, several times what `spread` found. The first step has
# the losses of the untouched weights; later ones pass on what the optimizer makes of last bits.
TOLERANCES = {"first losses": 2e-5, "losses": 5e-3, "scores": 0.03, "weights": 3e-3, "ensemble": 0.03}
RELATIVE = ("first losses", "losses", "weights")
ALIGNED = "cropped_aligned"  # a run of the other view, for the ensemble


def worlds() -> dict[str, dict[str, Any]]:
    """The runs by name: what each changes of its preset."""
    found = {}
    for preset, sampling, balancing in itertools.product(PRESETS, SAMPLINGS, BALANCERS):
        found[f"{preset}_{sampling}_{balancing}"] = {"data": {"sampling": sampling}, "loss": {"balancing": balancing}}
    return found | {f"small_{name}": layer for name, layer in OTHERS.items()} | {f"small_{ALIGNED}": {}}


def worlds_on(num_ranks: int) -> list[str]:
    """The runs on so many ranks: on several those of one preset, for no model knows of ranks."""
    return [name for name in worlds() if num_ranks == 1 or name.partition("_")[0] == PRESETS[0]]


def config_of(name: str, num_ranks: int, shards: Path, storage: Path) -> Config:
    view = ALIGNED if name.endswith(ALIGNED) else "cropped"
    where = {
        "run": {"name": f"{name}_{num_ranks}", "storage": str(storage)},
        "data": {"train": f"{shards}/{view}/train", "val": f"{shards}/{view}/val"},
    }
    return build_config(load_preset(name.partition("_")[0]), TINY, worlds()[name], where)


def unpack(archive: Path, into: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    return into


def newest_archive() -> Path:
    return max((HERE / "formats").glob("*.tar.xz"))


def measure(scratch: Path) -> dict[str, Any]:
    """Train the worlds on 1 and on 2 ranks, and ensemble two of them; return what came of it."""
    shards, found = unpack(newest_archive(), scratch / "formats") / "shards", {}
    for num_ranks in (1, 2):
        configs = {name: config_of(name, num_ranks, shards, scratch / "runs") for name in worlds_on(num_ranks)}
        run_ranks(num_ranks, [(config, None) for config in configs.values()], scratch)
        found |= {config.run.name: read_values(config.run.uri) for config in configs.values()}
    runs = [f"{scratch}/runs/small_{name}_1" for name in ("masked_fixed", ALIGNED)]
    done = run_here("mtl_dist.ensemble", "--runs", *runs, "--out", f"{scratch}/ensemble", "--local", "--folds", "2")
    assert done.returncode == 0, done.stderr
    score = json.loads((scratch / "ensemble" / "score.json").read_text())
    return {
        "runs": found,
        "ensemble": {"p": score["p"], "p_calibrated": score["p_calibrated"], "scores": score["scores"]},
    }


def read_values(run: str) -> dict[str, Any]:
    """Read the losses of every step, the last scores, and what proves the weights, off a run's files."""
    records = read_records(run)
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    scores = [record["scores"] for record in records if record["kind"] == "eval"][-1]
    weights = load_file(f"{committed(run)[0][-1].uri}/model.safetensors")
    sizes = {name: float(np.square(tensor.astype(np.float64)).sum()) for name, tensor in weights.items()}
    parts = sorted({name.partition(".")[0] for name in sizes})
    return {
        "losses": losses,
        "scores": {name: scores[name] for name in SCORES},
        "weights": {
            part: sum(size for name, size in sizes.items() if name.partition(".")[0] == part) for part in parts
        },
    }


def distances(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the largest difference of each kind, and where it is: of losses and weights relative, of scores not."""
    assert found["runs"].keys() == expected["runs"].keys()
    worst = {kind: (0.0, "") for kind in TOLERANCES}

    def compare(kind: str, where: str, mine: Any, theirs: Any) -> None:
        if isinstance(theirs, dict):
            assert mine.keys() >= theirs.keys(), (where, theirs.keys() - mine.keys())  # scores are added
            for key in theirs:
                compare(kind, f"{where} {key}", mine[key], theirs[key])
        elif isinstance(theirs, list):
            assert len(mine) == len(theirs), where
            for place, values in enumerate(zip(mine, theirs)):
                compare(kind if place else "first losses", f"{where} {place}", *values)
        elif isinstance(theirs, float):
            away = abs(mine - theirs) / (abs(theirs) if kind in RELATIVE and theirs else 1)
            worst[kind] = max(worst[kind], (away, where))
        else:
            assert mine == theirs, (where, mine, theirs)

    for name, values in expected["runs"].items():
        for kind, theirs in values.items():
            compare(kind, name, found["runs"][name][kind], theirs)
    compare("ensemble", "ensemble", found["ensemble"], expected["ensemble"])
    return worst
