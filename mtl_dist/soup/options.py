"""What a mean of checkpoints is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers

BOUNDS = OPTION_BOUNDS | {"last": (1, 10_000), "bn_batches": (1, 10**9)}


@dataclass(frozen=True)
class SoupCommand:
    """Options of `python -m mtl_dist.soup`."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs (<storage>/<name>: the best checkpoint of each), or checkpoints (.../checkpoints/step_...)."""
    out: str
    """Directory or s3:// prefix to write to, with nothing else in it. A finished one of the same checkpoints stays."""
    last: int | None = None
    """Take the last so many checkpoints of every run in the place of its best. A run keeps one or two by default; more
    with --checkpoint.keep-last of training."""
    greedy: bool = False
    """Choose among the checkpoints on the validation set; without, all are averaged."""
    val: tuple[str, ...] = ()
    """Validation sets of the runs, where they have moved since training."""
    train: tuple[str, ...] = ()
    """Training sets of the newest checkpoint, where they have moved since training: for BatchNorm's statistics."""
    bn_batches: int | None = None
    """Estimate BatchNorm's statistics on so many batches of training; None: on a whole epoch."""
    seed: int = 0
    """Deals videos into halves, for --greedy."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Loader threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def check_command(command: SoupCommand) -> None:
    """Raise `InputError` for what is wrong whatever the runs hold."""
    if not command.runs:
        raise InputError("no run is named; expected <storage>/<name> of one at least")
    check_numbers(BOUNDS, **vars(command))
    if len(command.runs) == 1 and (command.last or 1) == 1:
        raise InputError(
            f"{command.runs[0]} alone gives one checkpoint, and nothing to average; take its last ones with --last 5, "
            "say, or name more runs"
        )
    plain = [uri.rstrip("/") for uri in command.runs]
    if repeated := next((uri for uri in plain if plain.count(uri) > 1), None):
        raise InputError(f"run {repeated} is named twice; name it once")
    if command.seed and not command.greedy:
        raise InputError(f"--seed is {command.seed}, and only --greedy reads it; leave it out")
