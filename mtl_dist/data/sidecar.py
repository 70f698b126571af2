"""The sidecar of a shard: where every member lies in the tar, its checksum, and the labels, as arrays.

A safetensors file (a JSON header, then plain arrays): readable from many languages, and nothing in it can run.

A sidecar may come from anywhere, with a checksum that is right. What is parsed has labels in their range, names that
stay below a directory, and places that lie in its tar (`check_places`): readers need not look again.
"""

from __future__ import annotations

import hashlib
import json
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
_NAMES = ("image", "video")
_WIDTHS = {"va": 2, "au": NUM_AUS, "au_mask": NUM_AUS}
_LARGEST = {"expr": NUM_EXPRESSIONS - 1, "au": 1, "va_mask": 1, "expr_mask": 1, "au_mask": 1}


def dump_sidecar(sidecar: Sidecar, about: dict) -> bytes:
    """Serialise; `about` (plan, tar size and checksum) goes into the header. Equal input gives equal bytes."""
    there = {name: array for name, array in sidecar._asdict().items() if array is not None}
    arrays = {name: np.ascontiguousarray(array, _DTYPES[name]) for name, array in there.items()}
    _, body = _split_header(save(arrays))
    return save(arrays, metadata={"about": json.dumps({**about, "sha256": _digest(about, body)}, sort_keys=True)})


def parse_sidecar(data: bytes) -> Sidecar:
    """Parse and check names, types, shapes and values. Raises `Damaged` with the reason."""
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the latter of types that numpy lacks
        raise Damaged(f"not a safetensors file of arrays ({error})") from None
    if set(arrays) | _OPTIONAL != set(_DTYPES):
        raise Damaged(f"holds the arrays {sorted(arrays)[:20]}; expected {sorted(_DTYPES)}")
    rows = arrays["row"].size
    for name, array in arrays.items():
        width = array.shape[-1:] if name in _NAMES else tuple(filter(None, [_WIDTHS.get(name)]))
        if array.dtype != _DTYPES[name] or array.shape != (rows, *width):
            raise Damaged(f"array '{name}' is {array.dtype} {array.shape}; expected {_DTYPES[name]} {rows, *width}")
    sidecar = Sidecar(**arrays)
    _check_values(sidecar)
    return sidecar


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
