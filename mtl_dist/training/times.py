"""The time of a step by its parts, measured without making anybody wait.

On a GPU a part's time is between two events in its queue, which are read once the step is done: so `data` is how long
the GPU had nothing to do, and not how long the host waited, which may be ahead. On a CPU it is the host's clock.
Of parts within parts each has its own time alone, so that all add up to the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from mtl_dist.spans import BACKWARD, DATA, EVALUATION, FORWARD, OPTIMIZER, RANKS, SAVE, span

REST = "rest"  # what no span names: copies to the device, augmentation, the next batch's order
# In this order wherever they are shown. ranks: waiting for other ranks, and adding up with them.
PARTS = (DATA, FORWARD, BACKWARD, RANKS, OPTIMIZER, SAVE, REST)
OWN = (DATA, FORWARD, BACKWARD, REST)  # by which a rank is slower than another
# What DeepSpeed does in a step, and what it is of.
OF_ENGINE = {"forward": FORWARD, "backward": BACKWARD, "allreduce_gradients": RANKS, "step": OPTIMIZER}


class Clock(Protocol):
    """A clock of a device."""

    def mark(self) -> Any:
        """Return the place that the device's queue has come to."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks, which the device has come past."""
        ...


class HostClock:
    """The host's clock: a CPU has done all that it was given."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Events of CUDA."""

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3  # ms


class Parts:
    """The parts of one step."""

    def __init__(self, clock: Clock, marks: list[tuple[str, Any]]):
        self._clock, self._marks = clock, marks

    def read(self) -> dict[str, float]:
        """Return the seconds of every part, once the device has done the step. An evaluation in between is left out."""
        seconds: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:]):
            seconds[name] = seconds.get(name, 0.0) + self._clock.seconds(begin, end)
        return {name: seconds[name] for name in PARTS if name in seconds}


class Times:
    """Notes where parts of steps begin and end; a `spans.Listener`."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._within: list[tuple[str, Any]] = []  # parts that have begun, each with what names it in a profile
        self._marks: list[tuple[str, Any]] = [(REST, clock.mark())]
        self.in_profile = False  # whether a profile is to have the parts' names

    def enter(self, name: str) -> None:
        """Begin a part."""
        named = torch.profiler.record_function(f"mtl_dist.{name}") if self.in_profile else None
        if named:
            named.__enter__()
        if self._within and self._within[-1][0] == EVALUATION:
            name = EVALUATION  # with all that is within
        self._within.append((name, named))
        self._marks.append((name, self._clock.mark()))

    def leave(self) -> None:
        """End the part that has begun last."""
        _, named = self._within.pop()
        self._marks.append((self._within[-1][0] if self._within else REST, self._clock.mark()))
        if named:
            named.__exit__(None, None, None)

    def cut(self) -> Parts:
        """End a step; return its parts, to be read later."""
        end = self._clock.mark()
        marks = [*self._marks, ("", end)]
        self._marks = [(self._within[-1][0] if self._within else REST, end)]
        return Parts(self._clock, marks)


def build_times(device: torch.device) -> Times:
    """Build what measures the steps of a device."""
    return Times(CudaClock(device) if device.type == "cuda" else HostClock())


def name_parts(engine) -> None:
    """Have an engine of DeepSpeed say what it does of a step."""
    for method, part in OF_ENGINE.items():
        setattr(engine, method, span(part)(getattr(engine, method)))


def own_seconds(parts: Mapping[str, float]) -> float:
    """Return what of a step a rank needs for itself."""
    return sum(parts.get(name, 0.0) for name in OWN)
