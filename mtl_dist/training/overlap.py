"""Gradients are added up over ranks while the backward pass still goes on: on GPUs, at ZeRO 0.

DeepSpeed 0.19.8 begins when the pass is over. Here parameters lie in buckets, from the last to the first. A bucket is
on its way once the pass has made its gradients, and all buckets before it are: so ranks add up the same ones in the
same order, whatever order their passes have (that of a rank without samples is another). What is added up, and the mean
that is taken of it, are DeepSpeed's.

Micro-batches but the last of a step only add to the gradients. What reads gradients, to clip them or to step, comes
after `Overlap` has been called.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.config import Config

BUCKET = 5_000_000  # numbers, 20 MB of float32: torch's DistributedDataParallel takes 25


def overlaps(config: Config, device: torch.device, num_ranks: int) -> bool:
    """Whether the ranks of a run overlap."""
    engine = config.engine
    # Sync BatchNorm has collectives in the backward pass too, of another group: NCCL wants one order of both.
    is_alone = not engine.zero_stage and engine.batchnorm != "sync"
    return engine.overlap and is_alone and device.type == "cuda" and num_ranks > 1


def make_buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets of at most so many numbers, from the last; a larger one has its own."""
    buckets: list[list[nn.Parameter]] = []
    size = most
    for parameter in reversed(parameters):
        if not buckets or size + parameter.numel() > most:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


class Overlap:
    """Stands in for the `allreduce_gradients` of a DeepSpeed engine at ZeRO 0."""

    def __init__(self, engine, most: int = BUCKET):
        self._engine, self._group = engine, engine.seq_data_parallel_group
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._buckets = make_buckets(trained, most)
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._made, number))
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]  # gradients that the pass has yet to make
        self._under_way: list[tuple[Tensor, dist.Work]] = []

    def _made(self, number: int, parameter: nn.Parameter) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            self._missing[number] -= 1
            while len(self._under_way) < len(self._buckets) and not self._missing[len(self._under_way)]:
                self._send()

    def _send(self) -> None:
        """Begin to add up the next bucket. A parameter that nothing came to has a gradient of zeros, as DeepSpeed's."""
        bucket = self._buckets[len(self._under_way)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
        self._under_way.append((flat, dist.all_reduce(flat, group=self._group, async_op=True)))

    @torch.no_grad()
    def __call__(self) -> None:
        """Have every gradient be the mean over ranks, once a step's last pass is over. A collective."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        while len(self._under_way) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._under_way):
            work.wait()
            flat.mul_(1.0 / dist.get_world_size(self._group))
            parts = flat.split([parameter.numel() for parameter in bucket])
            torch._foreach_copy_(
                [parameter.grad for parameter in bucket],
                [part.view_as(parameter) for part, parameter in zip(parts, bucket)],
            )
        self._begin()
