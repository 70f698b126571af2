"""`engine.compile`: the model by torch.compile, tried before training begins."""

from __future__ import annotations

import torch

from mtl_dist.errors import InputError
from mtl_dist.objective.module import ObjectiveModule


def compile_model(module: ObjectiveModule, device: torch.device) -> None:
    """Have a module run its model compiled. The model's names, and so checkpoints, stay as they are.

    Raises `InputError` where nothing can be compiled: torch needs a C++ compiler, and Triton on a GPU.
    """
    try:
        torch.compile(_try)(torch.ones(4, device=device))
    except Exception as error:  # of torch, of a compiler, of the operating system
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"engine.compile cannot work here ({type(error).__name__}: {reason}); torch.compile needs a C++ compiler, "
            "and Triton on GPUs: install them, or leave --engine.compile out"
        ) from None
    module.compiled = torch.compile(module.model.forward)


def _try(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2 + 1
