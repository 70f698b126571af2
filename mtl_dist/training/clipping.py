"""The norm of gradients, and gradients scaled down to one, by numbers that stay on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPS = 1e-6  # DeepSpeed's and torch's


class Clipper:
    """Clips the gradients of a step to `max_norm` (None: does not), and keeps what their norm was."""

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float | None):
        self._parameters, self._max_norm = list(parameters), max_norm
        self.norm: Tensor | None = None  # (1,) of the last step, on the device

    def __call__(self) -> None:
        """Look at the gradients, which every rank holds alike. A collective where there is a `max_norm`."""
        if self._max_norm is None:
            self.norm = _norm_of(_gradients(self._parameters))
        else:
            self.norm = clip_gradients(self._parameters, self._max_norm)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
    """Scale all gradients, which every rank holds alike, so that their norm is `max_norm` at most. A collective.

    The arithmetic is DeepSpeed's (`deepspeed.runtime.utils.clip_grad_norm_`, 0.19.8), to the last bit on a CPU. Returns
    the norm before (1,); None where there are no gradients.
    """
    gradients = _gradients(parameters)
    norm = _norm_of(gradients)
    if norm is None:
        return None
    norm = norm / float(dist.get_world_size())
    dist.all_reduce(norm)
    scale = (torch.full_like(norm, max_norm) / (norm + EPS)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale[0])
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def _norm_of(gradients: list[Tensor]) -> Tensor | None:
    if not gradients:
        return None
    norms = torch.stack([norm.float() for norm in torch._foreach_norm([each.float() for each in gradients])])
    return norms.pow(2.0).sum().pow(0.5).view(1)
