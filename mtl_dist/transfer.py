"""Copies between the host and a device that nobody waits for.

A GPU reads pinned memory by itself: such a copy is queued like a kernel, and the host goes on. It must leave the memory
alone until the copy is done, which an event tells. Memory that is not pinned makes the host wait for all that is
queued. A CPU needs none of this: its tensors stay as they are, and every event is over at once.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtl_dist.tasks import Batch, Labels

CPU = torch.device("cpu")


class Event(Protocol):
    """A place in what a device was given to do."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""


class Pinning(Protocol):
    """How memory is pinned for a kind of device, and its events."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host in pinned memory: itself, where it lies there."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return new pinned memory of the host."""
        ...

    def mark(self, device: torch.device) -> Event:
        """Return an event behind all that the device was given by now."""
        ...


class CudaPinning:
    """CUDA's. Torch keeps what it pinned for later, and hands none of it out while a copy reads it."""

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_pinned() else tensor.pin_memory()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def mark(self, device: torch.device) -> Event:
        event = torch.cuda.Event(blocking=True)  # who waits for it sleeps: the loader needs the processor
        event.record(torch.cuda.current_stream(device))
        return event


PINNING: dict[str, Pinning] = {"cuda": CudaPinning()}  # by kind of device; for the others nothing is pinned


class _Over:
    """The event of a device that has done everything: the CPU."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def pins(device: torch.device) -> bool:
    """Whether a device reads pinned memory by itself."""
    return device.type in PINNING


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; the copy may be under way."""
    return pin(tensor, device).to(device, non_blocking=True)


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor as the device can read it by itself: in pinned memory, where it is one of the host."""
    return PINNING[device.type].pin(tensor) if pins(device) and tensor.device.type == "cpu" else tensor


def pin_batch(batch: Batch, device: torch.device) -> Batch:
    """Pin what `Batch.to` copies. It is copied on the host first, but for what is pinned already."""
    labels = Labels(*(pin(tensor, device) for tensor in batch.labels))
    return batch._replace(inputs=pin(batch.inputs, device), valid=pin(batch.valid, device), labels=labels)


def receive(tensor: Tensor) -> tuple[Tensor, Event]:
    """Copy a tensor of a device that pins to the host: its values are there once the event is over."""
    host = PINNING[tensor.device.type].empty(tuple(tensor.shape), tensor.dtype)
    host.copy_(tensor, non_blocking=True)
    return host, mark(tensor.device)


def mark(device: torch.device) -> Event:
    """Return an event that is over once the device has done all that it was given by now."""
    return PINNING[device.type].mark(device) if pins(device) else _Over()


def new_bytes(count: int, device: torch.device) -> np.ndarray:
    """Return new memory of the host (count,) uint8, pinned where the device reads such."""
    return PINNING[device.type].empty((count,), torch.uint8).numpy() if pins(device) else np.empty(count, np.uint8)
