"""Distributed training of multi-task facial affect models: valence/arousal, expressions and action units."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_dist.api import FacePrediction, InputError, Model, Prediction, load

__all__ = ["FacePrediction", "InputError", "Model", "Prediction", "load"]
__version__ = "0.1.0"

# How torch's threads wait for each other: OpenMP reads it when torch is imported, which is after this. Sleeping
# costs 5 to 13% on an idle machine, and is 1.4 times as fast beside one busy process (`python -m benchmarks.threads`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    """Find what `mtl_dist.api` offers when it is asked for: ranks and commands have no use for it."""
    if name in __all__:
        from mtl_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'mtl_dist' has no attribute '{name}'")
