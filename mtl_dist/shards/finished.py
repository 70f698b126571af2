"""Which shards of a set are finished already, and whether they are of the set that is to be made.

A shard is done when its sidecar is in the store and belongs to this plan, so a restart makes only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time
from safetensors.numpy import load

from mtl_dist import storage
from mtl_dist.data.decode import DecodeError, Exif, as_jpeg, lies_for_earlier_versions, read_file
from mtl_dist.data.index import INDEX_NAME, ShardEntry, read_index
from mtl_dist.data.sidecar import read_about
from mtl_dist.errors import Damaged, InputError
from mtl_dist.shards.annotations import Annotations
from mtl_dist.shards.claims import CLAIM_PREFIX
from mtl_dist.threads import DaemonThreads

READ_THREADS = 16
SCRATCH_BYTES = 512 * 512 * 3  # larger pictures are decoded to memory of their own
MAX_COMPARED = 8  # finished shards, one picture of each


class ShardJob(NamedTuple):
    """What one process needs to make one shard."""

    name: str
    images_dir: Path
    dest: str
    about: dict  # the plan, and this shard's place in it
    labels: Annotations  # of this shard's rows, in tar order
    exif: Exif = "apply"  # images that are not stored upright, says their EXIF, are turned


def find_done(dest: str, fingerprint: dict, jobs: list[ShardJob], exif: Exif) -> tuple[dict[str, ShardEntry], int]:
    """Return the entries of finished shards at `dest`, and how many of their images are not stored upright.

    Raises `InputError` if it holds anything of another plan.
    """
    sizes = dict(storage.list_objects(dest))
    expected = {job.name: job.about for job in jobs}
    indexed = None
    if INDEX_NAME in sizes:
        index = read_index(dest)
        _check_same(dest, "its index", {key: getattr(index, key) for key in fingerprint}, fingerprint)
        indexed = {shard.name: shard for shard in index.shards}
    sidecars = list_sidecars(dest, sizes, expected, is_shard=lambda stem: stem in expected)
    done, lying, by_name, silent = {}, 0, {job.name: job for job in jobs}, []
    compared = set(sidecars[:: -(-len(sidecars) // MAX_COMPARED) or 1])
    for stem, data in read_sidecars(dest, sidecars):
        try:
            about = read_about(data)
            wanted = expected[stem] | ({"exif": exif} if "lying" in about else {})
            _check_same(dest, f"{stem}.safetensors", about, wanted)  # of another set: never written over
            entry = entry_of(stem, data)
        except Damaged:
            continue  # torn, changed or foreign: made again
        # A sidecar that changed since the index was written must not get a new checksum: it is made again.
        if sizes.get(f"{stem}.tar") == entry.tar_bytes and (indexed is None or indexed[stem] == entry):
            done[stem] = entry
            lying += about.get("lying", 0)
            if "lying" not in about:
                silent.append(by_name[stem])
            if stem in compared:
                _check_picture(dest, by_name[stem], data)
    if exif == "apply" and len(done) < len(jobs):
        _check_turned(dest, silent)
    return done, lying


def list_sidecars(
    dest: str, names: Iterable[str], expected: Container[str], *, is_shard: Callable[[str], bool]
) -> list[str]:
    """Return the shards of which `dest` holds a sidecar, by the names of its files.

    `expected` are the shards of this set. Raises `InputError` for a file that is neither of these nor a sidecar of what
    `is_shard`.
    """
    sidecars = []
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if name == INDEX_NAME or name.startswith(CLAIM_PREFIX) or (suffix == "tar" and stem in expected):
            continue
        if suffix != "safetensors" or not is_shard(stem):
            raise InputError(f"{dest} holds '{name}', which is not of this set; choose an empty destination")
        sidecars.append(stem)
    return sidecars


def read_sidecars(dest: str, shards: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the sidecar of every shard, several read at once."""
    with DaemonThreads(READ_THREADS, "sidecar") as pool:
        found = pool.map(lambda stem: storage.read_bytes(storage.join(dest, f"{stem}.safetensors")), shards)
        yield from zip(shards, found)


def _check_turned(dest: str, silent: list[ShardJob]) -> None:
    """Raise an `InputError` where a finished shard that says nothing of EXIF has a picture that is not upright.

    Earlier versions turned none, and said nothing; nor does a shard of this one of which all are upright. So pictures
    are looked at once more, where others are about to be turned.
    """
    with DaemonThreads(READ_THREADS, "picture") as pool:
        for job, path in zip(silent, pool.map(_find_lying, silent)):
            if path:
                raise InputError(
                    f"{dest} holds shards of an earlier version, which turned no picture as its EXIF says: {path} of "
                    f"{job.name} is not stored upright, and others would be turned; continue with --exif ignore, "
                    "choose another destination, or delete it"
                )


def _find_lying(job: ShardJob) -> str | None:
    for name in dict.fromkeys(job.labels.images):
        path = f"{job.images_dir}/{name}"
        with contextlib.suppress(OSError):  # gone: the shard has it already
            if lies_for_earlier_versions(read_file(path)):
                return path
    return None


def _check_picture(dest: str, job: ShardJob, sidecar: bytes) -> None:
    """Raise an `InputError` where the first picture of a finished shard is not the one that it would be made of now.

    Labels alone do not tell one directory of pictures from another. What is stored anew (PNG, turned by EXIF) may have
    other bytes after an update of a library: it is not compared.
    """
    path, arrays = f"{job.images_dir}/{job.labels.images[0]}", load(sidecar)
    try:
        source = read_file(path)
        is_kept = as_jpeg(source, np.empty(SCRATCH_BYTES, np.uint8), exif=job.exif).jpeg is source
    except (OSError, DecodeError):  # said where pictures are read, if any is
        return
    if is_kept and (len(source), crc32(source)) != (int(arrays["length"][0]), int(arrays["crc32"][0])):
        raise InputError(
            f"{dest} holds shards of other pictures: that of row {job.labels.row[0]} in {job.name} is not {path} as it "
            "is now; give the directory that they were made of, choose another destination, or delete it"
        )


def _check_same(dest: str, what: str, found: dict, expected: dict) -> None:
    other = [key for key in expected if found.get(key) != expected[key]]
    if other:
        raise InputError(
            f"{dest} holds other shards: {what} has {_pairs({key: found.get(key) for key in other})}, this set "
            f"{_pairs({key: expected[key] for key in other})}; choose another destination or delete it"
        )


def entry_of(name: str, sidecar: bytes) -> ShardEntry:
    """Return a shard's entry in the index, read from its sidecar. Raises `Damaged` for one that is not ours."""
    about = read_about(sidecar)
    try:
        return ShardEntry(
            name=name,
            rows=about["rows_here"],
            tar_bytes=about["tar_bytes"],
            tar_sha256=about["tar_sha256"],
            sidecar_bytes=len(sidecar),
            sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
        )
    except KeyError as missing:
        raise Damaged(f"it does not name {missing}") from None


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
