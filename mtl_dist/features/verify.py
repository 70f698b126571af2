"""Prove a set of features: every byte is what the contract, the index and the sidecars say.

As sets of pictures are (`shards.verify`): the tar is walked by the sidecar's places, never by what its own headers
claim, and nothing is extracted.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time

from mtl_dist import storage
from mtl_dist.data.index import FeatureIndex, FeatureShard, index_dir
from mtl_dist.data.sidecar import FeatureSidecar, check_feature_places, parse_feature_sidecar
from mtl_dist.errors import Damaged
from mtl_dist.features.layout import Video
from mtl_dist.features.moments import Moments, add_up, moments_of
from mtl_dist.processes import process_pool
from mtl_dist.shards.verify import MAX_FAULTS, MAX_PADDING, Findings, find_files, find_set_faults, read_header
from mtl_dist.shards.writer import count_labels
from mtl_dist.tasks import SPLITS

MEAN_TOLERANCE = 1e-9  # of a deviation: sums that were added up elsewhere


class FeatureFindings(NamedTuple):
    """What was found of one shard; all but the faults are those of a whole one."""

    found: Findings
    moments: Moments | None = None


class ShardToCheck(NamedTuple):
    """What a process needs to prove a shard."""

    uri: str
    entry: dict[str, Any]
    first_video: int
    width: int


def find_faults(uri: str, index: FeatureIndex, *, jobs: int, progress: Callable[[int], None]) -> list[str]:
    """Return what is damaged of a set, or contradicts its index; `progress` is told of rows."""
    shards, tasks, first_video = [], [], 0
    for shard in index.shards:
        tasks.append(ShardToCheck(index_dir(uri), shard.model_dump(), first_video, index.extractor.width))
        first_video += len(shard.videos)
    with contextlib.ExitStack() as stack:
        run = map if min(jobs, len(tasks)) == 1 else stack.enter_context(process_pool(jobs)).map
        for shard, found in zip(index.shards, run(verify_shard, tasks)):
            shards.append(found)
            progress(shard.rows)
    if faults := [fault for shard in shards for fault in shard.found.faults]:
        return faults
    return [*find_set_faults(index, [shard.found for shard in shards]), *_find_other_statistics(index, shards)]


def verify_shard(task: ShardToCheck) -> FeatureFindings:
    """Return what is wrong with a shard, in words.

    Raises `StorageError` and `InputError` as storage does: they say nothing of the shard.
    """
    entry = FeatureShard.model_validate(task.entry)
    tar_uri, sidecar_uri = (storage.join(task.uri, f"{entry.name}.{suffix}") for suffix in ("tar", "safetensors"))
    with storage.scratch_directory("verify") as scratch:
        paths, faults = find_files(task.uri, entry, scratch)
        if len(paths) < 2 or (faults and not _is_readable(paths, entry)):
            return FeatureFindings(Findings(faults))
        try:
            sidecar = parse_feature_sidecar(paths[0].read_bytes())
            check_feature_places(sidecar, videos=entry.videos, width=task.width, tar_bytes=entry.tar_bytes)
        except Damaged as error:
            return FeatureFindings(Findings([*faults, f"{sidecar_uri}: {error}"]))
        with paths[1].open("rb") as tar:
            for fault in _find_faults(tar, sidecar, task, entry.tar_bytes):
                if len(faults) == MAX_FAULTS:
                    faults.append(f"{tar_uri}: and more")
                    break
                faults.append(f"{tar_uri}{fault}")
        if faults:
            return FeatureFindings(Findings(faults))
        moments = _moments(paths[1], sidecar, task.width)
    masks = {name: getattr(sidecar, name).astype(bool) for name in ("va_mask", "expr_mask", "au_mask")}
    return FeatureFindings(Findings([], sidecar.row, count_labels(sidecar._replace(**masks))), moments)


def _is_readable(paths: list[Path], entry: FeatureShard) -> bool:
    """Whether a shard whose checksums are wrong can be looked through for the videos that are: sizes are right."""
    return [path.stat().st_size for path in paths] == [entry.sidecar_bytes, entry.tar_bytes]


def _find_faults(tar: BinaryIO, sidecar: FeatureSidecar, task: ShardToCheck, tar_bytes: int) -> Iterator[str]:
    end, done = 0, 0
    columns = (sidecar.video_names(), sidecar.num_rows.tolist(), sidecar.begin.tolist(), sidecar.checksum.tolist())
    for number, (name, rows, begin, checksum) in enumerate(zip(*columns), task.first_video):
        video, of_video = Video(number, name, rows, task.width), slice(done, done + rows)
        done += rows
        try:
            if (size := read_header(tar, end, video.arrays_name)) != video.member_bytes:
                raise Damaged(f"{video.arrays_name} has {size} bytes; its rows need {video.member_bytes}")
            if tar.read(len(video.header)) != video.header:
                raise Damaged(f"{video.arrays_name} does not begin as its rows and width ask for")
            numbers = [np.frombuffer(tar.read(8 * rows), "<i8") for _ in range(2)]
            if tar.tell() != begin:
                raise Damaged(f"its features are at byte {tar.tell()}; the sidecar says {begin}")
            found = _read_checksum(tar, video)
            end = begin + video.feature_bytes
            end += -end % 512
            if (size := read_header(tar, end, video.text_name)) != len(video.text) or tar.read(size) != video.text:
                raise Damaged(f"{video.text_name} does not say what the sidecar says")
            end = tar.tell() + -tar.tell() % 512
        except Damaged as error:  # nothing behind can be judged
            yield f": its members are not those of the sidecar: video {name}: {error}"
            return
        if found != checksum:
            yield f", video {name}: its features do not match their checksum"
        for what, mine, theirs in zip(("frame", "row"), numbers, (sidecar.frame, sidecar.row)):
            if not np.array_equal(mine, theirs[of_video]):
                yield f", video {name}: its array '{what}' is not the sidecar's"
    if tar_bytes - end > MAX_PADDING or tar.seek(end) != end or any(tar.read(MAX_PADDING)):
        yield f": holds {tar_bytes - end} bytes behind the last member; expected a few blocks of zeros"


def _read_checksum(tar: BinaryIO, video: Video) -> int:
    """Return the CRC-32 of features; of a long video not all of them are in memory at once."""
    left, checksum = video.feature_bytes, 0
    while left and (data := tar.read(min(left, 1 << 20))):
        checksum, left = crc32(data, checksum), left - len(data)
    return checksum


def _moments(path: Path, sidecar: FeatureSidecar, width: int) -> Moments:
    moments = []
    with path.open("rb") as tar, mmap.mmap(tar.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for rows, begin in zip(sidecar.num_rows.tolist(), sidecar.begin.tolist()):
            features = np.frombuffer(mapped, "<f2", rows * width, begin).reshape(rows, width)
            moments.append(moments_of(features))
            del features  # a mapping that is looked at cannot be closed
    return add_up(moments, width)


def _find_other_statistics(index: FeatureIndex, shards: list[FeatureFindings]) -> Iterator[str]:
    """Yield what is not finite, and statistics of a training set that are not its rows'."""
    total = add_up([shard.moments for shard in shards], index.extractor.width)
    if not np.isfinite(total.squares).all():
        yield "features are not finite"
    elif index.split == SPLITS[0]:
        (mean, std), scale = total.statistics(), np.sqrt(total.squares / total.rows)
        for what, mine, theirs in (("mean", mean, index.mean), ("std", std, index.std)):
            if (np.abs(np.subtract(mine, theirs)) > MEAN_TOLERANCE * scale).any():
                yield f"the index's {what} is not that of its rows"
