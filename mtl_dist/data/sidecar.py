"""The sidecar of a shard: where every member lies in the tar, its checksum, and the labels, as arrays.

A safetensors file (a JSON header, then plain arrays): readable from many languages, and nothing in it can run.

A sidecar may come from anywhere, with a checksum that is right. What is parsed has labels in their range, names that
stay below a directory, and places that lie in its tar (`check_places`): readers need not look again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mtl_dist.data.decode import MAX_IMAGE_BYTES
from mtl_dist.data.names import MAX_NAME_BYTES, find_bad_name
from mtl_dist.errors import Damaged
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS

MAX_ROW = 10**9 - 1  # nine digits name its members


class Sidecar(NamedTuple):
    """n samples of one shard, in tar order."""

    row: np.ndarray  # (n,) int64 row number in the annotation file or table
    offset: np.ndarray  # (n,) int64 first byte of the image in the tar
    length: np.ndarray  # (n,) int64 bytes of the image
    crc32: np.ndarray  # (n,) uint32 of the image's bytes
    image: np.ndarray  # (n, w) uint8: its name, such as "video/frame.jpg", in UTF-8, padded with zeros
    va: np.ndarray  # (n, 2) float32
    expr: np.ndarray  # (n,) uint8
    au: np.ndarray  # (n, 12) uint8
    va_mask: np.ndarray  # (n,) uint8
    expr_mask: np.ndarray  # (n,) uint8
    au_mask: np.ndarray  # (n, 12) uint8
    video: np.ndarray | None = None  # (n, w) uint8: the name of its video, as `image`; None: that is its directory

    def image_names(self) -> list[str]:
        """Unpack the names of the images, one a sample."""
        return unpack_names(self.image)

    def video_names(self) -> list[str] | None:
        """Unpack the names of the videos, one a sample. None: a video is named by its image's directory."""
        return None if self.video is None else unpack_names(self.video)


class FeatureSidecar(NamedTuple):
    """n rows of one shard of features, video by video, in tar order; v videos."""

    row: np.ndarray  # (n,) int64 row number in the annotation file or table
    frame: np.ndarray  # (n,) int64 number of the frame in its video
    image: np.ndarray  # (n, w) uint8: the name of its picture, as in `Sidecar`
    length: np.ndarray  # (n,) int64 bytes of its picture
    crc32: np.ndarray  # (n,) uint32 of its picture's bytes
    va: np.ndarray  # (n, 2) float32, and so on, as in `Sidecar`
    expr: np.ndarray
    au: np.ndarray
    va_mask: np.ndarray
    expr_mask: np.ndarray
    au_mask: np.ndarray
    video: np.ndarray  # (v, w) uint8: the names of the videos
    num_rows: np.ndarray  # (v,) int64 rows of every video
    begin: np.ndarray  # (v,) int64 first byte of its features in the tar: (rows, D) float16, one row after another
    checksum: np.ndarray  # (v,) uint32 CRC-32 of these bytes

    def image_names(self) -> list[str]:
        """Unpack the names of the pictures, one a row."""
        return unpack_names(self.image)

    def video_names(self) -> list[str]:
        """Unpack the names of the videos, one a video. Raises `Damaged`."""
        try:
            return unpack_names(self.video)
        except UnicodeDecodeError as error:
            raise Damaged(str(error)) from None


def pack_names(names: list[str]) -> np.ndarray:
    """Return names (n) as (n, w) uint8: UTF-8, padded with zeros."""
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded))
    return np.frombuffer(b"".join(name.ljust(width, b"\0") for name in encoded), np.uint8).reshape(-1, width)


def unpack_names(packed: np.ndarray) -> list[str]:
    """The inverse of `pack_names`. Raises UnicodeDecodeError."""
    return [bytes(name).rstrip(b"\0").decode() for name in packed]


_DTYPES = {
    "row": "int64",
    "offset": "int64",
    "length": "int64",
    "crc32": "uint32",
    "image": "uint8",
    "va": "float32",
    "expr": "uint8",
    "au": "uint8",
    "va_mask": "uint8",
    "expr_mask": "uint8",
    "au_mask": "uint8",
    "video": "uint8",
}
_OPTIONAL = {"video"}
_OF_VIDEOS = {"video", "num_rows", "begin", "checksum"}
_FEATURE_DTYPES = {name: dtype for name, dtype in _DTYPES.items() if name != "offset"} | {
    "frame": "int64",
    "num_rows": "int64",
    "begin": "int64",
    "checksum": "uint32",
}
_NAMES = ("image", "video")
_WIDTHS = {"va": 2, "au": NUM_AUS, "au_mask": NUM_AUS}
_LARGEST = {"expr": NUM_EXPRESSIONS - 1, "au": 1, "va_mask": 1, "expr_mask": 1, "au_mask": 1}


def dump_sidecar(sidecar: Sidecar | FeatureSidecar, about: dict) -> bytes:
    """Serialise; `about` (plan, tar size and checksum) goes into the header. Equal input gives equal bytes."""
    dtypes = _DTYPES if isinstance(sidecar, Sidecar) else _FEATURE_DTYPES
    there = {name: array for name, array in sidecar._asdict().items() if array is not None}
    arrays = {name: np.ascontiguousarray(array, dtypes[name]) for name, array in there.items()}
    _, body = _split_header(save(arrays))
    return save(arrays, metadata={"about": json.dumps({**about, "sha256": _digest(about, body)}, sort_keys=True)})


def parse_sidecar(data: bytes) -> Sidecar:
    """Parse and check names, types, shapes and values. Raises `Damaged` with the reason."""
    sidecar = Sidecar(**_load(data, _DTYPES, optional=_OPTIONAL))
    _check_values(sidecar)
    return sidecar


