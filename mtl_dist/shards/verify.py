"""Prove a set: every byte of its shards is what the contract, the index and the sidecars say. Nothing is extracted.

A set may come from anywhere. The tar is walked by the sidecar's places, header by header, never by what its own
headers claim: time and memory are those of the members that should be there.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.data.decode import DecodeError, decode
from mtl_dist.data.index import Index, ShardEntry, index_dir
from mtl_dist.data.sidecar import Sidecar, check_places, parse_sidecar
from mtl_dist.errors import Damaged
from mtl_dist.label_counts import LabelCounts
from mtl_dist.processes import process_pool
from mtl_dist.shards.writer import count_labels

TAR_BLOCK = 512
MAX_JSON_BYTES = 16 << 10
MAX_PADDING = tarfile.RECORDSIZE + 2 * TAR_BLOCK  # zeros behind the last member
MAX_FAULTS = 10  # listed of one shard
VA_TOLERANCE = 1e-6  # the tar's JSON has six digits


class Findings(NamedTuple):
    """What was found of one shard; rows and labels are those of a whole one."""

    faults: list[str]
    rows: np.ndarray | None = None  # (n,) int64
    labels: LabelCounts | None = None


def find_faults(uri: str, index: Index, *, jobs: int, progress: Callable[[int], None]) -> list[str]:
    """Return what is damaged of a set, or contradicts its index; `progress` is told of rows."""
    shards = []
    with contextlib.ExitStack() as stack:
        run = map if jobs == 1 else stack.enter_context(process_pool(jobs)).map
        tasks = [(index_dir(uri), shard.model_dump()) for shard in index.shards]
        for shard, found in zip(index.shards, run(_verify_shard, tasks)):
            shards.append(found)
            progress(shard.rows)
    return [fault for found in shards for fault in found.faults] or find_set_faults(index, shards)


def _verify_shard(task: tuple[str, dict[str, Any]]) -> Findings:
    uri, entry = task
    return verify_shard(uri, ShardEntry.model_validate(entry))


def verify_shard(uri: str, entry: ShardEntry) -> Findings:
    """Return what is wrong with a shard of the set at `uri`, in words.

    Raises `StorageError` and `InputError` as storage does: they say nothing of the shard.
    """
    tar_uri, sidecar_uri = (storage.join(uri, f"{entry.name}.{suffix}") for suffix in ("tar", "safetensors"))
    with storage.scratch_directory("verify") as scratch:
        paths, faults = find_files(uri, entry, scratch)
        if faults:
            return Findings(faults)
        try:
            sidecar = parse_sidecar(paths[0].read_bytes())
            check_places(sidecar, rows=entry.rows, tar_bytes=entry.tar_bytes)
        except Damaged as error:
            return Findings([f"{sidecar_uri}: {error}"])
        with paths[1].open("rb") as tar:
            for fault in _find_faults(tar, sidecar, entry.tar_bytes):
                if len(faults) == MAX_FAULTS:
                    faults.append(f"{tar_uri}: and more")
                    break
                faults.append(f"{tar_uri}{fault}")
    if faults:
        return Findings(faults)
    masks = {name: getattr(sidecar, name).astype(bool) for name in ("va_mask", "expr_mask", "au_mask")}
    return Findings([], sidecar.row, count_labels(sidecar._replace(**masks)))


def find_files(uri: str, entry: ShardEntry, scratch: Path) -> tuple[list[Path], list[str]]:
    """Return local paths of a shard's sidecar and tar, and where one is gone or not the index's, in words."""
    faults, paths = [], []
    for name, size, sha256 in (
        (storage.join(uri, f"{entry.name}.safetensors"), entry.sidecar_bytes, entry.sidecar_sha256),
        (storage.join(uri, f"{entry.name}.tar"), entry.tar_bytes, entry.tar_sha256),
    ):
        try:
            paths.append(_local_copy(name, scratch))
            found = paths[-1].stat().st_size
            if found != size:
                faults.append(f"{name} has {found} bytes; the index says {size}")
            elif storage.sha256_of(paths[-1]) != sha256:
                faults.append(f"{name}: its sha256 is not the index's")
        except FileNotFoundError:
            faults.append(f"{name} is gone")
    return paths, faults


def find_set_faults(index: Index, shards: list[Findings]) -> list[str]:
    """Return what is wrong with a set all of whose shards are whole."""
    faults = []
    if len(np.unique(np.concatenate([shard.rows for shard in shards]))) < index.rows:
        faults.append("a row is in several shards")
    counts = [shard.labels.model_dump() for shard in shards]
    total = {key: np.sum([count[key] for count in counts], axis=0).tolist() for key in counts[0]}
    if total != index.labels.model_dump():
        faults.append("the index counts other labels than its shards hold")
    return faults


def _local_copy(uri: str, scratch: Path) -> Path:
    """Return a path with the object's bytes: a local one in place, because a shard may be as large as /tmp."""
    if not storage.is_s3(uri):
        return storage.local_path(uri)
    path = scratch / uri.rpartition("/")[2]
    storage.download(uri, path)
    return path


