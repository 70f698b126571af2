"""Memory that is not there: a model that says so of batches of many rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

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
