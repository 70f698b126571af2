"""Write shard sets: plain WebDataset tars with sidecars, and index.json last. Made twice, every byte is the same.

A shard is done when its sidecar is in the store and belongs to this plan, so a restart makes only what is missing.
Every image is decoded before it is written: what is in a shard can be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time

from mtl_dist import storage
from mtl_dist.data.decode import (
    KINDS,
    DecodeError,
    Exif,
    ForeignPicture,
    StoredPicture,
    as_jpeg,
    read_file,
)
from mtl_dist.data.index import FORMAT, INDEX_NAME, Index, ShardEntry, dump_index
from mtl_dist.data.names import other_form
from mtl_dist.data.sidecar import Sidecar, dump_sidecar, pack_names
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.processes import as_done, process_pool, spawn
from mtl_dist.shards import ustar
from mtl_dist.shards.annotations import Annotations
from mtl_dist.shards.claims import claimed
from mtl_dist.shards.finished import SCRATCH_BYTES, ShardJob, entry_of, find_done
from mtl_dist.tasks import AUS, EXPRESSIONS, NUM_EXPRESSIONS, SPLITS

MEMBER_OVERHEAD = 4 * ustar.BLOCK  # of a sample beside its image's bytes: two headers, padding, a JSON
MAX_LISTED = 5  # faults named in one message


class SetPlan(NamedTuple):
    """What will be written for one view of one split."""

    dest: str
    index: Index  # without shards
    jobs: list[ShardJob]
    done: dict[str, ShardEntry]  # shards that an earlier run finished
    lying: int  # images of these that are not stored upright, says their EXIF


def plan_sets(
    splits: dict[str, Annotations],
    images_dirs: dict[str, Path],
    dest: str,
    **how: Any,
) -> list[SetPlan]:
    """Decide what will be written to <dest>/<view>/<split>/; `images_dirs` by view. `how`, and what it raises, are
    `plan_set`'s."""
    return [
        plan_set(splits[split], images_dir, storage.join(dest, view, split), view=view, split=split, **how)
        for split in SPLITS
        for view, images_dir in images_dirs.items()
    ]


def plan_set(
    annotations: Annotations,
    images_dir: Path,
    dest: str,
    *,
    view: str,
    split: str,
    seed: int,
    claims: contextlib.ExitStack,
    frames_per_shard: int | None = None,
    shard_bytes: int | None = None,
    exif: Exif = "apply",
) -> SetPlan:
    """Decide which shards of one view and split are to be made. Raises `InputError` before any is written.

    Until `claims` is closed nobody else makes another set there.

    Rows are shuffled once, by the seed: training then reads nearby shards in an order unlike the videos'. A shard is
    full at `frames_per_shard` rows or about `shard_bytes` bytes, whichever comes first. By rows, both views get the
    same rows in the same shards.
    """
    sizes = _image_sizes(annotations, images_dir)
    num_rows = len(sizes)
    shuffled = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, split == "val"]))).permutation(
        num_rows
    )
    index = Index.model_construct(
        format=FORMAT,
        view=view,
        split=split,
        rows=num_rows,
        frames_per_shard=frames_per_shard,
        shard_bytes=shard_bytes,
        seed=seed,
        source_sha256=annotations.sha256,
        expressions=list(EXPRESSIONS),
        aus=list(AUS),
        labels=count_labels(annotations),
        shards=[],
    )
    fingerprint = {
        key: getattr(index, key)
        for key in ("format", "view", "split", "rows", "frames_per_shard", "shard_bytes", "seed", "source_sha256")
    }
    claims.enter_context(claimed(dest, fingerprint | {"exif": exif}, sizes))
    jobs = []
    for begin, end in _cut(sizes[shuffled], frames_per_shard=frames_per_shard, shard_bytes=shard_bytes):
        about = {**fingerprint, "begin": begin, "rows_here": end - begin}
        labels = annotations.take(shuffled[begin:end])
        jobs.append(ShardJob(f"shard-{len(jobs):06d}", images_dir, dest, about, labels, exif))
    return SetPlan(dest, index, jobs, *find_done(dest, fingerprint, jobs, exif))


