"""What `create` is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers

Pool = Literal["mean", "max", "cls", "mean_max", "embedding"]
MAX_FOLDS = 32
BOUNDS = OPTION_BOUNDS | {
    "image_size": (16, 1024), "shard_mib": (1, 2**16), "folds": (2, MAX_FOLDS), "retries": (0, 1000),
    "cpus_per_shard": (1, 4096), "gpus_per_shard": (0, 1), "workers": (1, 256)
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9_][\w.\-]{0,99}")


@dataclass(frozen=True)
class CreateOptions:
    """Options of `python -m mtl_dist.features create`, beside where it writes to."""

    data: tuple[str, ...] = ()
    """Sets of pictures, as `shards create` writes them: train, val or both."""
    runs: tuple[str, ...] = ()
    """What describes pictures: runs (their best checkpoints), checkpoints, exported directories, or files of weights.
    Several: a set of features each, or the parts of --folds."""
    names: tuple[str, ...] = ()
    """Directories of several sets of features, below DEST; none: the runs' own names."""
    backbone: str | None = None
    """The network that files of weights are of: iresnet100, densenet121, denseface, vit_base, timm:NAME ..."""
    image_size: int | None = None
    """Side in pixels of the pictures that files of weights read; None: 112. Runs have their own."""
    pool: Pool = "mean"
    """What becomes of a picture's cells: their mean, their maximum, both (mean_max); a ViT's class token (cls); or
    what insightface's IResNet has behind them (embedding)."""
    folds: int | None = None
    """Cross-fitted: as many --runs, each trained without the videos of its fold. Training rows are described by
    the one that has not seen them, others by the mean of all."""
    folds_by: Path | None = None
    """A table `video,fold` that `features folds` wrote; without, folds are dealt as it deals them."""
    statistics: tuple[str, ...] = ()
    """Features of the training split whose mean and deviation a validation set gets, where it is made alone; one for
    each of --runs. None: those at DEST."""
    batch: int = 64
    """Pictures of a forward pass: another number may change last bits."""
    bf16: bool = False
    """Compute under bf16 autocast: quicker on GPUs, with 3 digits."""
    shard_mib: int = 64
    """A shard is full at about so many MiB; videos are not cut."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs: int | None = None
    """On this machine: CPUs to compute on (None: all that there are), or GPUs."""
    workers: int | None = None
    """Loader threads of a process; None: one for every eight CPUs it computes on, and for a GPU four."""
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""
    local: bool = False
    """Work on this machine, even where there is a cluster."""
    cpus_per_shard: int = 1
    """CPUs of the cluster that a shard is made with."""
    gpus_per_shard: float = 0.0
    retries: int = 2
    """How often a shard is tried again after a failure."""
    autoscaling: bool = False
    """The cluster adds nodes when shards wait for them: do not refuse what it has no room for yet."""


def check_options(options: CreateOptions) -> None:
    """Raise `InputError` for what is wrong whatever sets and runs hold."""
    if not options.data:
        raise InputError("--data names no set; expected one or two that `shards create` wrote: train, val or both")
    if not options.runs:
        raise InputError(
            "--runs names nothing; expected a run, a checkpoint, an exported directory or a file of weights"
        )
    check_numbers(BOUNDS, **vars(options))
    if not options.local and options.gpus_per_shard not in (0, 1):
        raise InputError(f"--gpus-per-shard is {options.gpus_per_shard:g}; a shard is made on one GPU: 0 or 1")
    if options.folds is None and options.folds_by is not None:
        raise InputError("--folds-by is given without --folds; say with it how many there are")
    num_sets = 1 if options.folds else len(options.runs)
    if options.folds and len(options.runs) != options.folds:
        raise InputError(
            f"--folds is {options.folds}, and --runs names {len(options.runs)}; expected one for each fold, in order"
        )
    for flag, given in (("names", options.names), ("statistics", options.statistics)):
        if given and len(given) != num_sets:
            raise InputError(f"--{flag} has {len(given)} for {num_sets} set(s) of features; expected one each")
    for name in options.names:
        if not NAME.fullmatch(name):
            raise InputError(f"--names has {name!r}; expected letters, digits, '.', '-' and '_'")
    for flag, given in (("names", options.names), ("runs", options.runs), ("data", options.data)):
        if twice := [value for place, value in enumerate(given) if value in given[:place]]:
            raise InputError(f"--{flag} has '{twice[0]}' twice; expected each once")
