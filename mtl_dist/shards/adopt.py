"""Adopt WebDataset tars of others: unpacked by webdataset's own reader into a table and a directory of its images.

A sample is a picture (`jpg`, `png`, ...) with `json`, `cls` or both; of these the table has its columns:

    json  a column a key; what is nested or listed is `face.yaw`, `scores.0`. `va`, two numbers, is valence and arousal,
          `expr` expression, and `au`, twelve values in our order, AU1, AU2, ...
    cls   the column expression, or cls where the JSON has an expression

A tar is unpacked when its part is written, so with `--images` a restart unpacks only what is missing.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from mtl_dist import storage
from mtl_dist.data.decode import MAX_IMAGE_BYTES
from mtl_dist.data.names import MAX_NAME_BYTES, is_image_name
from mtl_dist.errors import InputError
from mtl_dist.processes import process_pool
from mtl_dist.progress import progress_bar
from mtl_dist.shards.columns import TableOptions
from mtl_dist.shards.sources import PICTURES, check_one_view
from mtl_dist.tasks import AUS, PERSON

SUFFIX = ".tar"
PARTS = ".unpacked"  # what is in every tar that is unpacked
FORMAT = 1  # of a part
MAX_TARS = 1_000_000  # a name may say {0..9999999999}
MAX_LABEL_BYTES = 1 << 20
EXPECTED = "a picture, with json (an object), cls (text) or both where it is labelled"


class Unpacking(NamedTuple):
    """One tar that is to be unpacked."""

    uri: str
    prefix: str  # of the names of its pictures
    images_dir: Path
    part: Path


@contextlib.contextmanager
def as_table(
    source: str, options: TableOptions, *, views: tuple[str, ...], jobs: int
) -> Iterator[tuple[Path, TableOptions]]:
    """Give `create`'s source as a path, and its options: WebDataset tars as a table. Others are as they are.

    Images are unpacked to `--images` and stay; else to a scratch directory, which goes when the block ends. Raises
    `InputError` naming tar and sample.
    """
    train = _expand(source)
    val = _expand(options.val_table) if options.val_table else []
    if not train and not val:
        if storage.is_s3(source):
            raise InputError(f"source {source}: of s3:// tars are read; expected 's3://bucket/faces-{{000..099}}.tar'")
        if options.name_by_tar:
            raise InputError(f"--name-by-tar is for the tars of a WebDataset, and {source} is none; leave it out")
        yield storage.local_path(source), options
        return
    check_one_view(source, views)
    if options.unlabelled:
        raise InputError(f"--unlabelled is for a directory of pictures, and {source} are tars; unpack them first")
    if not train:
        raise InputError(
            f"--val-table {options.val_table} is a WebDataset and {source} is none; expected two of a kind"
        )
    kept = contextlib.nullcontext(options.images) if options.images else storage.scratch_directory("unpacked")
    with kept as directory:
        parts = _unpack([*train, *val], directory, jobs, name_by_tar=options.name_by_tar)
        if alone := sum(not row["video"] for row in _rows_of(parts)):
            print(
                f"note: {alone:,} pictures are of no directory: each is no film, and stands alone or with its person; "
                "--columns.video names a column that tells videos",
                flush=True,
            )
        person = "person" if options.columns.person is None else options.columns.person
        table = _write_table(directory / "labels.csv", parts[: len(train)], person)
        update: dict[str, Any] = {"images": directory}
        if val:
            update["val_table"] = str(_write_table(directory / "val_labels.csv", parts[len(train) :], person))
        yield table, options.model_copy(update=update)


def _expand(source: str) -> list[str]:
    """Return the tars that a name with braces stands for; nothing where it is no name of tars."""
    if not source.endswith(SUFFIX):
        return []
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", source)  # which would be made whole before the first is given
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_TARS:
        raise InputError(f"'{source}' names more than {MAX_TARS:,} tars; expected fewer")
    try:
        return list(itertools.islice(braceexpand(source), MAX_TARS))
    except UnbalancedBracesError:
        raise InputError(f"'{source}' has unbalanced braces; expected for example 'faces-{{000..099}}.tar'") from None


def _unpack(uris: list[str], directory: Path, jobs: int, *, name_by_tar: bool) -> list[Path]:
    """Unpack what is not unpacked yet; return the part of every tar."""
    todo = []
    for uri, prefix in zip(uris, _short_names(uris) if name_by_tar else [""] * len(uris)):
        identity = json.dumps([FORMAT, storage.absolute(uri), prefix, *_version(uri)])
        part = directory / PARTS / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        todo.append(Unpacking(uri, prefix, directory, part))
    missing = [job for job in todo if not job.part.exists()]
    with progress_bar("unpacking tars", len(todo)) as advance:
        advance(len(todo) - len(missing))
        with contextlib.ExitStack() as stack:
            run = map
            if jobs > 1 and len(missing) > 1:
                run = stack.enter_context(process_pool(min(jobs, len(missing)))).map
            for _ in run(unpack_tar, missing):
                advance(1)
    return [job.part for job in todo]


def _rows_of(parts: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the samples of some tars, a tar at a time: there may be millions."""
    for part in parts:
        yield from json.loads(part.read_bytes())


