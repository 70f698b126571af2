"""Whether a network describes pictures that it was trained on: it knows these by heart."""

from __future__ import annotations

from pathlib import Path

from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_sets
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.video_rows import read_rows
from mtl_dist.errors import InputError
from mtl_dist.features.extractors import FeatureNet, Network
from mtl_dist.features.plan import PictureSet
from mtl_dist.runs.weights import open_weights
from mtl_dist.shards.folds import part_by_fold
from mtl_dist.tasks import SPLITS

TRAIN, _ = SPLITS


def say_leaks(pictures: list[PictureSet], nets: list[FeatureNet]) -> None:
    """Say where a network describes what it was trained on; refuse it where folds were to prevent just that."""
    trained = {part.index.sha256: part.source.uri for part in pictures if part.index.split == TRAIN}
    for net in nets:
        for network in net.networks:
            if network.train_sha256 not in trained:
                continue
            where = trained[network.train_sha256]
            if net.num_folds > 1:
                raise InputError(
                    f"--folds: {network.given} was trained on all of {where}, its own fold with it; train it without "
                    "(python -m mtl_dist.features folds)"
                )
            print(
                f"note: {network.given} was trained on {where}: it knows these rows by heart, and their features are "
                "better than any others will be; see --folds"
            )
        if net.num_folds > 1:
            _check_folds(pictures, net)


def _check_folds(pictures: list[PictureSet], net: FeatureNet) -> None:
    """Raise `InputError` where a run of a fold was trained on videos of it, as far as its training set can be read."""
    for part in pictures:
        for fold, network in enumerate(net.networks if part.folds is not None else ()):
            own = {video for video, number in zip(part.rows.videos, part.folds.tolist()) if number == fold}
            try:
                seen = _training_videos(network, part.source.cache_dir)
            except InputError:
                print(f"note: what {network.given} was trained on cannot be read; fold {fold} should not be in it")
                continue
            if both := sorted(own & seen):
                raise InputError(
                    f"--folds: {network.given} is in the place of fold {fold}, and was trained on {len(both)} of its "
                    f"{len(own)} videos, such as {both[0]}; give the runs in the order of their folds, each trained "
                    "without its own"
                )


def _training_videos(network: Network, cache_dir: Path | None) -> set[str]:
    """Return the videos that a run was trained on. Raises `InputError` where that cannot be read."""
    if network.is_file:
        raise InputError("a file of weights does not say")
    data, cache = open_weights(network.uri).config.data, Cache(cache_dir)
    sets = read_sets(data.train)
    if data.fold:
        sets, _ = part_by_fold(sets, data.fold, cache)
    videos: set[str] = set()
    for own in sets.each():
        ((uri, index),) = own.pairs()
        rows = read_rows(ShardReader(uri, index, cache))
        is_seen = own.part.kept[0].rows[rows.first_samples] if own.part else [True] * len(rows.videos)
        videos.update(video for video, seen in zip(rows.videos, is_seen) if seen)
    return videos
