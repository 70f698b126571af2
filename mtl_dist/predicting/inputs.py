"""What can be predicted: image files, videos, a shard set. Each counts its frames, names them and yields batches.

`batches` of part p of several: together the parts yield every frame once, and rows tell the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import Exif
from mtl_dist.data.frames import IMAGE_SUFFIXES, Seen, image_batches, read_image
from mtl_dist.data.index import INDEX_NAME, check_stored, index_dir, read_index
from mtl_dist.data.loader import eval_batches, lend
from mtl_dist.data.names import other_form, why_no_name
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.data.videos import VIDEO_SUFFIXES, count_frames, video_batches
from mtl_dist.errors import InputError, StorageError
from mtl_dist.progress import progress_bar
from mtl_dist.tasks import Batch

PREFETCH = 3  # batches of a shard set made ahead
MAX_LIST_BYTES = 256 << 20
NUM_NAMED = 5  # missing images in one message
FRAME_BITS = 32  # of a row of several videos


class Frames(Protocol):
    """Frames to predict. Plain data: parts of them are predicted in processes of their own."""

    num_frames: int  # of a video as its packets say

    def batches(
        self, size: int, *, batch: int, workers: int, part: int, num_parts: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of one part, each the caller's until it takes the next; `seen` is told what was noticed."""
        ...

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the names of rows, as the table of predictions has them."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files in the order of a list, or of their names in a directory. Rows are places in it."""

    root: str  # what the names are relative to
    listed: tuple[str, ...]
    skip_bad: bool = False  # what is not there, or cannot be decoded, is in no batch
    exif: Exif = "apply"
    left_out: tuple[str, ...] = ()  # kinds of files of the directory that are no images, with their number

    @property
    def num_frames(self) -> int:
        return len(self.listed)

    def batches(
        self, size: int, *, batch: int, workers: int, part: int, num_parts: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        paths = self.uris()
        which = {"part": part, "num_parts": num_parts, "skip_bad": self.skip_bad, "exif": self.exif, "seen": seen}
        return image_batches(paths, batch=batch, size=size, workers=workers, **which)

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.listed[row] for row in rows]

    def uris(self) -> list[str]:
        """Return where each image is."""
        return [_image_uri(self.root, name) for name in self.listed]

    def skipped(self, rows: np.ndarray) -> list[int]:
        """Return the rows that are not among those that were read."""
        return np.setdiff1d(np.arange(self.num_frames), rows).tolist()

    def why_bad(self, row: int) -> str:
        """Read an image once more, and return what is wrong with it."""
        try:
            read_image(_image_uri(self.root, self.listed[row]))
        except (InputError, StorageError) as error:
            return str(error)
        return f"image {self.listed[row]} could not be read before, and can be now"