def _short_names(uris: list[str]) -> list[str]:
    """Return the end of every tar's path, without .tar: as many of its parts as tell all apart, with '/' behind."""
    parts = [uri.removesuffix(SUFFIX).split("/") for uri in uris]
    depth = next(
        n for n in range(1, len(max(parts, key=len)) + 2) if len({tuple(each[-n:]) for each in parts}) == len(set(uris))
    )
    return ["/".join([*each[-depth:], ""]) for each in parts]


def _version(uri: str) -> tuple[int, str]:
    """Return what changes when a tar is replaced. Raises `InputError` where there is none."""
    if storage.is_s3(uri):
        place, _, name = uri.rpartition("/")
        found = _versions(place).get(name)
    else:
        path = storage.local_path(uri)
        found = (path.stat().st_size, str(path.stat().st_mtime_ns)) if storage.exists(uri) else None
    if found is None:
        raise InputError(f"{uri} does not exist; expected every tar of the set; correct the name or restore the file")
    return found


@functools.lru_cache(maxsize=4)
def _versions(place: str) -> dict[str, tuple[int, str]]:
    return storage.list_versions(place)


def unpack_tar(job: Unpacking) -> None:
    """Write the pictures of a tar, and when all are there its part: a row a sample."""
    with contextlib.ExitStack() as stack:
        path = storage.local_path(job.uri) if not storage.is_s3(job.uri) else None
        if path is None:
            path = stack.enter_context(storage.scratch_directory("tar")) / "set.tar"
            storage.download(job.uri, path)
        rows = [_unpack_sample(sample, job) for sample in _read_samples(path, job.uri)]
    if not rows:
        raise InputError(f"{job.uri} holds no samples; expected {EXPECTED}")
    storage.write_bytes(str(job.part), json.dumps(rows).encode())


def _read_samples(path: Path, uri: str) -> Iterator[dict[str, Any]]:
    """Yield webdataset's samples of a local tar. Its opener is left out: some names are commands of a shell to it."""
    import tarfile

    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": uri, "stream": stream}]))
        except (tarfile.TarError, ValueError, EOFError) as error:
            reason = str(error.args[0] if error.args else error).partition(" @ ")[0]
            raise InputError(f"{uri} cannot be read: {reason}; expected a whole tar, every name once") from None


