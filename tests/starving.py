"""Memory that is not there: a model that says so of batches of many rows, and a process that may have no more."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from mtl_dist.features.pooling import Pooled
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.training.memory import Memory


class _Fails(torch.autograd.Function):
    """Runs out of memory in its backward pass."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


@contextlib.contextmanager
def starving(most_rows: int, *, where: str = "forward", from_step: int = 1) -> Iterator[list[int]]:
    """Have passes with gradients of more rows than these run out of memory, once the model has seen them.

    Yields the rows of every pass that did.
    """
    predict, fit, step, failed = ObjectiveModule._predict, Memory.fit, [from_step], []

    def starved_predict(self, batch, **how):
        outputs, rows = predict(self, batch, **how), len(batch.inputs)
        if rows <= most_rows or step[0] < from_step or not torch.is_grad_enabled():
            return outputs
        failed.append(rows)
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return type(outputs)(*(_Fails.apply(output) for output in outputs))

    def noting_fit(self, passes, done, **how):
        step[0] = done + 1
        return fit(self, passes, done, **how)

    with mock.patch.object(ObjectiveModule, "_predict", starved_predict), mock.patch.object(Memory, "fit", noting_fit):
        yield failed


@contextlib.contextmanager
def starving_networks(most_pictures: int) -> Iterator[list[int]]:
    """Have what describes pictures run out of memory with more than these. Yields the pictures of every pass."""
    describe, passed = Pooled.forward, []

    def starved(self, images):
        passed.append(len(images))
        if len(images) > most_pictures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return describe(self, images)

    with mock.patch.object(Pooled, "forward", starved):
        yield passed


@contextlib.contextmanager
def limited(mebibytes: int) -> Iterator[None]:
    """Have the kernel give this process so much more memory than it has before its first step, for good."""
    fit, is_limited = Memory.fit, []

    def limiting_fit(self, passes, done, **how):
        if not is_limited:
            is_limited.append(True)
            held = int(re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
            resource.setrlimit(resource.RLIMIT_AS, (held + (mebibytes << 20), resource.RLIM_INFINITY))
        return fit(self, passes, done, **how)

    with mock.patch.object(Memory, "fit", limiting_fit):
        yield
