"""The layers of BatchNorm of a model, and passes that leave their statistics as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def find_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of BatchNorm, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Have passes leave the running statistics as they are, and the count of batches."""
    norms = find_norms(model).values()
    kept = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)
