"""Gradients scaled down to a norm, by numbers that stay on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

EPS = 1e-6  # DeepSpeed's and torch's


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients, which every rank holds alike, so that their norm is `max_norm` at most. A collective.

    The arithmetic is DeepSpeed's (`deepspeed.runtime.utils.clip_grad_norm_`, 0.19.8), to the last bit on a CPU.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([each.float() for each in gradients])])
    norm = norms.pow(2.0).sum().pow(0.5).view(1) / float(dist.get_world_size())
    dist.all_reduce(norm)
    scale = (torch.full_like(norm, max_norm) / (norm + EPS)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale[0])