def _unpack_sample(sample: dict[str, Any], job: Unpacking) -> dict[str, Any]:
    """Write a sample's picture; return its row: the picture's name and sha256, and what is labelled as text."""
    key = sample["__key__"]
    where = f"{job.uri}, sample {key!r}"
    pictures = [suffix for suffix in sample if f".{suffix}" in PICTURES]
    if len(pictures) != 1:
        has = ", ".join(name for name in sample if not name.startswith("__")) or "nothing"
        raise InputError(f"{where} has {has}; expected {EXPECTED}")
    name, data = f"{job.prefix}{key}.{pictures[0]}", sample[pictures[0]]
    if not is_image_name(name):
        raise InputError(f"{where}: not a name; expected a relative path, no '..', of at most {MAX_NAME_BYTES} bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"{where}: a picture of {len(data):,} bytes; expected at most {MAX_IMAGE_BYTES:,}")
    _put(job.images_dir / name, data, where)
    labels = _labels_of(sample, where)
    named = key if "/" in key else labels.get("image", "")  # of tars that are numbered, with names in their JSON
    video = named.rpartition("/")[0]  # without the tar's name: a film may go on in the next one
    return {
        "name": name,
        "video": video,
        "labels": labels,
    }


def _put(path: Path, data: bytes, where: str) -> None:
    """Write a picture whole or not at all, and never over another: a part may vouch for that one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unpacking-") as part:
            part.write(data)
            part.flush()
            with contextlib.suppress(FileExistsError):
                os.link(part.name, path)
                return
        if path.read_bytes() == data:
            return
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; name another place with --images") from None
    raise InputError(
        f"{where}: {path} is another picture; expected a key for one picture in train and val: --name-by-tar puts the "
        "tar's name in front; or a directory --images that no other tars were unpacked to"
    )


def _labels_of(sample: dict[str, Any], where: str) -> dict[str, str]:
    for suffix in ("json", "cls"):
        if len(sample.get(suffix, b"")) > MAX_LABEL_BYTES:
            raise InputError(f"{where}: {suffix} has more than {MAX_LABEL_BYTES:,} bytes; expected labels")
    labels: dict[str, str] = {}
    try:
        if "json" in sample:
            content = json.loads(sample["json"])
            if not isinstance(content, dict):
                raise InputError(f"{where}: its json is no object; expected {{...}}")
            labels = _flatten(content)
        if "cls" in sample:
            labels["cls" if "expression" in labels else "expression"] = sample["cls"].decode().strip()
    except RecursionError:
        raise InputError(f"{where}: its json is nested too deeply; expected labels") from None
    except ValueError as error:
        raise InputError(f"{where}: its labels cannot be read: {error}; expected UTF-8, every name once") from None
    return labels


def _flatten(content: dict[str, Any]) -> dict[str, str]:
    """Return a column a value, as text: '' where it is null."""
    named = {
        "va": ("valence", "arousal"),
        "au": tuple(f"AU{number}" for number in AUS),
    }
    columns: dict[str, str] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                put(f"{name}.{key}" if name else key, each)
        elif isinstance(value, list):
            names = named.get(name, ())
            if len(names) != len(value):
                names = tuple(f"{name}.{place}" for place in range(len(value)))
            for key, each in zip(names, value):
                put(key, each)
        else:
            column = "expression" if name == "expr" else name
            if column in columns:
                raise ValueError(f"{column} is in it twice")
            if isinstance(value, bool):
                value = int(value)
            columns[column] = "" if value is None else value if isinstance(value, str) else json.dumps(value)

    put("", content)
    return columns


def _write_table(path: Path, parts: list[Path], person: str) -> Path:
    """Write the rows of some tars as one table, columns in the order they are met.

    A video is the directory of a key. A picture without one stands with those of its person, or alone.
    """
    names = list(dict.fromkeys(chain.from_iterable(row["labels"] for row in _rows_of(parts))))
    added = [] if "video" in names else ["video"]
    with storage.atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *added, *("json.image" if name == "image" else name for name in names)])
        for row in _rows_of(parts):
            who = row["labels"].get(person)
            video = row["video"] or (f"{PERSON}{who}" if who else row["name"])
            writer.writerow([row["name"], *(video for _ in added), *(row["labels"].get(name, "") for name in names)])
    return path