@dataclass(frozen=True)
class VideoFile:
    """Every so many frames of a local video file. Rows are frame numbers from 0, names <file>/00001.jpg from 1."""

    path: Path
    every: int
    announced: int  # frames of the whole video, as its packets say
    title: str  # of the file the user named
    uri: str  # of that file: from s3:// `path` is a copy

    @property
    def num_frames(self) -> int:
        return -(-self.announced // self.every)

    def batches(
        self, size: int, *, batch: int, workers: int, part: int, num_parts: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        return self.batches_from(0, size, batch=batch, part=part, num_parts=num_parts, seen=seen)

    def batches_from(self, first_row: int, size: int, **which: Any) -> Iterator[Batch]:
        """Yield batches whose rows are frame numbers from `first_row`."""
        which |= {"every": self.every, "announced": self.announced, "first_row": first_row}
        return video_batches(self.path, size=size, **which)

    def names(self, rows: np.ndarray) -> list[str]:
        return [f"{self.title}/{row + 1:05d}.jpg" for row in rows]


@dataclass(frozen=True)
class VideoFiles:
    """The videos of a directory, in the order of their names. A row is a video's number and in its low bits a frame's.

    Where there are as many parts as videos or fewer, a part has whole videos: each is decoded once.
    """

    videos: tuple[VideoFile, ...]
    left_out: tuple[str, ...] = ()
    skip_bad: bool = False  # whether a damaged video may be left out
    bad: tuple[str, ...] = ()  # what is wrong with each that was

    @property
    def num_frames(self) -> int:
        return sum(video.num_frames for video in self.videos)

    def batches(
        self, size: int, *, batch: int, workers: int, part: int, num_parts: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        is_shared = len(self.videos) < num_parts
        which = {"part": part, "num_parts": num_parts} if is_shared else {"part": 0, "num_parts": 1}
        for number, video in enumerate(self.videos):
            if is_shared or number % num_parts == part:
                yield from video.batches_from(number << FRAME_BITS, size, batch=batch, seen=seen, **which)

    def names(self, rows: np.ndarray) -> list[str]:
        frames = rows & ((1 << FRAME_BITS) - 1)
        return [self.videos[n].names([frame])[0] for n, frame in zip((rows >> FRAME_BITS).tolist(), frames.tolist())]


@dataclass(frozen=True)
class ShardSet:
    """A set in shards, with its labels. Rows are those of the annotation file or table it was made of."""

    uri: str
    num_frames: int
    view: str
    cache_dir: Path | None

    def batches(
        self, size: int, *, batch: int, workers: int, part: int, num_parts: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        samples = ImageSamples(self._reader(), size)
        sizes = {"batch": batch, "workers": workers, "prefetch": PREFETCH}
        return lend(samples, eval_batches(samples, rank=part, num_ranks=num_parts, **sizes))

    def names(self, rows: np.ndarray) -> list[str]:
        stored, names, _ = self._reader().names()
        order = np.argsort(stored)
        return [names[order[place]] for place in np.searchsorted(stored, rows, sorter=order)]

    def _reader(self) -> ShardReader:
        return ShardReader(self.uri, read_index(self.uri), Cache(self.cache_dir))


def open_frames(
    uri: str,
    *,
    images: str | None = None,
    every: int = 1,
    skip_bad: bool = False,
    skip_videos: bool = False,
    exif: Exif = "apply",
    scratch: Path,
    cache_dir: Path | None = None,
) -> Frames:
    """Find out what is at a local path or s3:// URI, and check that it is there. Raises `InputError` that names it.

    Args:
        uri: a directory of images or of videos, a shard set, a video file, a list of images (.txt) or one image.
        images: where the paths of a list start; None: beside the list.
        every: take every so many frames of a video.
        skip_bad: leave out image files that are not there or cannot be decoded.
        skip_videos: leave out videos of a directory that are damaged, too.
        exif: turn image files as their EXIF says, or take them as stored.
        scratch: where videos from s3:// are downloaded to.
    """
    suffix = _suffix(uri)
    is_video, is_list = suffix in VIDEO_SUFFIXES, suffix == ".txt"
    if images is not None and not is_list:
        raise InputError(f"--images tells where the paths of a list start, and {uri} is no list (.txt); leave it out")
    if is_list:
        _refuse_every(uri, every)
        return _open_list(uri, images if images is not None else parent_uri(uri), skip_bad, exif)
    if is_video and not _is_directory(uri):
        _refuse_skipping(uri, skip_bad, _VIDEO)
        _refuse_exif(uri, exif, "a video, whose frames are as a player shows them")
        return _open_video(uri, every, scratch)
    if suffix in IMAGE_SUFFIXES and not _is_directory(uri):
        _refuse_every(uri, every)
        if not storage.exists(uri):
            raise InputError(f"image {uri} does not exist; correct its path")
        return ImageFiles(parent_uri(uri), _check_text([uri.rpartition("/")[2]]), skip_bad, exif)
    if uri.endswith(f"/{INDEX_NAME}") or storage.exists(storage.join(uri, INDEX_NAME)):
        index = read_index(uri)
        check_stored(uri, index)
        _refuse_every(uri, every)
        _refuse_skipping(uri, skip_bad, "a shard set, whose images were looked at when it was made")
        _refuse_exif(uri, exif, "a shard set, whose images were turned or not when it was made")
        return ShardSet(index_dir(uri), index.rows, index.view, cache_dir)
    return _open_directory(uri, every, skip_bad, skip_videos, exif, scratch)


_VIDEO = "a video: what is damaged in one cannot be told frame by frame"


def _is_directory(uri: str) -> bool:
    return not storage.is_s3(uri) and storage.local_path(uri).is_dir()


def _refuse_every(uri: str, every: int) -> None:
    if every != 1:
        raise InputError(f"--every-frames is for videos, and {uri} is none ({', '.join(VIDEO_SUFFIXES)}); leave it out")


def _refuse_skipping(uri: str, skip_bad: bool, what: str) -> None:
    if skip_bad:
        raise InputError(f"--skip-bad-images is for image files, and {uri} is {what}; leave it out")


def _refuse_exif(uri: str, exif: Exif, what: str) -> None:
    if exif != "apply":
        raise InputError(f"--exif is for image files, and {uri} is {what}; leave it out")


def _open_list(uri: str, root: str, skip_bad: bool, exif: Exif) -> ImageFiles:
    """A path a line, after a header or without: `image`, or that of the challenge, which has commas."""
    try:
        lines = storage.read_bytes(uri, max_bytes=MAX_LIST_BYTES).decode("utf-8-sig").rstrip().splitlines()
    except StorageError:  # an OSError too, but the same command may succeed later
        raise
    except OSError as error:
        raise InputError(f"list {uri} cannot be read ({error.strerror or error}); give one image path a line") from None
    except UnicodeDecodeError:
        raise InputError(f"list {uri} is not UTF-8 text; expected one image path a line") from None
    names = [line.strip() for line in lines]
    header = int(bool(names) and _is_header(names[0]))
    for number, name in enumerate(names[header:], start=header + 1):
        if "://" in name:
            raise InputError(f"{uri}:{number}: {name[:100]!r} is no image path: {why_no_name(name)}")
        if _suffix(name) not in IMAGE_SUFFIXES:
            raise InputError(f"{uri}:{number}: {name[:100]!r} is no image path ({', '.join(IMAGE_SUFFIXES)})")
    if not names[header:]:
        raise InputError(f"list {uri} names no image; expected one path a line")
    files = ImageFiles(root, tuple(names[header:]), skip_bad, exif)
    return files if skip_bad else _check_images(files, uri, header_lines=header)


def _is_header(line: str) -> bool:
    """Whether a line cannot be meant as a path: an image of another format must be named, not passed over."""
    return _suffix(line) not in IMAGE_SUFFIXES and ("," in line or not {"/", "."} & set(line))


def _check_images(files: ImageFiles, uri: str, *, header_lines: int) -> ImageFiles:
    """Raise unless every image exists: now, and not after an hour."""
    if storage.is_s3(files.root):
        stored = {found.name for found in storage.list_objects(files.root)}
        missing = [name for name in files.listed if name not in stored]
    else:
        missing = [name for name in files.listed if not storage.exists(_image_uri(files.root, name))]
    if missing:
        first = header_lines + files.listed.index(missing[0]) + 1
        why = other_form(
            missing[0], lambda name: not storage.is_s3(files.root) and storage.exists(_image_uri(files.root, name))
        )
        named = ", ".join(missing[:NUM_NAMED]) + (", ..." if len(missing) > NUM_NAMED else "")
        raise InputError(
            f"{len(missing)} of {len(files.listed)} images of {uri} do not exist below {files.root}: {named} "
            f"(the first in line {first}); add them, say with --images DIR where the paths start, or leave them out "
            f"with --skip-bad-images{why}"
        )
    return files


def _open_video(uri: str, every: int, scratch: Path, title: str | None = None) -> VideoFile:
    name = uri.rpartition("/")[2]
    path = scratch / name if storage.is_s3(uri) else storage.local_path(uri)
    try:
        if storage.is_s3(uri):
            storage.download(uri, path)
        elif not storage.exists(uri):
            raise FileNotFoundError(path)
    except FileNotFoundError:
        raise InputError(f"video {uri} does not exist; correct its path") from None
    (title,) = _check_text([title or name.rpartition(".")[0]])
    return VideoFile(path, every, count_frames(path), title, uri)


def _open_directory(
    uri: str, every: int, skip_bad: bool, skip_videos: bool, exif: Exif, scratch: Path
) -> ImageFiles | VideoFiles:
    if not storage.is_s3(uri) and storage.exists(uri):
        raise InputError(
            f"{uri} is no image, video or list by its name; expected {', '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))}, "
            "or .txt, or a directory"
        )
    if not storage.is_s3(uri) and not storage.local_path(uri).exists():
        raise InputError(f"--input {uri} does not exist; correct the path")
    every_name = [found.name for found in storage.list_objects(uri, follow_links=True)]
    names = [name for name in every_name if not any(part.startswith(".") for part in name.split("/"))]
    images = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    videos = [name for name in names if _suffix(name) in VIDEO_SUFFIXES]
    if not images and not videos:
        raise InputError(
            f"no images at {uri} ({', '.join(IMAGE_SUFFIXES)}), no videos ({', '.join(VIDEO_SUFFIXES)}) and no shard "
            f"set ({INDEX_NAME}); correct the path"
        )
    if images and videos:
        raise InputError(
            f"{uri} holds images and videos ({len(images)}, such as {images[0]}, and {len(videos)}, such as "
            f"{videos[0]}); expected one of them: give a directory of one kind, or a list (.txt) of the images"
        )
    left_out = Counter(_suffix(name) or "without a suffix" for name in set(names) - {*images, *videos})
    others = tuple(f"{count} {suffix}" for suffix, count in left_out.most_common())
    if images:
        _refuse_every(uri, every)
        return ImageFiles(uri, _check_text(images), skip_bad, exif, others)
    _refuse_skipping(uri, skip_bad and not skip_videos, f"a directory with {_VIDEO}")
    _refuse_exif(uri, exif, "a directory with videos, whose frames are as a player shows them")
    return _open_videos(uri, _check_text(videos), every, skip_videos, scratch, others)


def _open_videos(
    uri: str, names: tuple[str, ...], every: int, skip_bad: bool, scratch: Path, left_out: tuple[str, ...]
) -> VideoFiles:
    stems = Counter(name.rpartition(".")[0] for name in names)
    videos, bad = [], []
    with progress_bar("looking at videos", len(names)) as advance:
        for number, name in enumerate(names):
            stem = name.rpartition(".")[0]
            own = scratch / f"{number}"  # two may have one name
            if storage.is_s3(uri):
                own.mkdir()
            title = stem if stems[stem] == 1 else name
            try:
                videos.append(_open_video(_image_uri(uri, name), every, own, title))
            except InputError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
            advance(1)
    if not videos:
        raise no_video(uri, bad)
    return VideoFiles(tuple(videos), left_out, skip_bad, tuple(bad))


def no_video(uri: str, bad: Sequence[str]) -> InputError:
    """Return what to raise where every video of a directory is damaged."""
    return InputError(f"none of the {len(bad)} videos of {uri} can be read; the first: {bad[0]}")


def _check_text(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of files that can be written to a table: on a disk they may be any bytes."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"file name {name!a} is not UTF-8, so no table can hold it; rename the file") from None
    return tuple(names)


def _image_uri(root: str, name: str) -> str:
    return name if name.startswith("/") and not storage.is_s3(root) else storage.join(root, name)


def parent_uri(uri: str) -> str:
    """Return the directory or prefix that something is in."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def _suffix(uri: str) -> str:
    name = uri.rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""
