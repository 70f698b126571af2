"""The sidecar of a shard: where every member lies in the tar, its checksum, and the labels, as arrays.

A safetensors file (a JSON header, then plain arrays): readable from many languages, and nothing in it can run.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mtl_dist.tasks import NUM_AUS


class Sidecar(NamedTuple):
    """n samples of one shard, in tar order."""

    row: np.ndarray  # (n,) int64 row number in the annotation file
    offset: np.ndarray  # (n,) int64 first byte of the image in the tar
    length: np.ndarray  # (n,) int64 bytes of the image
    crc32: np.ndarray  # (n,) uint32 of the image's bytes
    image: np.ndarray  # (n, w) uint8: "video/frame.jpg" in UTF-8, padded with zeros
    va: np.ndarray  # (n, 2) float32
    expr: np.ndarray  # (n,) uint8
    au: np.ndarray  # (n, 12) uint8
    va_mask: np.ndarray  # (n,) uint8
    expr_mask: np.ndarray  # (n,) uint8
    au_mask: np.ndarray  # (n, 12) uint8

    def image_names(self) -> list[str]:
        return [bytes(name).rstrip(b"\0").decode() for name in self.image]


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
}
_WIDTHS = {"va": 2, "au": NUM_AUS, "au_mask": NUM_AUS}


def dump_sidecar(sidecar: Sidecar, about: dict) -> bytes:
    """Serialise; `about` (plan, tar size and checksum) goes into the header. Equal input gives equal bytes."""
    arrays = {name: np.ascontiguousarray(array, _DTYPES[name]) for name, array in sidecar._asdict().items()}
    _, body = _split_header(save(arrays))
    return save(arrays, metadata={"about": json.dumps({**about, "sha256": _digest(about, body)}, sort_keys=True)})


def parse_sidecar(data: bytes) -> Sidecar:
    """Parse and check names, types and shapes. Raises ValueError with the reason."""
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from None
    if set(arrays) != set(_DTYPES):
        raise ValueError(f"holds the arrays {sorted(arrays)}; expected {sorted(_DTYPES)}")
    rows = len(arrays["row"])
    for name, array in arrays.items():
        shape = (rows, array.shape[-1]) if name == "image" else (rows, _WIDTHS[name]) if name in _WIDTHS else (rows,)
        if array.dtype != _DTYPES[name] or array.shape != shape:
            raise ValueError(f"array '{name}' is {array.dtype} {array.shape}; expected {_DTYPES[name]} {shape}")
    return Sidecar(**arrays)


def read_about(data: bytes) -> dict:
    """Return what the header says about plan and tar. Raises ValueError for a foreign or damaged file."""
    header, body = _split_header(data)
    about = json.loads(json.loads(header)["__metadata__"]["about"])
    if about.pop("sha256", None) != _digest(about, body):
        raise ValueError("it does not match the checksum in its header")
    return about


def _split_header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _digest(about: dict, body: bytes) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + body).hexdigest()
