"""Averages: of the weights over steps (`train.ema`), of BatchNorm's running statistics over ranks."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.batchnorm import find_norms, find_trained_norms
from mtl_dist.config import Config
from mtl_dist.errors import InputError

FEW_ROWS = 8  # fewer make poor statistics (arXiv 1803.08494, figure 1)


class WeightAverage:
    """Averages the parameters of `model` over its steps; buffers are taken as they are after each.

    Every rank holds the same average. The decay is min(decay, (1 + step) / (10 + step)), so that the first weights are
    soon forgotten. It depends on the step alone, so only the average itself has to be saved.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.copy_buffers(model)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take over the model's buffers, such as BatchNorm's statistics: they are not averaged."""
        if mine := list(self.model.buffers()):
            torch._foreach_copy_(mine, list(model.buffers()))


def sync_batchnorm(module: nn.Module, config: Config) -> nn.Module:
    """Return `module` with BatchNorm layers whose statistics are those of all ranks."""
    if not config.model.backbone.startswith("timm:"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    # timm's layers of normalisation and activation would come out of torch's conversion without the activation.
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(module)


def freeze_batchnorm(module: nn.Module) -> None:
    """Have BatchNorm layers use their running statistics, and not change them, until the next `train()`."""
    for norm in find_norms(module).values():
        norm.eval()


@torch.no_grad()
def check_batchnorm(model: nn.Module, *, rows: int, size: int) -> str:
    """Say, in a note, where `rows` of a forward pass are few for BatchNorm's statistics of them; empty where not.

    Raises `InputError` where one row of `size` pixels a side has but one value a channel, which has no variance.
    """
    if rows >= FEW_ROWS or not find_trained_norms(model):
        return ""
    remedy = "start fewer ranks, raise train.global_batch, lower train.accumulation, or set engine.batchnorm frozen"
    if rows <= 1:
        try:
            copy.deepcopy(model).train()(torch.zeros(1, 1, 3, size, size), torch.ones(1, 1, dtype=torch.bool))
        except ValueError as error:
            raise InputError(
                f"a rank has 1 row in a forward pass, too few for this network's BatchNorm ({error}): {remedy}"
            ) from None
    return (
        f"note: BatchNorm takes its statistics of {max(rows, 1)} row(s), a rank's part of a forward pass; where scores "
        f"stay behind, {remedy} (sync on GPUs)"
    )


@torch.no_grad()
def average_batchnorm(model: nn.Module, config: Config) -> None:
    """Make BatchNorm's running statistics the mean over ranks, before evaluation."""
    if not (buffers := _own_statistics(model, config)):
        return
    flat = torch.cat(list(buffers.values()))
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    write_batchnorm(model, config, flat)


@torch.no_grad()
def gather_batchnorm(model: nn.Module, config: Config) -> torch.Tensor | None:
    """Return every rank's running statistics (R, n); None where all ranks have the same. Every rank calls it.

    For checkpoints between evaluations: as many ranks continue each with its own. So neither how often a run is saved
    nor where it is continued shows in the last bits.
    """
    if not (buffers := _own_statistics(model, config)):
        return None
    mine = torch.cat(list(buffers.values()))
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    return torch.stack(of_ranks)


def name_batchnorm(model: nn.Module, config: Config, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut one row (n,) of what `gather_batchnorm` returns, or the mean of all, into the buffers' names and values."""
    buffers = _own_statistics(model, config)
    return dict(zip(buffers, flat.split([len(buffer) for buffer in buffers.values()])))


@torch.no_grad()
def write_batchnorm(model: nn.Module, config: Config, flat: torch.Tensor) -> None:
    """Set the running statistics to one row (n,) of what `gather_batchnorm` returned."""
    buffers = _own_statistics(model, config)
    for name, value in name_batchnorm(model, config, flat).items():
        buffers[name].copy_(value)


def _own_statistics(model: nn.Module, config: Config) -> dict[str, torch.Tensor]:
    """Return the running statistics that differ between ranks, by name."""
    if dist.get_world_size() == 1 or config.engine.batchnorm != "local":
        return {}
    return {
        f"{name}.{key}": getattr(norm, key)
        for name, norm in find_trained_norms(model).items()
        if norm.track_running_stats
        for key in ("running_mean", "running_var")
    }
