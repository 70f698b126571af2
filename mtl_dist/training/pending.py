"""What a step tells of itself, on its way from the device to the host."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl_dist.transfer import pins, receive

Values = TypeVar("Values")


class Pending(Generic[Values]):
    """Tensors of one device in tuples, dicts and the like: copied to the host all at once, and nobody waits.

    They travel as float64, which has all numbers of the other types (integers up to 2^53). Tensors of a CPU are not
    copied: they are there.
    """

    def __init__(self, values: Values):
        leaves, self._spec = tree_flatten(values)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._leaves: list[Any] = leaves
        self._sent = None
        if tensors and pins(tensors[0].device):
            self._sent = receive(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
            # What they looked like, in their places: their memory on the device is free.
            self._leaves = [_Like(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def read(self) -> Values:
        """Return the values as tensors of the host. Waits for the step that they are of, and for no later one."""
        if self._sent:
            flat, event = self._sent
            event.synchronize()
            parts = iter(flat.split([leaf.shape.numel() for leaf in self._leaves if isinstance(leaf, _Like)]))
            self._leaves = [
                next(parts).view(leaf.shape).to(leaf.dtype, copy=True) if isinstance(leaf, _Like) else leaf
                for leaf in self._leaves
            ]
            self._sent = None
        return tree_unflatten(self._leaves, self._spec)


class _Like:
    """A tensor's shape and type."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
