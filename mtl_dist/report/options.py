"""What a report is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers

BOUNDS = OPTION_BOUNDS | {"draws": (1, 10**6), "faces": (0, 100), "errors": (0, 1000)}


@dataclass(frozen=True)
class ReportCommand:
    """Options of `python -m mtl_dist.report`."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs to compare: <storage>/<name> of each, as training printed it."""
    out: str
    """Directory or s3:// prefix to write to; what an earlier report wrote there is replaced."""
    ensemble: tuple[str, ...] = ()
    """What mtl_dist.ensemble wrote with --out; those of the same methods, combined in the same way, are one."""
    val: tuple[str, ...] = ()
    """Validation sets in the order of the runs, where they have moved since training."""
    attach: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Attach the page to each run in MLflow or W&B, where it was tracked (run.track); it replaces an earlier one."""
    title: str = "Valence and arousal, expressions, action units"
    """Heading of the page."""
    draws: int = 1000
    """Bootstrap draws of the videos."""
    faces: int = 3
    """Faces of the attention maps; of autoencoders, pictures of each run."""
    errors: int = 6
    """Pictures of the worst errors, of each task."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Loader threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def check_command(command: ReportCommand) -> None:
    """Raise `InputError` for what is wrong whatever the runs hold."""
    if not command.runs:
        raise InputError("no run is named; expected <storage>/<name> of one at least")
    if command.val and len(command.val) != len(command.runs):
        raise InputError(f"--val names {len(command.val)} sets for {len(command.runs)} runs; expected one each")
    for what, uris in (("run", command.runs), ("ensemble", command.ensemble)):
        plain = [uri.rstrip("/") for uri in uris]
        if repeated := next((uri for uri in plain if plain.count(uri) > 1), None):
            raise InputError(f"{what} {repeated} is named twice; name it once")
    check_numbers(BOUNDS, **vars(command))
