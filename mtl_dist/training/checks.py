"""Whether ranks can train what is asked for: their number, their settings, what they save."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from mtl_dist.config import Config
from mtl_dist.data.mixed import shares_of, split_batch
from mtl_dist.errors import InputError, NonFiniteLoss
from mtl_dist.models import non_finite, num_parameters
from mtl_dist.ranks import gather_lists, on_rank_0
from mtl_dist.runs.checkpoint import MAX_TENSOR_BYTES
from mtl_dist.runs.same_run import NAMING_WEIGHTS, weights_name
from mtl_dist.settings import Varies, flatten, varying
from mtl_dist.training.averaging import check_batchnorm
from mtl_dist.training.plan import Data
from mtl_dist.training.saving import Saver

STATES = {"adamw": 2, "sgd": 1}  # that an optimizer has of each trained parameter, at most


def check_num_ranks(config: Config, num_ranks: int) -> None:
    """Raise `InputError` where this many ranks cannot share the batch."""
    if num_ranks > config.num_streams:
        raise InputError(
            f"{num_ranks} ranks for {config.num_streams} streams: a rank reads one at least; start "
            "fewer ranks, or raise train.global_batch or data.streams"
        )
    check_parts(config, num_ranks, config.train.least_parts)


def check_parts(config: Config, num_ranks: int, parts: int) -> None:
    """Raise `InputError` where a rank's part of a step cannot be cut into so many micro-batches."""
    least_rows = min_rows(config, num_ranks)
    if config.engine.batchnorm == "sync" and parts > least_rows:
        raise InputError(
            f"train.accumulation is {parts}, but a rank has {least_rows} rows of a step: with "
            "engine.batchnorm sync every part needs one at least; use fewer parts, fewer ranks, or local"
        )
    if config.engine.zero_stage == 2 and parts > least_rows:
        # DeepSpeed 0.19.8 adds gradients up in the order of each rank's pass, and a pass without rows has another.
        raise InputError(
            f"train.accumulation is {parts}, but a rank has {least_rows} rows of a step: at engine.zero_stage 2 "
            "every part needs one at least; use fewer parts, fewer ranks, or --engine.zero-stage 0"
        )


def check_ranks_agree(config: Config, data: Data) -> None:
    """Raise on every rank unless all have the same settings and the same data. Every rank calls it.

    Launchers of several nodes each read a command line and, where data is local, files of their own.
    """
    free = varying(Config, Varies.BY_RANK)
    mine = {name: value for name, value in flatten(config).items() if name not in free} | data.identity()
    mine |= {name: weights_name(mine[name]) for name in NAMING_WEIGHTS}
    of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    for rank, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs.get(name) != value:
                raise InputError(
                    f"rank {rank} has {name} {theirs.get(name)!r}, and rank 0 has {value!r}: all ranks train one model "
                    "on one set; start every node with the same command, and give every node the same data"
                )


def note_batchnorm(model: nn.Module, config: Config, num_ranks: int, *, parts: int) -> str:
    """Say where a rank has few rows for BatchNorm's statistics, in so many micro-batches.

    Raises `InputError` where it has too few.
    """
    if config.engine.batchnorm != "local":
        return ""
    rows = min_rows(config, num_ranks) // parts
    return check_batchnorm(model, rows=rows, size=config.input_size)


def check_size(model: nn.Module, config: Config) -> None:
    """Raise `InputError` where a checkpoint would have a larger file than continuing reads."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    states = STATES[config.optim.name] * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # Of the two files the larger: the weights, or the optimizer's states with the raw weights where those are averages.
    needed = max(weights, states + (weights if config.train.ema else 0))
    if needed > MAX_TENSOR_BYTES:
        raise InputError(
            f"a checkpoint would have a file of {needed:,} bytes, and no run continues from one of more than "
            f"{MAX_TENSOR_BYTES:,}: {describe_size(model)} by {config.optim.name}, train.ema {config.train.ema:g}; "
            "choose a smaller model.backbone, or --model.freeze-backbone"
        )


def check_finite(module: nn.Module, step: int) -> None:
    """Raise before weights are saved that are no numbers: a finite loss can have gradients that are not.

    Every rank calls it: BatchNorm's statistics are each rank's own.
    """
    if wrong := list(dict.fromkeys(gather_lists(non_finite(module)))):
        raise NonFiniteLoss(f"step {step}: weights are not finite ({', '.join(wrong[:3])})")


def describe_what_is_left(saver: Saver, *, begun_at: int) -> str:
    """Say what checkpoint a run that diverged has, and what to do; every rank calls it."""

    def look() -> str:
        saver.wait()  # one may be on its way
        remedy = "lower optim.lr, or set a lower optim.clip_norm"
        if not saver.saved and not begun_at:
            return f"The run has no checkpoint: {remedy}; --run.name may stay"
        last = f"of step {saver.saved.step} ({saver.saved.uri})" if saver.saved else f"of step {begun_at}"
        return (
            f"The last checkpoint is {last}: its weights are finite, but may have been diverging already. The same "
            f"command comes to the same end: {remedy}, under another --run.name"
        )

    return on_rank_0(look)


def describe_size(model: nn.Module) -> str:
    """Say how many parameters a model has, and how many are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = num_parameters(model)
    return f"{total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained"


def min_rows(config: Config, num_ranks: int) -> int:
    """Rows of a step (of a task's batch) that each rank has at least."""
    if config.data.mix:  # where the streams of a set begin anew, a rank may have one less of it than its part
        counts = [split_batch(config.train.global_batch, shares) for shares in shares_of(config)]
        return min(sum(max(count // num_ranks - 1, 0) for count in of_epoch) for of_epoch in counts)
    return config.train.global_batch // config.num_streams * (config.num_streams // num_ranks)
