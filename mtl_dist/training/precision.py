"""The precision that a run computes in: bf16 autocast, TF32, and what else of a GPU's arithmetic is chosen.

`engine.autocast auto` is decided once, when a run begins, and its checkpoints say how: a run that is continued
elsewhere keeps it, on a CPU too. TF32 no CPU has; a run that goes on with another arithmetic than it had says so.
"""

from __future__ import annotations

from typing import Any

import torch

from mtl_dist.config import Config
from mtl_dist.ranks import gather_lists

ARITHMETIC = "arithmetic"  # in state.json


def settle_autocast(config: Config, device: torch.device, theirs: dict[str, Any] | None) -> Config:
    """Return the configuration with `engine.autocast` decided; every rank calls it.

    `theirs` are the settings (by dotted name) that the training to be continued had; None: it begins. auto then is bf16
    where the GPUs of all ranks have it.
    """
    if config.engine.autocast != "auto":
        return config
    found = theirs.get("engine.autocast", "none") if theirs is not None else None
    if found not in ("none", "bf16"):
        found = "bf16" if all(gather_lists([_has_bf16(device)])) else "none"
    return config.model_copy(update={"engine": config.engine.model_copy(update={"autocast": found})})


def set_precision(config: Config, device: torch.device) -> None:
    """Have torch compute float32 on a GPU as the configuration says: for the whole process."""
    if device.type != "cuda":
        return
    tf32 = config.engine.tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = config.engine.cudnn_benchmark


def describe_arithmetic(config: Config, device: torch.device) -> str:
    """Say what a rank computes in: a run keeps it in its checkpoints."""
    autocast = "bf16 autocast" if config.engine.autocast == "bf16" else "fp32"
    return f"{autocast} on {device.type}{' with TF32' if device.type == 'cuda' and config.engine.tf32 else ''}"


def note_arithmetic(config: Config, device: torch.device, before: str | None) -> str:
    """Say that a run goes on in another arithmetic than it had; empty where it does not, or none is known."""
    now = describe_arithmetic(config, device)
    if before in (None, now):
        return ""
    return f"note: the run was trained in {before}, and goes on in {now}: the last digits are others"


def _has_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 in hardware made for it. CPUs are slower with it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
