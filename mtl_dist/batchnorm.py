"""The layers of BatchNorm of a model; passes that leave their statistics as they are, or estimate them anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def find_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of BatchNorm, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def find_trained_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of BatchNorm that learn, by name: not a frozen backbone's."""
    return {name: norm for name, norm in find_norms(model).items() if all(p.requires_grad for p in norm.parameters())}


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Have passes leave the running statistics as they are; they count as batches."""
    kept = [(norm, norm.momentum) for norm in find_norms(model).values()]
    for norm, _ in kept:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum


@contextlib.contextmanager
def counts_kept(model: nn.Module) -> Iterator[None]:
    """Have passes not count as batches of BatchNorm, so that they show in no checkpoint."""
    counted = [norm for norm in find_norms(model).values() if norm.num_batches_tracked is not None]
    counts = [norm.num_batches_tracked.clone() for norm in counted]
    try:
        yield
    finally:
        for norm, count in zip(counted, counts):
            norm.num_batches_tracked.copy_(count)


@contextlib.contextmanager
def statistics_anew(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Have passes in training mode estimate the running statistics of `norms` from nothing: the mean over all batches.

    As torch.optim.swa_utils.update_bn, but for the other layers of BatchNorm, which keep theirs. The model is in
    training mode meanwhile, and afterwards in that it had.
    """
    was_training, momenta = model.training, {name: norm.momentum for name, norm in norms.items()}
    model.train()
    for name, norm in find_norms(model).items():
        if name in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        else:
            norm.eval()
    try:
        yield
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
        model.train(was_training)
