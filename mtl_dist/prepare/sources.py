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

PART_PHOTOS = 200
ENDS_BYTES = 1 << 16  # of a local video, at its beginning and end: what tells it from another of the same size


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


def find_parts(uri: str) -> list[Part]:
    """Find what is at a local path or s3:// URI, in the order of names. Raises `InputError` that names it."""
    root, names = _list(storage.absolute(uri))
    videos = [name for name in names if _suffix(name) in VIDEO_SUFFIXES]
    photos = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    if not videos and not photos:
        raise InputError(
            f"no videos at {uri} ({', '.join(VIDEO_SUFFIXES)}) and no photographs ({', '.join(IMAGE_SUFFIXES)}); "
            "correct the path"
        )
    parts = [*_video_parts(root, videos, names), *_photo_parts(root, photos, names)]
    _check_names(parts)
    return sorted(parts, key=lambda part: (part.video, part.name))


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
        identity = contents[name] if storage.is_s3(root) else f"{contents[name]} {_ends(storage.join(root, name))}"
        yield Part(f"{video}.parquet", video, (name,), (), root, identity)


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
            told = json.dumps([(name, contents[name]) for name in some])
            video = directory or own
            identity = hashlib.sha256(told.encode()).hexdigest()
            yield Part(f"{video}.photographs-{number:05d}.parquet", video, some, images, root, identity)


def _check_names(parts: list[Part]) -> None:
    """Raise for names that cannot be written, and for two sources whose faces would be in one directory."""
    for part in parts:
        longest = max(part.images, key=len, default="000000000")
        for name in (*part.sources, f"{part.video}_1000/{longest}.jpg"):
            if not is_image_name(name):
                raise InputError(f"{name!a} has a name that is not printable or too long; rename it")
    videos = {part.video: part for part in reversed(parts)}
    for part in parts:
        other = videos[part.video]
        if other is not part and (other.is_video or part.is_video):
            raise _same(other, part, part.video)
        base = re.fullmatch(r"(.+)_([1-9]\d*)", part.video)
        if base and base[1] in videos:
            raise _same(videos[base[1]], part, part.video)


def _same(one: Part, other: Part, video: str) -> InputError:
    return InputError(
        f"faces of {one.sources[0]} and {other.sources[0]} would both lie in {video}, since further persons of a video "
        "get its name with _2, _3 ...; rename one of the two"
    )


def _ends(uri: str) -> str:
    with storage.local_path(uri).open("rb") as file:
        ends = file.read(ENDS_BYTES)
        file.seek(max(0, file.seek(0, 2) - ENDS_BYTES))
        return hashlib.sha256(ends + file.read()).hexdigest()[:32]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _suffix(name: str) -> str:
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" if "." in base else ""
