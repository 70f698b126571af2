"""Numbers that every step computes with.

`torch.tensor(...)` or `.to(device)` in a step is a copy from the host, which waits for all that a GPU was given to do.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A tensor of the host, copied once for every device and precision that asks for it."""

    def __init__(self, values: Tensor):
        self._values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, other: Tensor) -> Tensor:
        """Return the values on the device of another tensor and with its type. They must not be changed."""
        key = other.device, other.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # a later backward pass may read them
                self._copies[key] = self._values.to(*key)
        return self._copies[key]
