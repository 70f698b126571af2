"""Pictures that are in no shard set, as batches without labels; and what is to be said of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from mtl_dist import storage
from mtl_dist.data.decode import (
    KINDS,
    MAX_IMAGE_BYTES,
    MAX_SIDE,
    DecodeError,
    Exif,
    ForeignPicture,
    Picture,
    decode_picture,
)
from mtl_dist.errors import InputError
from mtl_dist.tasks import Batch
from mtl_dist.threads import DaemonThreads

Read = TypeVar("Read")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A picture of other proportions, or of so many times more pixels a side than a model reads, is hardly one face.
WIDEST, NARROWEST, LARGEST = 1.25, 0.6, 10


@dataclass
class Seen:
    """What was noticed of frames while they were read, and when those of a video are shown."""

    counts: dict[str, int] = field(default_factory=dict)  # of frames, by kind of note
    first: dict[str, str] = field(default_factory=dict)  # of these
    videos: dict[str, set[str]] = field(default_factory=dict)  # by kind of note
    seconds: dict[int, float] = field(default_factory=dict)  # by row, from where the video starts; NaN: not told

    def note(self, kind: str, what: str) -> None:
        """Count one frame with a note of this kind. `what` tells of it; the first of a kind is kept."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, what)

    def note_video(self, kind: str, what: str) -> None:
        """Keep the name of a video with a note of this kind, once."""
        self.videos.setdefault(kind, set()).add(what)

    def add(self, other: Seen) -> None:
        """Take over what another part noticed."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.first.setdefault(kind, other.first[kind])
        for kind, names in other.videos.items():
            self.videos.setdefault(kind, set()).update(names)
        self.seconds |= other.seconds

    def lines(self) -> list[str]:
        """Return the notes in words."""
        noticed = {kind: (count, self.first[kind]) for kind, count in self.counts.items()}
        noticed |= {kind: (len(names), min(names)) for kind, names in self.videos.items()}
        return [
            f"note: {text.format(n=noticed[kind][0], first=noticed[kind][1])}"
            for kind, text in NOTES.items()
            if kind in noticed
        ]


NOTES = {
    "turned": "{n} picture(s), such as {first}, are not stored upright, says their EXIF, and were turned; --exif "
    "ignore takes them as they are stored",
    "lying": "{n} picture(s), such as {first}, are not stored upright, says their EXIF, and were taken as they are",
    "shape": "{n} picture(s), such as {first}, are far from square and were squashed; the models expect pictures cut "
    "to one face (mtl_dist.predict --faces finds them)",
    "large": "{n} picture(s) or frame(s), such as {first}, are much larger than what the models read; they "
    "expect pictures cut to one face (mtl_dist.predict --faces finds them)",
    "middle": "of {n} frame(s), such as {first}, the middle square was taken; the models expect that one face fills it "
    "(mtl_dist.predict --faces finds them)",
    "one view": "{n} frame(s), such as {first}, have no picture in some view; the models of the others decide",
    "streams": "{n} video(s), such as {first}, hold several pictures; one was read",
    "interlaced": "{n} video(s), such as {first}, are interlaced, and what moves is combed; part the fields first: "
    "ffmpeg -i OLD -vf bwdif NEW",
    "hdr": "{n} video(s), such as {first}, are HDR, whose colours look pale without tone mapping",
    "alpha": "{n} video(s), such as {first}, are transparent in places, which is not read: hidden colours are seen",
}


class BadImage(InputError):
    """A picture that is not there or cannot be decoded; not one that a store refuses, or this user may not read."""


def image_batches(
    paths: Sequence[Path | str],
    *,
    batch: int,
    size: int,
    workers: int = 1,
    part: int = 0,
    num_parts: int = 1,
    skip_bad: bool = False,
    exif: Exif = "apply",
    seen: Seen | None = None,
) -> Iterator[Batch]:
    """Yield image files (local or s3://) as unlabelled batches of `size` pixels a side, in their order.

    Rows are places in `paths`. Of several parts, part p has batches p, p + num_parts, ...: the same batches, whatever
    the number of parts. `workers` threads decode; 0 decodes in this one. Raises `InputError` naming the file; with
    `skip_bad` the row of a `BadImage` is in no batch. `seen` is told of what looks unlike a face's picture.
    """
    from mtl_dist.data.unlabelled import batched  # torch and all, which who only wants pictures does not wait for

    seen = Seen() if seen is None else seen
    rows = [row for row in range(len(paths)) if row // batch % num_parts == part]
    read = partial(_read_if_good if skip_bad else read_picture, size=size, exif=exif)
    pictures = read_in_order(read, (paths[row] for row in rows), workers=workers, ahead=2 * batch)

    def noted() -> Iterator[tuple[int, np.ndarray]]:
        for row, picture in zip(rows, pictures):
            if picture is not None:
                _note(picture, str(paths[row]), size, exif, seen)
                yield row, picture.pixels

    yield from batched(noted(), batch=batch)


def read_image(path: Path | str, size: int | None = None, *, exif: Exif = "apply") -> np.ndarray:
    """Return the pixels of `read_picture`, (H, W, 3) uint8 RGB."""
    return read_picture(path, size, exif=exif).pixels


def read_picture(
    path: Path | str, size: int | None = None, *, exif: Exif = "apply", max_side: int = MAX_SIDE
) -> Picture:
    """Read a picture file, local or s3://, as `decode_picture` does.

    Raises `BadImage` naming a file that is not there or cannot be decoded, `InputError` naming one that may not be
    read.
    """
    try:
        data = storage.read_bytes(str(path), max_bytes=MAX_IMAGE_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadImage(f"image {path} does not exist; correct its path, or take it out of the list") from None
    try:
        return decode_picture(data, size, exif=exif, max_side=max_side)
    except ForeignPicture as error:  # not left out as bad: it may well be whole
        raise InputError(f"image {path} is not read: {error}; expected a {KINDS}") from None
    except DecodeError as error:
        raise BadImage(f"image {path} cannot be decoded: {error}; mend it, or leave it out") from None


def _read_if_good(path: Path | str, size: int, exif: Exif) -> Picture | None:
    try:
        return read_picture(path, size, exif=exif)
    except BadImage:
        return None


def _note(picture: Picture, path: str, size: int, exif: Exif, seen: Seen) -> None:
    about = f"{path}, {picture.width} x {picture.height}"
    if picture.orientation != 1:
        seen.note("turned" if exif == "apply" else "lying", path)
    is_swapped = exif == "apply" and picture.orientation > 4
    shape = picture.height / picture.width if is_swapped else picture.width / picture.height
    if not NARROWEST <= shape <= WIDEST:
        seen.note("shape", about)
    elif min(picture.width, picture.height) > LARGEST * size:
        seen.note("large", about)


def read_in_order(
    read: Callable[[Path | str], Read], paths: Iterable[Path | str], *, workers: int, ahead: int
) -> Iterator[Read]:
    """Yield what is read of paths, in their order; threads read at most `ahead` of them before they are taken."""
    if workers == 0:
        yield from map(read, paths)
        return
    pending: deque[Future[Read]] = deque()
    pool = DaemonThreads(workers, "images")
    try:
        for path in paths:
            pending.append(pool.submit(partial(read, path)))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close(patience_s=0)  # what is read of a slow store after Ctrl-C is of no use to anyone
