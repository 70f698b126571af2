"""Folds of videos: the one way to deal them, for runs that leave a fold out and for extractors that do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist.data.cache import Cache
from mtl_dist.data.features import FeatureReader, feature_names_of
from mtl_dist.data.index import FEATURES, Sets
from mtl_dist.data.part import Kept, Part
from mtl_dist.data.reader import ShardReader, names_of
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.crossfit import make_folds
from mtl_dist.settings import parse_fold
from mtl_dist.shards.splits import group_rows
from mtl_dist.shards.writer import count_labels
from mtl_dist.timeline import owners_of

SEED = 0  # of the one way to deal


def deal_folds(videos: Sequence[str], num_rows: np.ndarray, num_folds: int, *, source: str) -> np.ndarray:
    """Deal videos of so many rows (v,) into folds of about as many rows, (v,) int64 from 0.

    A function of the names and rows, not of their order. What has one name stays together, and so do the halves of a
    video, `X_left` and `X_right`. Raises `InputError` where there are fewer videos than folds.
    """
    by_name = sorted(range(len(videos)), key=videos.__getitem__)
    groups = group_rows(pa.array([videos[place] for place in by_name], pa.large_string()), None)
    if (count := groups.max() + 1) < num_folds:
        raise InputError(f"{source} has {count} video(s), too few for {num_folds} folds; ask for fewer")
    rows = np.asarray(num_rows)[by_name]
    folds = np.empty(len(videos), np.int64)
    folds[by_name] = make_folds(np.repeat(groups, rows), num_folds, seed=SEED)[np.cumsum(rows) - rows]
    return folds


def part_by_fold(sets: Sets, fold: str, cache: Cache) -> tuple[Sets, Sets]:
    """Return what a run trains on that leaves a fold (`K/N`, from 1) of the videos of sets out, and that fold.

    Reads all sidecars. Raises `InputError` where there are fewer videos than folds.
    """
    number, num_folds = parse_fold(fold)
    stored = [_read_stored(own, cache) for own in sets.each()]
    owners = pa.chunked_array([pa.array(of_set.owners, pa.large_string()) for of_set in stored]).combine_chunks()
    owners = owners.dictionary_encode()
    of_row = owners.indices.to_numpy()
    folds = deal_folds(owners.dictionary.to_pylist(), np.bincount(of_row), num_folds, source=str(sets))[of_row]
    held_out = np.split(folds == number - 1, np.cumsum([len(of_set.owners) for of_set in stored])[:-1])
    sides = {f"all but fold {fold}": [~rows for rows in held_out], f"fold {fold}": held_out}
    train, val = (
        replace(sets, part=Part(name, tuple(Kept(rows, of_set.count(rows)) for rows, of_set in zip(side, stored))))
        for name, side in sides.items()
    )
    return train, val


class _Labels(NamedTuple):
    """Labels of n rows, arrays as of a `Sidecar`, masks as bool."""

    va: np.ndarray
    expr: np.ndarray
    au: np.ndarray
    va_mask: np.ndarray
    expr_mask: np.ndarray
    au_mask: np.ndarray


class _Stored(NamedTuple):
    """Whose the rows of a set are, and their labels, in the order in which they are stored."""

    owners: list[str]
    labels: _Labels

    def count(self, rows: np.ndarray) -> LabelCounts:
        """Count the labels of some rows, (n,) bool."""
        return count_labels(_Labels(*(array[rows] for array in self.labels)))


def _read_stored(sets: Sets, cache: Cache) -> _Stored:
    """Read the sidecars of a set; of sets that stand side by side, of the first."""
    uri, index = sets.pairs()[0]
    is_features = index.format == FEATURES
    sidecars = list((FeatureReader if is_features else ShardReader)(uri, index, cache).sidecars())
    _, images, videos = (feature_names_of if is_features else names_of)(sidecars)
    labels = {name: np.concatenate([getattr(sidecar, name) for sidecar in sidecars]) for name in _Labels._fields}
    return _Stored(
        owners_of(images, videos),
        _Labels(**{name: array.astype(bool) if "mask" in name else array for name, array in labels.items()}),
    )