def _find_faults(tar: BinaryIO, sidecar: Sidecar, tar_bytes: int) -> Iterator[str]:
    end, names, videos = 0, sidecar.image_names(), sidecar.video_names()
    columns = (sidecar.row, sidecar.offset, sidecar.length, sidecar.crc32)
    for place, (row, begin, length, crc32) in enumerate(zip(*(column.tolist() for column in columns))):
        try:
            if begin != end + TAR_BLOCK:
                raise Damaged(f"the image is at byte {begin}; expected {end + TAR_BLOCK}, behind what comes before it")
            if (size := read_header(tar, end, f"{row:09d}.jpg")) != length:
                raise Damaged(f"the image has {size} bytes; the sidecar says {length}")
            image = tar.read(length)
            end = begin + -(-length // TAR_BLOCK) * TAR_BLOCK
            json_size = read_header(tar, end, f"{row:09d}.json")
            if json_size > MAX_JSON_BYTES:
                raise Damaged(f"labels of {json_size} bytes; expected at most {MAX_JSON_BYTES}")
            text = tar.read(json_size)
            end += TAR_BLOCK + -(-json_size // TAR_BLOCK) * TAR_BLOCK
        except Damaged as error:  # nothing behind can be judged
            yield f": its members are not those of the sidecar: row {row}: {error}"
            return
        if zlib.crc32(image) != crc32:
            yield f", row {row}: its bytes do not match their checksum"
        try:
            decode(image)
        except DecodeError as error:
            yield f", row {row}: {error}"
        named = {"image": names[place]} | ({"video": videos[place]} if videos else {})
        if not _same_labels(text, sidecar, place, named):
            yield f", row {row}: its JSON member does not say what the sidecar says"
    if tar_bytes - end > MAX_PADDING or tar.seek(end) != end or any(tar.read(MAX_PADDING)):
        yield f": holds {tar_bytes - end} bytes behind the last member; expected a few blocks of zeros"


def read_header(tar: BinaryIO, begin: int, name: str) -> int:
    """Return the size of the plain file `name` whose header is at `begin`; the next read gives its bytes.

    Raises `Damaged` where there is another.
    """
    tar.seek(begin)
    try:
        member = tarfile.TarInfo.frombuf(tar.read(TAR_BLOCK), "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise Damaged(f"no tar header for {name} ({error})") from None
    if member.name != name or not member.isreg() or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise Damaged(f"the tar holds {member.name!r} of type {member.type!r}; expected the plain file {name}")
    return member.size


def _same_labels(text: bytes, sidecar: Sidecar, place: int, named: dict[str, str]) -> bool:
    try:
        found = json.loads(text)
        va = found.pop("va")
        if (va is not None) != bool(sidecar.va_mask[place]):
            return False
        if va is not None and not np.allclose(va, sidecar.va[place], rtol=0, atol=VA_TOLERANCE):
            return False
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    au = [int(value) if known else None for value, known in zip(sidecar.au[place], sidecar.au_mask[place])]
    expected: dict[str, Any] = {
        "row": int(sidecar.row[place]),
        **named,
        "expr": int(sidecar.expr[place]) if sidecar.expr_mask[place] else None,
        "au": au if any(sidecar.au_mask[place]) else None,
    }
    return found == expected
