"""How fast a run is, and what holds it up: told once a minute, of all steps since.

Ranks wait for each other in every step, so the slowest sets the pace: it is the one that needs most time for itself.
Each tells the others its own with the question whether anybody was asked to stop, so it costs no message more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mtl_dist.training.times import PARTS, own_seconds

EVERY_S = 60.0
GIB = 2**30


class Pace:
    """Collects the steps of this rank, and what the others say. `hosts` are those of all ranks, in their order."""

    def __init__(self, hosts: Sequence[str], device: torch.device, *, clock: Callable[[], float] = time.monotonic):
        self._hosts, self._device, self._clock = hosts, device, clock
        self._begin()
        self._own_s, self._own_steps = 0.0, 0  # since the others were told

    def add(self, parts: Mapping[str, float], *, images: int, took_s: float) -> None:
        """Take note of a step's parts in seconds; `images` are those of all ranks."""
        for name, seconds in parts.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._steps, self._images, self._took_s = self._steps + 1, self._images + images, self._took_s + took_s
        self._own_s, self._own_steps = self._own_s + own_seconds(parts), self._own_steps + 1

    @property
    def own_s(self) -> float:
        """Seconds of a step that this rank has needed for itself since it last told the others; 0: not known."""
        return self._own_s / self._own_steps if self._own_steps else 0.0

    def heard(self, own_s: Sequence[float]) -> None:
        """Take note of what all ranks have said at one step; nothing where they were not asked."""
        if len(own_s):
            self._of_ranks.append(np.array(own_s))
            self._own_s, self._own_steps = 0.0, 0

    def take(self, *, is_last: bool = False) -> dict[str, Any] | None:
        """Return what there is to tell of the last minute, or of less where the run ends; None: it is not over."""
        if not self._steps or (self._clock() - self._begun < EVERY_S and not is_last):
            return None
        told: dict[str, Any] = {
            "steps": self._steps,
            "images_per_s": self._images / max(self._took_s, 1e-9),
            "seconds": {name: self._seconds[name] / self._steps for name in PARTS if name in self._seconds},
        }
        if self._of_ranks:
            means = np.mean(self._of_ranks, axis=0)
            rank = int(means.argmax())
            told["slowest"] = {"rank": rank, "host": self._hosts[rank], "own_s": float(means[rank])}
            told["slowest"]["median_s"] = float(np.median(means))
        if self._device.type == "cuda":
            told["gpu_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB  # the host's own count: no wait
        self._begin()
        return told

    def _begin(self) -> None:
        self._begun, self._steps, self._images, self._took_s = self._clock(), 0, 0, 0.0
        self._seconds: dict[str, float] = {}
        self._of_ranks: list[np.ndarray] = []


def describe_pace(told: Mapping[str, Any]) -> str:
    """Say in one line what `Pace.take` has told."""
    seconds = told["seconds"]
    total = sum(seconds.values())
    shares = ", ".join(f"{name} {value / max(total, 1e-9):.0%}" for name, value in seconds.items())
    line = f"{total:.3f} s each ({shares}), {told['images_per_s']:.0f} frames/s"
    if slowest := told.get("slowest"):
        over = slowest["own_s"] / max(slowest["median_s"], 1e-9) - 1
        line += f"; slowest rank {slowest['rank']} on {slowest['host']}, {over:.0%} over the median"
    return line + (f"; GPU memory {told['gpu_gib']:.1f} GiB at most" if "gpu_gib" in told else "")