def write_sets(
    plans: list[SetPlan],
    *,
    jobs: int,
    progress: Callable[[int], None],
    lying: Callable[[int], None] = lambda count: None,
) -> list[Index]:
    """Make the missing shards of all plans with `jobs` processes, then their indexes.

    `progress` is told of rows finished, `lying` of images that are not stored upright, says their EXIF. An image that
    cannot be decoded stops the run with its path; the shards that are finished stay, and the same command continues
    after them.
    """
    entries = {(plan.dest, name): entry for plan in plans for name, entry in plan.done.items()}
    progress(sum(entry.rows for entry in entries.values()))
    todo = [job for plan in plans for job in plan.jobs if (plan.dest, job.name) not in entries]
    lying(sum(plan.lying for plan in plans))
    for dest, entry, count in _run_jobs(todo, jobs):
        lying(count)
        entries[dest, entry.name] = entry
        progress(entry.rows)
    indexes = []
    for plan in plans:
        shards = [entries[plan.dest, job.name].model_dump() for job in plan.jobs]
        indexes.append(Index.model_validate({**plan.index.model_dump(), "shards": shards}))
        storage.write_bytes(storage.join(plan.dest, INDEX_NAME), dump_index(indexes[-1]))
    return indexes


def count_labels(labels: Annotations) -> LabelCounts:
    """Count the rows and labels of annotations, as the index tells them."""
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


def write_shard(job: ShardJob) -> tuple[str, ShardEntry, int]:
    """Make one shard, the tar first, its sidecar when the tar is in the store. Returns (dest, entry, lying images)."""
    # Left in reverse: the slot is free while the tar is uploaded.
    with storage.staged(storage.join(job.dest, f"{job.name}.tar")) as path, _building:
        places, sha256, lying = _write_tar(path, job)
        tar = {"tar_sha256": sha256, "tar_bytes": path.stat().st_size}
        if lying:
            tar |= {"lying": lying, "exif": job.exif}
    labels = job.labels
    sidecar = Sidecar(
        row=labels.row,
        offset=places[:, 0],
        length=places[:, 1],
        crc32=places[:, 2],
        image=pack_names(labels.images),
        va=labels.va,
        expr=labels.expr,
        au=labels.au,
        va_mask=labels.va_mask,
        expr_mask=labels.expr_mask,
        au_mask=labels.au_mask,
        video=pack_names(labels.videos) if labels.videos else None,
    )
    data = dump_sidecar(sidecar, {**job.about, **tar})
    storage.write_bytes(storage.join(job.dest, f"{job.name}.safetensors"), data)
    return job.dest, entry_of(job.name, data), lying


def _write_tar(path: Path, job: ShardJob) -> tuple[np.ndarray, str, int]:
    """Write the members of a tar.

    Returns offset, length and CRC-32 of every image, (n, 3) int64; the SHA-256 of the tar; and how many images are not
    stored upright, as their EXIF says.
    """
    places, sha256, lying = np.zeros((len(job.labels.row), 3), np.int64), hashlib.sha256(), 0
    rows = zip(job.labels.row.tolist(), job.labels.images, _label_texts(job.labels))
    with path.open("wb", buffering=1 << 20) as tar:
        at, scratch = 0, np.empty(SCRATCH_BYTES, np.uint8)
        for place, (row, name, text) in enumerate(rows):
            image, orientation = _read_image(f"{job.images_dir}/{name}", row, scratch, job.exif)
            lying += orientation != 1
            places[place] = at + ustar.BLOCK, len(image), crc32(image)
            members = ((b"%09d.jpg" % row, image), (b"%09d.json" % row, text))
            parts = [(ustar.make_header(key, len(data)), data, ustar.padding(len(data))) for key, data in members]
            sample = b"".join(chain.from_iterable(parts))
            sha256.update(sample)
            at += tar.write(sample)
        end = bytes(2 * ustar.BLOCK)
        end += ustar.padding(at + len(end), ustar.RECORD)
        sha256.update(end)
        tar.write(end)
    return places, sha256.hexdigest(), lying


