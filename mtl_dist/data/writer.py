"""Write shard sets: plain WebDataset tars with sidecars, and index.json last. Made twice, every byte is the same.

A shard is done when its sidecar is in the store and belongs to this plan, so a restart makes only what is missing.
Every image is decoded before it is written: what is in a shard can be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.data.annotations import Annotations
from mtl_dist.data.decode import DecodeError, decode
from mtl_dist.data.index import FORMAT, INDEX_NAME, Index, ShardEntry, dump_index, read_index
from mtl_dist.data.sidecar import Sidecar, dump_sidecar, read_about
from mtl_dist.errors import InputError
from mtl_dist.tasks import AUS, EXPRESSIONS, NUM_EXPRESSIONS, LabelCounts

TAR_BLOCK = 512
MAX_LISTED = 5  # faults named in one message


class ShardJob(NamedTuple):
    """What one process needs to make one shard."""

    name: str
    images_dir: Path
    dest: str
    about: dict  # the plan's fingerprint
    labels: Annotations  # of this shard's rows, in tar order


class SetPlan(NamedTuple):
    """What will be written for one view of one split."""

    dest: str
    index: Index  # without shards
    jobs: list[ShardJob]
    done: dict[str, ShardEntry]  # shards that an earlier run finished


def plan_set(
    annotations: Annotations, images_dir: Path, dest: str, *, view: str, split: str, seed: int, frames_per_shard: int
) -> SetPlan:
    """Decide which shards of one view and split are to be made. Raises `InputError` before anything is written.

    Rows are shuffled once, by the seed: training then reads nearby shards in an order unlike the videos'. Both views
    get the same rows in the same shards.
    """
    _check_images(annotations, images_dir)
    num_rows = len(annotations.images)
    shuffled = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, split == "val"]))).permutation(
        num_rows
    )
    index = Index.model_construct(
        format=FORMAT,
        view=view,
        split=split,
        rows=num_rows,
        frames_per_shard=frames_per_shard,
        seed=seed,
        source_sha256=annotations.sha256,
        expressions=list(EXPRESSIONS),
        aus=list(AUS),
        labels=count_labels(annotations),
        shards=[],
    )
    fingerprint = {
        key: getattr(index, key)
        for key in ("format", "view", "split", "rows", "frames_per_shard", "seed", "source_sha256")
    }
    jobs = []
    for number, begin in enumerate(range(0, num_rows, frames_per_shard)):
        labels = annotations.take(shuffled[begin : begin + frames_per_shard])
        jobs.append(ShardJob(f"shard-{number:06d}", images_dir, dest, fingerprint, labels))
    return SetPlan(dest, index, jobs, _find_done(dest, fingerprint, {job.name for job in jobs}))


def write_sets(plans: list[SetPlan], *, jobs: int, progress: Callable[[int], None]) -> list[Index]:
    """Make the missing shards of all plans with `jobs` processes, then their indexes.

    `progress` is told of rows finished. An image that cannot be decoded stops the run with its path; what this call
    wrote is then removed again.
    """
    entries = {(plan.dest, name): entry for plan in plans for name, entry in plan.done.items()}
    progress(sum(entry.rows for entry in entries.values()))
    todo = [job for plan in plans for job in plan.jobs if (plan.dest, job.name) not in entries]
    try:
        for dest, entry in _run_jobs(todo, jobs):
            entries[dest, entry.name] = entry
            progress(entry.rows)
    except InputError:
        for job in todo:  # not only those that were reported: other processes finished theirs meanwhile
            storage.delete(storage.join(job.dest, f"{job.name}.safetensors"))
            storage.delete(storage.join(job.dest, f"{job.name}.tar"))
        raise
    indexes = []
    for plan in plans:
        shards = [entries[plan.dest, job.name].model_dump() for job in plan.jobs]
        indexes.append(Index.model_validate({**plan.index.model_dump(), "shards": shards}))
        storage.write_bytes(storage.join(plan.dest, INDEX_NAME), dump_index(indexes[-1]))
    return indexes


def count_labels(labels: Annotations) -> LabelCounts:
    expr_classes = np.bincount(labels.expr[labels.expr_mask], minlength=NUM_EXPRESSIONS)
    any_label = labels.va_mask | labels.expr_mask | labels.au_mask.any(1)
    return LabelCounts(
        rows=len(labels.va),
        va=int(labels.va_mask.sum()),
        expr=int(labels.expr_mask.sum()),
        au=labels.au_mask.sum(0).tolist(),
        expr_classes=expr_classes.tolist(),
        au_positives=(labels.au * labels.au_mask).sum(0).tolist(),
        unlabelled=int((~any_label).sum()),
    )


def write_shard(job: ShardJob) -> tuple[str, ShardEntry]:
    """Make one shard, the tar first, its sidecar when the tar is in the store. Returns (dest, entry)."""
    num_rows = len(job.labels.row)
    offset, length = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    crc32 = np.zeros(num_rows, np.uint32)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-") as scratch:
        tar_path = Path(scratch) / f"{job.name}.tar"
        with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, row in enumerate(job.labels.row):
                image = _read_image(job.images_dir / job.labels.images[place], int(row))
                key = f"{row:09d}"
                offset[place], length[place], crc32[place] = tar.offset + TAR_BLOCK, len(image), zlib.crc32(image)
                _add_member(tar, f"{key}.jpg", image)
                _add_member(tar, f"{key}.json", json.dumps(_label_json(job.labels, place, int(row))).encode())
        tar_sha256, tar_bytes = storage.sha256_of(tar_path), tar_path.stat().st_size
        storage.upload(tar_path, storage.join(job.dest, f"{job.name}.tar"))
    names = [name.encode() for name in job.labels.images]
    width = max(map(len, names))
    labels = job.labels
    sidecar = Sidecar(
        row=labels.row,
        offset=offset,
        length=length,
        crc32=crc32,
        image=np.array([list(name.ljust(width, b"\0")) for name in names], np.uint8),
        va=labels.va,
        expr=labels.expr,
        au=labels.au,
        va_mask=labels.va_mask,
        expr_mask=labels.expr_mask,
        au_mask=labels.au_mask,
    )
    data = dump_sidecar(sidecar, {**job.about, "rows_here": num_rows, "tar_bytes": tar_bytes, "tar_sha256": tar_sha256})
    storage.write_bytes(storage.join(job.dest, f"{job.name}.safetensors"), data)
    return job.dest, _entry(job.name, data)


def _run_jobs(todo: list[ShardJob], jobs: int):
    if jobs == 1 or len(todo) <= 1:
        yield from map(write_shard, todo)
        return
    # spawn: a forked copy of a process that holds S3 connections and threads is not safe to use.
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(write_shard, job) for job in todo}
        try:
            while futures:
                finished, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_images(annotations: Annotations, images_dir: Path) -> None:
    missing, empty = [], []
    for row, image in zip(annotations.row, annotations.images):
        try:
            if not (images_dir / image).stat().st_size:
                empty.append(f"{images_dir / image} (row {row})")
        except OSError:
            missing.append(f"{images_dir / image} (row {row})")
    for faults, what in ((missing, "do not exist"), (empty, "are empty")):
        if faults:
            more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            raise InputError(
                f"{len(faults)} of {len(annotations.images)} listed images {what}: {', '.join(faults[:MAX_LISTED])}{more}; "
                "expected every listed image; restore them or take their rows out of the annotations"
            )


def _find_done(dest: str, fingerprint: dict, expected: set[str]) -> dict[str, ShardEntry]:
    """Return the entries of finished shards at `dest`; an `InputError` if it holds anything of another plan."""
    sizes = dict(storage.list_objects(dest))
    indexed = None
    if INDEX_NAME in sizes:
        index = read_index(dest)
        other = {key: getattr(index, key) for key in fingerprint if getattr(index, key) != fingerprint[key]}
        if other:
            raise InputError(
                f"{dest} holds other shards: its index has {_pairs(other)}, this set "
                f"{_pairs({key: fingerprint[key] for key in other})}; choose another destination or delete it"
            )
        indexed = {shard.name: shard for shard in index.shards}
    done = {}
    for name in sizes:
        stem, _, suffix = name.rpartition(".")
        if name == INDEX_NAME or (suffix == "tar" and stem in expected):
            continue
        if suffix != "safetensors" or stem not in expected:
            raise InputError(f"{dest} holds '{name}', which is not of this set; choose an empty destination")
        data = storage.read_bytes(storage.join(dest, name))
        try:
            about = read_about(data)
        except (ValueError, KeyError, TypeError):
            continue  # torn or foreign: made again
        other = {key: about.get(key) for key in fingerprint if about.get(key) != fingerprint[key]}
        if other:
            raise InputError(
                f"{dest} holds other shards: {name} has {_pairs(other)}, this set "
                f"{_pairs({key: fingerprint[key] for key in other})}; choose another destination or delete it"
            )
        entry = _entry(stem, data)
        # A sidecar that changed since the index was written must not get a new checksum: it is made again.
        if sizes.get(f"{stem}.tar") == entry.tar_bytes and (indexed is None or indexed[stem] == entry):
            done[stem] = entry
    return done


def _entry(name: str, sidecar: bytes) -> ShardEntry:
    about = read_about(sidecar)
    return ShardEntry(
        name=name,
        rows=about["rows_here"],
        tar_bytes=about["tar_bytes"],
        tar_sha256=about["tar_sha256"],
        sidecar_bytes=len(sidecar),
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
    )


def _read_image(path: Path, row: int) -> bytes:
    try:
        image = path.read_bytes()
        decode(image)
    except (OSError, DecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"image {path} (row {row}): {what}; expected a whole JPEG; restore it or take its row out of "
            "the annotations"
        ) from None
    return image


def _label_json(labels: Annotations, place: int, row: int) -> dict[str, Any]:
    """The labels of a sample for other programs: null where there is none."""
    au = [int(value) if known else None for value, known in zip(labels.au[place], labels.au_mask[place])]
    return {
        "row": row,
        "image": labels.images[place],
        "va": [round(float(value), 6) for value in labels.va[place]] if labels.va_mask[place] else None,
        "expr": int(labels.expr[place]) if labels.expr_mask[place] else None,
        "au": au if labels.au_mask[place].any() else None,
    }


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid stay 0: equal input gives equal bytes
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
