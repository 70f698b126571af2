"""`create --skip-bad-images`: look at every image before anything is written, and leave out the rows of bad ones.

What was found is kept in <dest>/<view>/checked.json, with a checksum of the names, sizes and times of all images: a
rerun looks at none of them again as long as none has changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.data.decode import KINDS, DecodeError, ForeignPicture, decode_picture, read_file
from mtl_dist.errors import Damaged, InputError
from mtl_dist.processes import process_pool
from mtl_dist.sealed import seal, unseal
from mtl_dist.shards.annotations import Annotations
from mtl_dist.shards.sources import with_choice

SKIPPED_NAME = "skipped.csv"
CHECKED_NAME = "checked.json"
CHECKED_FORMAT = "mtl_dist-checked-2"  # another one where other images are bad
UNREADABLE = "cannot be read"
HEADER = ["row", "split", "view", "image", "reason"]
CHUNK = 256  # images of one task
MAX_LISTED = 5  # images named in one message


class Skipped(NamedTuple):
    """A row that was left out, for an image of one view."""

    row: int
    split: str
    view: str
    image: str
    reason: str


class Kept(NamedTuple):
    """What is left of the splits."""

    splits: dict[str, Annotations]
    skipped: list[Skipped]
    checked: dict[str, dict]  # for `write_checked`: what was found, by URI


def drop_bad_images(
    splits: dict[str, Annotations],
    images_dirs: dict[str, Path],
    *,
    dest: str,
    jobs: int,
    progress: Callable[[int], None],
) -> Kept:
    """Return the splits without rows whose image is missing, empty or does not decode in any view, and those rows.

    `images_dirs` by view; `progress` is told of images looked at (`count_images` in all). What an earlier run found
    is read from `dest`. Raises `InputError` where more than half of the rows would go: the directory is probably the
    wrong one.
    """
    names = _distinct(splits)
    bad, checked = {}, {}
    for view, directory in images_dirs.items():
        state = _state_of(directory, names)  # before they are looked at: what changes meanwhile is another state
        where = storage.join(dest, view, CHECKED_NAME)
        bad[view] = _read_checked(where, state)
        if bad[view] is None:
            bad[view] = _find_bad(directory, names, jobs, progress)
            # A disk or server that failed may work the next time, and the state would not tell.
            if not any(reason.startswith(UNREADABLE) for reason in bad[view].values()):
                checked[where] = {"format": CHECKED_FORMAT, "images_sha256": state, "bad": bad[view]}
        else:
            progress(len(names))
    return Kept(*_drop(splits, images_dirs, bad), checked)


def count_images(splits: dict[str, Annotations]) -> int:
    """How many distinct images of one view the splits list."""
    return len(_distinct(splits))


def count_reasons(skipped: list[Skipped]) -> dict[str, int]:
    """Count by reason, without what each image adds to it, the most frequent first."""
    return dict(Counter(entry.reason.partition(" (")[0].rpartition("; ")[2] for entry in skipped).most_common())


def read_skipped(dest: str, *, but: tuple[str, ...]) -> list[Skipped]:
    """Return what earlier runs listed in <dest>/skipped.csv of other views `but` these. Raises `InputError`."""
    where = storage.join(dest, SKIPPED_NAME)
    try:
        lines = list(csv.reader(io.StringIO(storage.read_bytes(where).decode())))
    except FileNotFoundError:
        return []
    if not lines or any(len(line) != len(HEADER) for line in lines) or lines[0] != HEADER:
        raise InputError(f"{where} would be written, and holds something else; expected '{','.join(HEADER)}'; move it")
    return [Skipped(*line) for line in lines[1:] if line[2] not in but]


def write_skipped(dest: str, skipped: list[Skipped]) -> None:
    """Write <dest>/skipped.csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *skipped])
    storage.write_bytes(storage.join(dest, SKIPPED_NAME), text.getvalue().encode())


def write_checked(kept: Kept) -> None:
    """Keep what was found for the next run."""
    for where, checked in kept.checked.items():
        storage.write_bytes(where, seal(checked))