def parse_feature_sidecar(data: bytes) -> FeatureSidecar:
    """As `parse_sidecar`, of features."""
    sidecar = FeatureSidecar(**_load(data, _FEATURE_DTYPES, of_videos=_OF_VIDEOS))
    if sidecar.num_rows.min(initial=1) < 1 or sidecar.num_rows.sum() != len(sidecar.row):
        raise Damaged(f"its videos have {sidecar.num_rows.sum()} rows; it has {len(sidecar.row)}")
    names = sidecar.video_names()
    rows_of = Sidecar(
        **{name: getattr(sidecar, name) for name in set(_DTYPES) & set(_FEATURE_DTYPES) - {"video"}},
        offset=np.zeros(len(sidecar.row), np.int64),
        video=pack_names(names)[np.repeat(np.arange(len(names)), sidecar.num_rows)] if names else None,
    )
    _check_values(rows_of)
    return sidecar


def _load(
    data: bytes, dtypes: dict[str, str], *, optional: Set[str] = frozenset(), of_videos: Set[str] = frozenset()
) -> dict[str, np.ndarray]:
    """Return the arrays of a sidecar, with names, types and shapes as they should be."""
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the latter of types that numpy lacks
        raise Damaged(f"not a safetensors file of arrays ({error})") from None
    if set(arrays) | optional != set(dtypes):
        raise Damaged(f"holds the arrays {sorted(arrays)[:20]}; expected {sorted(dtypes)}")
    for name, array in arrays.items():
        rows = arrays["num_rows" if name in of_videos else "row"].size
        width = array.shape[-1:] if name in _NAMES else tuple(filter(None, [_WIDTHS.get(name)]))
        if array.dtype != dtypes[name] or array.shape != (rows, *width):
            raise Damaged(f"array '{name}' is {array.dtype} {array.shape}; expected {dtypes[name]} {rows, *width}")
    return arrays


def check_places(sidecar: Sidecar, *, rows: int, tar_bytes: int) -> None:
    """Raise `Damaged` unless the sidecar has so many rows and its images lie in such a tar, one behind the other."""
    if len(sidecar.row) != rows:
        raise Damaged(f"{len(sidecar.row)} rows; the index says {rows}")
    begin, length = sidecar.offset, sidecar.length
    if length.min() < 1 or length.max() > MAX_IMAGE_BYTES:
        raise Damaged(f"images of {length.min()} to {length.max()} bytes; expected 1 to {MAX_IMAGE_BYTES}")
    if begin.min() < 0 or begin.max() > tar_bytes:  # before sums: they could overflow
        raise Damaged(f"images at {begin.min()} to {begin.max()}; the tar has {tar_bytes} bytes")
    if (begin[1:] < begin[:-1] + length[:-1]).any() or begin[-1] + length[-1] > tar_bytes:
        raise Damaged(f"images that overlap, are not in tar order, or end beyond the tar's {tar_bytes} bytes")


def check_feature_places(sidecar: FeatureSidecar, *, videos: list[int], width: int, tar_bytes: int) -> None:
    """Raise `Damaged` unless the sidecar has these videos, and their features of `width` numbers lie in such a tar."""
    if sidecar.num_rows.tolist() != videos:
        raise Damaged(f"{len(sidecar.num_rows)} videos of {len(sidecar.row)} rows; the index says other ones")
    begin, size = sidecar.begin, sidecar.num_rows * (2 * width)
    if begin.min() < 0 or begin.max() > tar_bytes or (begin + size).max() > tar_bytes:
        raise Damaged(f"features at {begin.min()} to {(begin + size).max()}; the tar has {tar_bytes} bytes")
    if (begin[1:] < begin[:-1] + size[:-1]).any():
        raise Damaged("features that overlap, or are not in tar order")


def _check_values(sidecar: Sidecar) -> None:
    if not len(sidecar.row) or not sidecar.image.shape[1]:
        raise Damaged("holds no rows or no names")
    if sidecar.row.min() < 0 or sidecar.row.max() > MAX_ROW or len(np.unique(sidecar.row)) < len(sidecar.row):
        raise Damaged(f"row numbers are not 0 to {MAX_ROW}, each once")
    if not (np.abs(sidecar.va) <= 1).all():
        raise Damaged("valence or arousal is not in [-1, 1]")
    for name, largest in _LARGEST.items():
        if (found := getattr(sidecar, name).max()) > largest:
            raise Damaged(f"array '{name}' holds {found}; expected 0 to {largest}")
    for kind in _NAMES:
        packed = getattr(sidecar, kind)
        if packed is not None and packed.shape[1] > MAX_NAME_BYTES:
            raise Damaged(f"{kind} names of {packed.shape[1]} bytes; at most {MAX_NAME_BYTES} are read")
    try:
        names, videos = sidecar.image_names(), sidecar.video_names()
    except UnicodeDecodeError as error:
        raise Damaged(str(error)) from None
    if (place := find_bad_name(pa.array(names))) is not None:
        raise Damaged(f"row {sidecar.row[place]} has the image name {names[place]!r}; expected a relative path")
    for row, video in zip(sidecar.row, videos or ()):
        if not video or not video.isprintable():
            raise Damaged(f"row {row} has the video name {video!r}; expected printable text")


def read_about(data: bytes) -> dict:
    """Return what the header says about plan and tar. Raises `Damaged` for a foreign or damaged file."""
    header, body = _split_header(data)
    try:
        about = dict(json.loads(json.loads(header)["__metadata__"]["about"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"its header does not say what it is ({error})") from None
    if about.pop("sha256", None) != _digest(about, body):
        raise Damaged("it does not match the checksum in its header")
    return about


def _split_header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _digest(about: dict, body: bytes) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode() + body).hexdigest()
