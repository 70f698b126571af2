"""What will be written: the shards of a set of features, those that are there already, and what belongs to another set.

A shard is done when its sidecar is in the store and belongs to this plan, so a restart makes only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.data.index import FEATURES, INDEX_NAME, FeatureIndex, Index, read_index
from mtl_dist.data.sidecar import read_about
from mtl_dist.data.video_rows import VideoRows
from mtl_dist.errors import Damaged, InputError
from mtl_dist.features.describing import How, Source
from mtl_dist.features.extractors import FeatureNet
from mtl_dist.features.layout import Video, cut
from mtl_dist.features.shard import Finished, Part, ShardTask, read_finished
from mtl_dist.shards.claims import claimed
from mtl_dist.shards.finished import list_sidecars, read_sidecars

MIB = 1 << 20
# What an index says of itself too; the rest is in the sidecars alone.
INDEXED = ("format", "view", "split", "rows", "shard_bytes", "source_index_sha256")


class PictureSet(NamedTuple):
    """A set of pictures that is to be described."""

    source: Source
    index: Index
    rows: VideoRows
    folds: np.ndarray | None  # (v,) int64 of its videos, where each is described by the network of its fold


class SetPlan(NamedTuple):
    """What will be written of one set of pictures by one extractor."""

    dest: str
    net: FeatureNet
    index: Index  # of the pictures
    shard_bytes: int
    tasks: list[ShardTask]
    done: dict[str, Finished]  # shards that an earlier run finished
    indexed: FeatureIndex | None  # that one's index

    def feature_index(self, finished: dict[str, Finished], mean: list[float], std: list[float]) -> FeatureIndex:
        """Return the index of the set, all of whose shards are finished."""
        pictures = self.index
        return FeatureIndex(
            format=FEATURES,
            view=pictures.view,
            split=pictures.split,
            rows=pictures.rows,
            frames_per_shard=None,
            shard_bytes=self.shard_bytes,
            seed=0,
            source_sha256=pictures.source_sha256,
            expressions=pictures.expressions,
            aus=pictures.aus,
            labels=pictures.labels,
            shards=[finished[task.name].entry for task in self.tasks],
            extractor=self.indexed.extractor if self.indexed else self.net.extractor,  # a name may be another by now
            source_index_sha256=pictures.sha256,
            mean=mean,
            std=std,
        )


def plan_set(
    pictures: PictureSet, net: FeatureNet, dest: str, *, how: How, shard_mib: int, claims: contextlib.ExitStack
) -> SetPlan:
    """Decide which shards are to be made at `dest`. Raises `InputError` before any is, and where it has another set.

    Until `claims` is closed nobody else makes another set there.
    """
    shard_bytes, rows = shard_mib * MIB, pictures.rows
    fingerprint = _fingerprint(pictures, net, how, shard_bytes)
    claims.enter_context(claimed(dest, fingerprint, rows.samples))
    videos = [
        Video(number, name, count, net.width)
        for number, (name, count) in enumerate(zip(rows.videos, rows.num_rows.tolist()))
    ]
    tasks = []
    for begin, end in cut(videos, shard_bytes=shard_bytes):
        part = rows.part(begin, end)
        folds = None if pictures.folds is None else pictures.folds[begin:end]
        tasks.append(
            ShardTask(
                name=f"shard-{len(tasks):06d}",
                dest=dest,
                about={**fingerprint, "begin": int(rows.starts[begin]), "rows_here": len(part.samples)},
                source=pictures.source,
                rows=part,
                first_video=begin,
                width=net.width,
                parts=_parts(net, part, folds),
                how=how,
            )
        )
    return SetPlan(dest, net, pictures.index, shard_bytes, tasks, *_find_done(dest, fingerprint, tasks, net))


def _parts(net: FeatureNet, rows: VideoRows, folds: np.ndarray | None) -> list[Part]:
    """Return what describes which rows of a shard."""
    everything = np.arange(len(rows.samples))
    if folds is None:
        return [(net.networks, everything)]
    of_row = np.repeat(folds, rows.num_rows)
    return [((net.networks[fold],), everything[of_row == fold]) for fold in np.unique(of_row).tolist()]


def _fingerprint(pictures: PictureSet, net: FeatureNet, how: How, shard_bytes: int) -> dict[str, Any]:
    """What decides the bytes of a set: a shard of another one is never taken for one of these."""
    index, extractor = pictures.index, net.extractor
    found = {
        "format": FEATURES,
        "view": index.view,
        "split": index.split,
        "rows": index.rows,
        "shard_bytes": shard_bytes,
        "source_index_sha256": index.sha256,
        **{f"extractor_{key}": value for key, value in extractor.model_dump().items()},
        "image_size": net.networks[0].image_size,
        "batch": how.batch,
        "device": how.device,
        "bf16": how.bf16,
    }
    if pictures.folds is not None:
        found["folds_sha256"] = hashlib.sha256(pictures.folds.astype("<i8").tobytes()).hexdigest()
    return found


def _find_done(
    dest: str, fingerprint: dict[str, Any], tasks: list[ShardTask], net: FeatureNet
) -> tuple[dict[str, Finished], FeatureIndex | None]:
    """Return the finished shards at `dest`, and its index where it has one. Raises `InputError` for another set's."""
    sizes, expected = dict(storage.list_objects(dest)), {task.name: task for task in tasks}
    index, indexed = None, None
    if INDEX_NAME in sizes:
        index = read_index(dest, formats=(FEATURES,))
        found = {key: getattr(index, key) for key in INDEXED}
        found |= {f"extractor_{key}": value for key, value in index.extractor.model_dump().items()}
        _check_same(dest, INDEX_NAME, found, {key: fingerprint[key] for key in found})
        indexed = {shard.name: shard for shard in index.shards}
    sidecars = list_sidecars(dest, sizes, expected, is_shard=lambda stem: stem.startswith("shard-") and "/" not in stem)
    done = {}
    for stem, data in read_sidecars(dest, sidecars):
        try:
            about = read_about(data)
            _check_same(dest, f"{stem}.safetensors", about, expected[stem].about if stem in expected else fingerprint)
            if stem not in expected:
                raise InputError(f"{dest} holds '{stem}', which is not of this set; choose an empty destination")
            finished = read_finished(expected[stem], data)
        except Damaged:
            continue  # torn, changed or foreign: made again
        # A sidecar that changed since the index was written must not get a new checksum: it is made again.
        is_indexed = indexed is None or indexed.get(stem) == finished.entry
        if sizes.get(f"{stem}.tar") == finished.entry.tar_bytes and is_indexed:
            done[stem] = finished
    return done, index


def _check_same(dest: str, what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise `InputError` where features at `dest` are of other pictures, or made by another extractor or otherwise.

    An extractor is its weights, and no name.
    """
    other = [key for key in expected if found.get(key) != expected[key] and key != "extractor_name"]
    if not other:
        return
    if "extractor_sha256" in other:
        other = ["extractor_name", *other]
    theirs, mine = (", ".join(f"{key} {values.get(key)}" for key in other) for values in (found, expected))
    raise InputError(
        f"{dest} holds other features: {what} has {theirs}, and this set {mine}; choose another destination or "
        "delete it"
    )