def _distinct(splits: dict[str, Annotations]) -> list[str]:
    """Every image once: one image can have several rows."""
    return list(dict.fromkeys(image for part in splits.values() for image in part.images))


def _drop(
    splits: dict[str, Annotations], images_dirs: dict[str, Path], bad: dict[str, dict[str, str]]
) -> tuple[dict[str, Annotations], list[Skipped]]:
    skipped, left = [], {}
    for split, part in splits.items():
        before = len(skipped)
        for row, image in zip(part.row.tolist(), part.images):
            skipped += [Skipped(row, split, view, image, bad[view][image]) for view in bad if image in bad[view]]
        gone = sorted({entry.row for entry in skipped[before:]})
        left[split] = part
        if gone:
            places = np.flatnonzero(~np.isin(part.row, gone))
            left[split] = with_choice(part.take(places), skipped_rows=gone)
    num_rows, num_left = (sum(len(part.row) for part in sides.values()) for sides in (splits, left))
    if 2 * num_left < num_rows or not all(len(part.row) for part in left.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(skipped).items())
        examples = ", ".join(str(images_dirs[entry.view] / entry.image) for entry in skipped[:MAX_LISTED])
        raise InputError(
            f"{num_rows - num_left} of {num_rows} rows would be skipped ({reasons}): {examples} ...; that is more than "
            "half, or all of a split: is this the right directory of images?"
        )
    return left, skipped


def _state_of(directory: Path, names: list[str]) -> str:
    """Return a checksum of every image's name, size and times; a missing one has none.

    The time of its last change (ctime) tells of an image that was restored with the size and date (mtime) of the bad
    one: no program can set it.
    """
    sha256, root = hashlib.sha256(), str(directory)
    for name in names:
        try:
            found = os.stat(f"{root}/{name}")
            about = f"{name}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"
        except OSError:
            about = f"{name}\0-\0"
        sha256.update(about.encode())
    return sha256.hexdigest()


def _read_checked(where: str, state: str) -> dict[str, str] | None:
    """Return the reasons of bad images, by name, that an earlier run found in this state of them; None if none did."""
    try:
        checked = unseal(storage.read_bytes(where), unsealed=("format", "images_sha256", "bad"))
        if (checked["format"], checked["images_sha256"]) != (CHECKED_FORMAT, state):
            return None
        bad = checked["bad"]
        return bad if all(isinstance(reason, str) for reason in bad.values()) else None
    except (FileNotFoundError, Damaged, KeyError, AttributeError):
        return None  # none yet, torn, or another program's: looked at again


def _find_bad(directory: Path, names: list[str], jobs: int, progress: Callable[[int], None]) -> dict[str, str]:
    """Return the reason of every bad image, by name."""
    bad: dict[str, str] = {}
    tasks = [(directory, names[begin : begin + CHUNK]) for begin in range(0, len(names), CHUNK)]
    for (_, part), reasons in zip(tasks, _map(tasks, min(jobs, len(tasks)))):
        bad |= reasons
        progress(len(part))
    return bad


def _map(tasks: list[tuple[Path, list[str]]], jobs: int) -> Iterator[dict[str, str]]:
    if jobs == 1:
        yield from map(check_images, tasks)
        return
    with process_pool(jobs) as pool:
        yield from pool.map(check_images, tasks)


def check_images(task: tuple[Path, list[str]]) -> dict[str, str]:
    """Decode images of one directory, and return what is wrong with which.

    Raises `InputError` for a whole picture of a kind or size that is not decoded.
    """
    directory, names = task
    bad = {}
    for name in names:
        try:
            storage.check_ends(directory / name)
            if data := read_file(directory / name):
                decode_picture(data)
            else:
                bad[name] = "empty"
        except FileNotFoundError:
            bad[name] = "missing"
        except OSError as error:
            bad[name] = f"{UNREADABLE} ({error.strerror})"
        except ForeignPicture as error:  # whole, as far as one can tell: not left out for being what it is
            raise InputError(
                f"image {directory / name}: {error}; expected a {KINDS}; --skip-bad-images leaves out "
                "what is damaged only: convert it, or take its rows out of the source"
            ) from None
        except DecodeError as error:
            bad[name] = str(error)
    return bad
