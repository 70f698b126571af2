"""A finished run as something that predicts: its best checkpoint, its model, its validation set.

What the ensemble, the report, prediction and export start from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mtl_dist import storage
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.index import Sets, check_stored, read_sets
from mtl_dist.data.loader import eval_batches, lend
from mtl_dist.data.samples import open_samples
from mtl_dist.errors import InputError
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.objective.scores import HOW_TO_SCORE, NO_SCORE
from mtl_dist.predicting.evaluate import predict
from mtl_dist.runs.weights import Weights, is_export, load_weights, open_best, open_weights
from mtl_dist.settings import parse_fold
from mtl_dist.shards.folds import part_by_fold
from mtl_dist.timeline import video_names


class Member(NamedTuple):
    """A run with its best weights and its validation set."""

    run_uri: str  # as it was given
    weights: Weights
    val: Sets

    @property
    def fold(self) -> str:
        """The fold of its sets that it was trained without, K/N; empty: it has a validation set of its own."""
        return self.weights.config.data.fold

    @property
    def num_folds(self) -> int:
        """How many folds its sets were dealt into; 1: none."""
        return parse_fold(self.fold)[1] if self.fold else 1


def open_member(
    run_uri: str, val_uri: str | None = None, *, reads_exports: bool = False, cache_dir: Path | None = None
) -> Member:
    """Find a run's best committed checkpoint and its validation set. Raises `InputError`.

    `val_uri` is where that set is now; of a run that holds a fold out, where its training set is. With `reads_exports`
    also an exported directory, which does not say where its validation set is.
    """
    if reads_exports and is_export(run_uri):
        weights = open_weights(run_uri)
        if not val_uri:
            raise InputError(
                f"{run_uri} is an export, which does not say where its validation set is; give it with --val, one set "
                "for each of --runs"
            )
    else:
        weights = open_best(run_uri)
    return find_member(run_uri, weights, val_uri, cache_dir=cache_dir)


def find_member(run_uri: str, weights: Weights, val_uri: str | None, *, cache_dir: Path | None) -> Member:
    """Find the validation set of a run with these weights. Raises `InputError`."""
    return Member(run_uri, weights, open_val(weights, run_uri, (val_uri,) if val_uri else (), cache_dir=cache_dir))


def open_val(weights: Weights, given: str, val_uris: Sequence[str] = (), *, cache_dir: Path | None = None) -> Sets:
    """Open the validation set that weights were scored on, at `val_uris` where these are given. Raises `InputError`.

    `given` is what the weights are called.
    """
    if not weights.is_scored:
        raise InputError(f"run {given} has {NO_SCORE}; {HOW_TO_SCORE}")
    moved = "" if val_uris else "; where the set has moved since training, say where it is with --val, one set a run"
    data = weights.config.data
    try:
        sets = read_sets(val_uris or (data.train if data.fold else data.val))
        for uri, index in sets.pairs():
            check_stored(uri, index)
        val = part_by_fold(sets, data.fold, Cache(cache_dir))[1] if data.fold else sets
    except InputError as error:
        raise InputError(f"the validation set of run {given}: {error}{moved}") from None
    if val.sha256 != weights.identity.get("validation set"):
        raise InputError(
            f"{val} is not the validation set that {weights.uri} was scored on; give the right one with --val"
        )
    return val


def unique_names(uris: Sequence[str], *, taken: tuple[str, ...] = ()) -> list[str]:
    """Return the last parts of URIs, numbered where two are equal or a name is `taken`."""
    names: list[str] = []
    for uri in uris:
        name = stem = storage.join(uri).rpartition("/")[2]
        number = 1
        while name in (*taken, *names):
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def check_apart(out: str, runs: Sequence[str]) -> None:
    """Raise `InputError` where --out would put files among those of a run."""
    target = storage.join(storage.absolute(out), "")
    for run in runs:
        if target.startswith(storage.join(storage.absolute(run), "")):
            raise InputError(f"--out is {out}, where the run {run} keeps its own files; name another directory")


def predict_member(
    member: Member,
    *,
    device: torch.device,
    batch: int = 64,
    workers: int = 1,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
    model: nn.Module | None = None,
) -> PredictedRows:
    """Predict a member's validation set with its checkpoint; rows in ascending order.

    `model` is what `load_weights` returned, where it is wanted for more than this.
    """
    config = member.weights.config
    cache = Cache(cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    val = open_samples(member.val, config, cache)
    if val.whole().frames is not None:  # a batch is of whole videos, as many as the run was evaluated with
        batch = min(batch, config.train.eval_batch)
    batches = eval_batches(
        val, batch=batch, rank=0, num_ranks=1, workers=workers, prefetch=config.data.prefetch)  # fmt: skip
    predicted = predict(
        (model or load_weights(member.weights)).to(device),
        lend(val, batches),
        prepare=build_preparation(config),
        device=device,
        bf16=config.engine.autocast == "bf16",
        progress=progress,
    )
    by_row = np.argsort(predicted.rows)
    return PredictedRows(
        predicted.rows[by_row],
        Predictions(*(array[by_row] for array in predicted.predictions)),
        Targets(*(array[by_row] for array in predicted.targets)),
    )


class RowNames(NamedTuple):
    """What validation rows are called, in ascending order of rows."""

    images: list[str]
    videos: list[str]


def row_names(member: Member, cache_dir: Path | None = None) -> RowNames:
    """Return the names of a member's validation rows and of their videos."""
    rows, images, videos = open_samples(member.val, member.weights.config, Cache(cache_dir)).names()
    places = np.argsort(rows)
    images, videos = ([names[place] for place in places] for names in (images, videos))
    return RowNames(images, [own or video for own, video in zip(videos, video_names(images))])