# Held while a process makes a tar. The processes of a pool share `jobs` slots: so many tars are made at a time, and as
# many others uploaded meanwhile.
_building: contextlib.AbstractContextManager = contextlib.nullcontext()


def _share_slots(slots: contextlib.AbstractContextManager) -> None:
    global _building
    _building = slots


def _run_jobs(todo: list[ShardJob], jobs: int) -> Iterator[tuple[str, ShardEntry, int]]:
    uploads = any(storage.is_s3(job.dest) for job in todo)
    if len(todo) <= 1 or (jobs == 1 and not uploads):
        yield from map(write_shard, todo)
        return
    processes = min(2 * jobs if uploads else jobs, len(todo))
    with process_pool(processes, begin=_share_slots, args=(spawn.BoundedSemaphore(jobs),)) as pool:
        for _, made in as_done(pool, write_shard, dict(enumerate(todo))):
            yield made


def _image_sizes(annotations: Annotations, images_dir: Path) -> np.ndarray:
    """Return the bytes (N,) int64 of every listed image; an `InputError` where one does not exist or is empty."""
    sizes, missing, empty = np.zeros(len(annotations.row), np.int64), [], []
    directory = str(images_dir)
    for place, image in enumerate(annotations.images):
        try:
            sizes[place] = os.stat(f"{directory}/{image}").st_size
            if not sizes[place]:
                empty.append(place)
        except OSError:
            missing.append(place)
    for faults, what in ((missing, "do not exist"), (empty, "are empty")):
        if faults:
            some = [f"{images_dir / annotations.images[p]} (row {annotations.row[p]})" for p in faults[:MAX_LISTED]]
            more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            form = other_form(annotations.images[faults[0]], lambda name: Path(images_dir, name).exists())
            raise InputError(
                f"{len(faults)} of {len(sizes)} listed images {what}: {', '.join(some)}{more}; expected every listed "
                f"image; restore them, correct the directory, or leave their rows out with --skip-bad-images{form}"
            )
    return sizes


def _cut(sizes: np.ndarray, *, frames_per_shard: int | None, shard_bytes: int | None) -> list[tuple[int, int]]:
    """Return the [begin, end) of every shard over images of these bytes (N,), in the order they are written."""
    ends = np.cumsum(sizes + MEMBER_OVERHEAD)
    cuts, begin = [], 0
    while begin < len(sizes):
        end = min(begin + (frames_per_shard or len(sizes)), len(sizes))
        if shard_bytes:
            before = ends[begin - 1] if begin else 0
            end = min(end, max(begin + 1, int(np.searchsorted(ends, before + shard_bytes, side="right"))))
        cuts.append((begin, end))
        begin = end
    return cuts


def _read_image(path: str, row: int, scratch: np.ndarray, exif: Exif) -> StoredPicture:
    try:
        return as_jpeg(read_file(path), scratch, exif=exif)
    except ForeignPicture as error:
        raise InputError(
            f"image {path} (row {row}): {error}; expected a {KINDS}; convert it: the shards that are "
            "finished stay, and the same command continues after them"
        ) from None
    except (OSError, DecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"image {path} (row {row}): {what}; expected a whole {KINDS}; restore it: the shards "
            "that are finished stay, and the same command continues after them; or begin anew elsewhere with "
            "--skip-bad-images, which leaves such rows out"
        ) from None


def _label_texts(labels: Annotations) -> Iterator[bytes]:
    """Yield the JSON of every sample for other programs: null where there is no label."""
    videos = ({"video": name} for name in labels.videos) if labels.videos else repeat({})
    exprs = np.where(labels.expr_mask, labels.expr, None)
    aus, any_au = np.where(labels.au_mask, labels.au, None), labels.au_mask.any(1)
    columns = (array.tolist() for array in (labels.row, labels.va, labels.va_mask, exprs, aus, any_au))
    for image, video, row, va, has_va, expr, au, has_au in zip(labels.images, videos, *columns):
        sample = {
            "row": row,
            "image": image,
            **video,
            "va": [round(value, 6) for value in va] if has_va else None,
            "expr": expr,
            "au": au if has_au else None,
        }
        yield json.dumps(sample).encode()
