"""What faces are cut out of: videos, and directories of photographs in parts of a few hundred."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mtl_dist import storage
from mtl_dist.data.frames import IMAGE_SUFFIXES
from mtl_dist.data.names import is_image_name
from mtl_dist.data.videos import VIDEO_SUFFIXES
from mtl_dist.errors import InputError
from mtl_dist.threads import DaemonThreads

PART_PHOTOS = 200
ENDS_BYTES = 1 << 16  # of a local file, at its beginning and end: what tells it from another of the same size
LOOKING_THREADS = 8
FURTHER = r"_([2-9]|[1-9][0-9]+)"  # at the end of a directory's name: a further person of the video before it


class Part(NamedTuple):
    """What one process does at a time: a video, or some photographs of one directory."""

    name: str  # of its file in parts/
    video: str  # the directory of its faces in both views; of further persons with _2, _3 ...
    sources: tuple[str, ...]  # names of files, relative to the root
    images: tuple[str, ...]  # names of pictures for the photographs, without suffix; of a video none
    root: str
    identity: str  # of the files' contents, as far as it is cheap to tell

    @property
    def is_video(self) -> bool:
        return not self.images


def find_parts(uri: str, *, one_person: bool) -> tuple[list[Part], list[str]]:
    """Find what is at a local path or s3:// URI, in the order of names, and the kinds of files that are neither videos
    nor photographs, with their number. Raises `InputError` that names what is wrong."""
    root, names = _list(storage.absolute(uri))
    videos = [name for name in names if _suffix(name) in VIDEO_SUFFIXES]
    photos = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    if not videos and not photos:
        raise InputError(
            f"no videos at {uri} ({', '.join(VIDEO_SUFFIXES)}) and no photographs ({', '.join(IMAGE_SUFFIXES)}); "
            "correct the path"
        )
    if not storage.is_s3(root):
        with DaemonThreads(LOOKING_THREADS, "look") as pool:
            ends = pool.map(lambda name: _ends(storage.join(root, name)), [*videos, *photos])
            names |= {name: f"{names[name]} {told}" for name, told in zip([*videos, *photos], ends)}
    parts = [*_video_parts(root, videos, names), *_photo_parts(root, photos, names)]
    _check_names(parts, one_person)
    others = Counter(_suffix(name) or "without a suffix" for name in set(names) - {*videos, *photos})
    kinds = [f"{count} {suffix}" for suffix, count in sorted(others.items(), key=lambda other: (-other[1], other[0]))]
    return sorted(parts, key=lambda part: (part.video, part.name)), kinds


def _list(uri: str) -> tuple[str, dict[str, str]]:
    """Return the root and what is below it, by name: what tells the contents of each file from others."""
    suffix = _suffix(uri)
    if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES and storage.exists(uri):
        root, _, name = uri.rpartition("/")
        root = root or ("/" if uri.startswith("/") else ".")
        if storage.is_s3(uri):
            found = {key: about for key, about in storage.list_versions(root).items() if key == name}
            return root, {key: f"{size} {etag}" for key, (size, etag) in found.items()}
        return root, {name: str(storage.local_path(uri).stat().st_size)}
    if storage.is_s3(uri):
        found = storage.list_versions(uri)
        return uri, {key: f"{size} {etag}" for key, (size, etag) in sorted(found.items()) if not _is_hidden(key)}
    path = storage.local_path(uri)
    if not path.exists():
        raise InputError(f"{uri} does not exist; correct the path")
    if not path.is_dir():
        raise InputError(
            f"{uri} is no video or photograph by its name; expected {', '.join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))}, "
            "or a directory"
        )
    listed = storage.list_objects(uri, follow_links=True)
    return uri, {name: str(size) for name, size in listed if not _is_hidden(name)}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _video_parts(root: str, names: list[str], contents: dict[str, str]) -> Iterator[Part]:
    stems = Counter(name.rpartition(".")[0] for name in names)
    for name in names:
        stem = name.rpartition(".")[0]
        video = stem if stems[stem] == 1 else name
        yield Part(f"{video}.parquet", video, (name,), (), root, contents[name])


def _photo_parts(root: str, names: list[str], contents: dict[str, str]) -> Iterator[Part]:
    own = root.rstrip("/").rpartition("/")[2] or "photographs"
    by_directory: dict[str, list[str]] = {}
    for name in names:
        by_directory.setdefault(name.rpartition("/")[0], []).append(name)
    for directory, inside in by_directory.items():
        stems = Counter(_stem(name) for name in inside)
        for number, begin in enumerate(range(0, len(inside), PART_PHOTOS)):
            some = tuple(inside[begin : begin + PART_PHOTOS])
            images = tuple(_stem(name) if stems[_stem(name)] == 1 else name.rpartition("/")[2] for name in some)
            told = json.dumps([(name, image, contents[name]) for name, image in zip(some, images)])
            video = directory or own
            identity = hashlib.sha256(told.encode()).hexdigest()
            yield Part(f"{video}.photographs-{number:05d}.parquet", video, some, images, root, identity)


def directory_part(name: str) -> str | None:
    """Return the directory of photographs whose part's file has this name; None for a video's."""
    found = re.fullmatch(r"(.+)\.photographs-[0-9]{5,}\.parquet", name)
    return found[1] if found else None


def _check_names(parts: list[Part], one_person: bool) -> None:
    """Raise for names that cannot be written, and for two sources whose faces would be in one directory."""
    for part in parts:
        longest = max(part.images, key=len, default="000000000")
        for name in (*part.sources, f"{part.video}_1000/{longest}.jpg"):
            if not is_image_name(name):
                raise InputError(f"{name!a} has a name that is not printable or too long; rename it")
    videos = {part.video: part for part in reversed(parts)}
    files: dict[str, Part] = {}
    images: dict[tuple[str, str], str] = {}
    for part in parts:
        other = videos[part.video]
        if other is not part and (other.is_video or part.is_video or _directory(other) != _directory(part)):
            raise _same(other.sources[0], part.sources[0], part.video)
        if files.setdefault(part.name, part) is not part:
            raise _same(files[part.name].sources[0], part.sources[0], f"{part.name} of DEST")
        base = None if one_person else re.fullmatch(f"(.+){FURTHER}", part.video)
        if base and base[1] in videos:
            why = ", since further persons of a video get its name with _2, _3 ..."
            raise _same(videos[base[1]].sources[0], part.sources[0], part.video, why)
        for name, image in zip(part.sources, part.images):
            if images.setdefault((part.video, image), name) != name:
                raise _same(images[part.video, image], name, f"{part.video}/{image}.jpg")


def _directory(part: Part) -> str:
    return part.sources[0].rpartition("/")[0]


def _same(one: str, other: str, place: str, why: str = "") -> InputError:
    return InputError(f"faces of {one} and {other} would both lie in {place}{why}; rename one of the two")


def _ends(uri: str) -> str:
    try:
        with storage.local_path(uri).open("rb") as file:
            ends = file.read(ENDS_BYTES)
            file.seek(max(0, file.seek(0, 2) - ENDS_BYTES))
            return hashlib.sha256(ends + file.read()).hexdigest()[:32]
    except OSError:
        return ""  # said when its turn comes, or left out


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _suffix(name: str) -> str:
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" if "." in base else ""
