"""Decode JPEG bytes to uint8 pixels, strictly: a damaged, foreign or monstrous file is an error, never a guess."""

from __future__ import annotations

import numpy as np
import simplejpeg

MAX_IMAGE_BYTES = 32 << 20
MAX_SIDE = 4096  # pixels; a header that claims more is a picture bomb (decoded: over 48 MB)
# Every scan of a progressive JPEG passes over all pixels, at 0.5 ns each, and needs 30 bytes only: some megabytes could
# take hours. Usual are 10 scans. Counting takes a tenth of the decoding, so only what could take seconds is counted.
MAX_SCANS = 100
COUNTED_FROM = 10**11  # pixels x bytes: 2 s


class DecodeError(ValueError):
    """Bytes that are not a whole JPEG of sane size; the message says which."""


def decode(data: bytes | memoryview, size: int | None = None) -> np.ndarray:
    """Decode a JPEG to (H, W, 3) uint8 RGB, resized to (size, size) where a size is given.

    Raises `DecodeError` for bytes that are no JPEG, are truncated or damaged, claim more than 4096 pixels a side, or
    are more than 32 MiB or 100 scans.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DecodeError(f"{len(data)} bytes; at most {MAX_IMAGE_BYTES} are decoded")
    height, width = _read_header(data)
    _check_scans(data, height * width)
    size = size or 0
    pixels = _decode(data, out=None, least=size)
    return pixels if not size or (height, width) == (size, size) else resize(pixels, size)


def decode_into(data: bytes | memoryview, out: np.ndarray) -> None:
    """Decode a JPEG into `out`, (S, S, 3) uint8 and contiguous; no copy where the image has that size already.

    Raises `DecodeError` as `decode` does.
    """
    try:
        # Straight into place: looking at the header first would cost 2% of the decoding, and the usual image fits. One
        # that is too large is refused before it is decoded, one that is smaller comes back in another shape.
        is_cheap = len(data) * out.size <= 3 * COUNTED_FROM
        if is_cheap and simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape:
            return
    except ValueError:
        pass
    out[:] = decode(data, out.shape[0])  # resized, or the error in words


def check(data: bytes, scratch: np.ndarray) -> None:
    """Raise `DecodeError` unless `decode` would decode this. Pixels go to `scratch`, (n,) uint8, where they fit."""
    try:
        if len(data) * scratch.size <= 3 * COUNTED_FROM:
            simplejpeg.decode_jpeg(data, "RGB", buffer=scratch)
            return
    except ValueError:
        pass
    decode(data)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size), bilinear with antialiasing."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    image = from_numpy(pixels).permute(2, 0, 1)[None]  # a channels_last view: no copy
    scaled = interpolate(image, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _read_header(data: bytes | memoryview) -> tuple[int, int]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(f"not a JPEG image ({str(error).strip() or 'no header'})") from None
    if max(height, width) > MAX_SIDE:
        raise DecodeError(f"{width} x {height} pixels; at most {MAX_SIDE} a side are decoded")
    return height, width


def _check_scans(data: bytes | memoryview, pixels: int) -> None:
    if pixels * len(data) > COUNTED_FROM and (scans := bytes(data).count(b"\xff\xda")) > MAX_SCANS:
        raise DecodeError(f"JPEG of {scans} scans; at most {MAX_SCANS} are decoded")


def _decode(data: bytes | memoryview, *, out: np.ndarray | None, least: int) -> np.ndarray:
    # DCT scaling decodes a big picture at the smallest of its half, quarter and eighth that is not below `least`.
    try:
        return simplejpeg.decode_jpeg(data, "RGB", buffer=out, min_height=least, min_width=least, min_factor=1)
    except ValueError as error:
        raise DecodeError(f"damaged or truncated JPEG ({str(error).strip()})") from None
