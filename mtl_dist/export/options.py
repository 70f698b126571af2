"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mtl_dist.errors import InputError


@dataclass(frozen=True)
class ExportCommand:
    """Options of `python -m mtl_dist.export`."""

    run: Annotated[str, tyro.conf.Positional]
    """Run (<storage>/<name>: its best checkpoint), or one of its checkpoints (.../checkpoints/step_...)."""
    out: str
    """Directory or s3:// prefix to write to; an earlier export there is replaced."""
    formats: tuple[Literal["safetensors", "onnx"], ...] = ("safetensors", "onnx")
    """What to write beside config.json and README.md."""
    images: str | None = None
    """Faces to compare torch and onnxruntime on: a directory, list, video or shard set. None: the validation set, or
    the training set of a run without one."""
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def check_command(command: ExportCommand) -> None:
    """Raise `InputError` for what is wrong whatever the run holds."""
    if not command.formats:
        raise InputError("--formats is empty; expected safetensors, onnx or both")
