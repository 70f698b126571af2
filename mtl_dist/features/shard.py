"""One shard of features: laid out, filled batch by batch, looked through once, uploaded; then its sidecar.

Memory is that of the batches under way and of the shard's sidecar, however long a video is.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time

from mtl_dist import storage
from mtl_dist.data.index import FEATURE_BYTES, FeatureShard
from mtl_dist.data.sidecar import FeatureSidecar, dump_sidecar, pack_names, read_about
from mtl_dist.data.video_rows import VideoRows
from mtl_dist.errors import Damaged
from mtl_dist.features.describing import How, Source, describe
from mtl_dist.features.extractors import Network
from mtl_dist.features.layout import Video, lay_out
from mtl_dist.features.moments import Moments, add_up, moments_of

Part = tuple[tuple[Network, ...], np.ndarray]  # what describes some rows of a shard, and their places there


class ShardTask(NamedTuple):
    """What one process needs to make one shard."""

    name: str
    dest: str
    about: dict[str, Any]  # the plan, and this shard's place in it
    source: Source
    rows: VideoRows  # of this shard
    first_video: int  # its number in the set
    width: int
    parts: list[Part]
    how: How

    @property
    def videos(self) -> list[Video]:
        """The videos, as members of the tar."""
        named = enumerate(zip(self.rows.videos, self.rows.num_rows.tolist()), self.first_video)
        return [Video(number, name, rows, self.width) for number, (name, rows) in named]


class Finished(NamedTuple):
    """A shard that is made."""

    entry: FeatureShard
    moments: Moments
    num_vanished: int  # numbers that were not 0 before they were float16


def make_shard(task: ShardTask, progress: Callable[[int], None] = lambda rows: None) -> Finished:
    """Make one shard, the tar first, its sidecar when the tar is in the store; `progress` is told of rows."""
    videos = task.videos
    with storage.staged(storage.join(task.dest, f"{task.name}.tar")) as path:
        with path.open("w+b") as tar:
            begins = lay_out(tar, videos, row=task.rows.kept["row"], frame=task.rows.frame)
            num_vanished = _fill(tar, task, begins, progress)
        checksums, moments = _look_through(path, videos, begins)
        about = task.about | {
            "tar_sha256": storage.sha256_of(path),
            "tar_bytes": path.stat().st_size,
            "sums": moments.sums.tolist(),
            "squares": moments.squares.tolist(),
            "vanished": num_vanished,
        }
    rows, names = task.rows, pack_names(task.rows.videos)
    sidecar = FeatureSidecar(
        **rows.kept, frame=rows.frame, video=names, num_rows=rows.num_rows, begin=begins, checksum=checksums
    )
    data = dump_sidecar(sidecar, about)
    storage.write_bytes(storage.join(task.dest, f"{task.name}.safetensors"), data)
    return read_finished(task, data)


def read_finished(task: ShardTask, sidecar: bytes) -> Finished:
    """Return what the sidecar of a finished shard says. Raises `Damaged` for one that is not ours."""
    about = read_about(sidecar)
    try:
        entry = FeatureShard(
            name=task.name,
            rows=about["rows_here"],
            tar_bytes=about["tar_bytes"],
            tar_sha256=about["tar_sha256"],
            sidecar_bytes=len(sidecar),
            sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
            videos=task.rows.num_rows.tolist(),
        )
        sums, squares = (np.array(about[name], np.float64) for name in ("sums", "squares"))
        if sums.shape != (task.width,) or squares.shape != (task.width,):
            raise Damaged(f"it has sums of {sums.shape} numbers; expected {task.width}")
        return Finished(entry, Moments(entry.rows, sums, squares), int(about["vanished"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"it does not say what it should ({error})") from None


def _fill(tar: BinaryIO, task: ShardTask, begins: np.ndarray, progress: Callable[[int], None]) -> int:
    """Write the features of all rows where they belong; return how many numbers vanished."""
    row_bytes, num_rows = FEATURE_BYTES * task.width, task.rows.num_rows
    within = np.arange(num_rows.sum()) - np.repeat(task.rows.starts[:-1], num_rows)
    at, num_vanished = np.repeat(begins, num_rows) + row_bytes * within, 0
    for described in describe(task.source, task.rows.samples, task.parts, task.how, task.rows.kept["row"]):
        offsets = at[described.places]
        cuts = np.flatnonzero(np.diff(offsets) != row_bytes) + 1  # between videos
        for begin, features in zip(offsets[[0, *cuts]].tolist(), np.split(described.features, cuts)):
            tar.seek(begin)
            tar.write(features.astype("<f2").tobytes())
        num_vanished += described.num_vanished
        progress(len(described.places))
    return num_vanished


def _look_through(path: Path, videos: list[Video], begins: np.ndarray) -> tuple[np.ndarray, Moments]:
    """Return the CRC-32 of every video's features, (v,), and the moments of all; rows in their order."""
    checksums, moments = [], []
    with path.open("rb") as tar, mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for video, begin in zip(videos, begins.tolist()):
            features = np.frombuffer(mapped, "<f2", video.rows * video.width, begin).reshape(-1, video.width)
            checksums.append(crc32(features))
            moments.append(moments_of(features))
            del features  # a mapping that is looked at cannot be closed
    return np.array(checksums, np.uint32), add_up(moments, videos[0].width)
