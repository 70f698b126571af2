"""Decode pictures to uint8 pixels, strictly: a damaged, foreign or monstrous file is an error, never a guess.

Shards hold JPEG, which `decode` reads. People's pictures may be of other kinds, transparent, or stored on their side.
`decode_picture` shows them on `BACKGROUND`, turned as their EXIF says. `as_jpeg` turns them into what a shard holds.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import simplejpeg

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_BYTES = 32 << 20
MAX_SIDE = 4096  # pixels; a header that claims more is a picture bomb (decoded: over 48 MB)
MAX_SCENE_SIDE = 12288  # of a photograph that faces are cut out of: telephones write 108 megapixels (decoded: 324 MB)
# Every scan of a progressive JPEG passes over all pixels, at 0.5 ns each, and needs 30 bytes only: some megabytes could
# take hours. Usual are 10 scans. Counting takes a tenth of the decoding, so only what could take seconds is counted.
MAX_SCANS = 100
COUNTED_FROM = 10**11  # pixels x bytes: 2 s
JPEG_QUALITY = 95  # of pictures that are none yet, or are turned; colours are kept at full resolution (4:4:4)
BACKGROUND = (0, 0, 0)  # black, as what face cutters leave around a face; colours below alpha 0 are arbitrary

# By their first bytes; . is any.
READ_BY_PILLOW = {b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF....WEBP": "WEBP", b"BM": "BMP", b"GIF8": "GIF",
                  b"II*\0": "TIFF", b"MM\0*": "TIFF"}  # fmt: skip
NOT_READ = {b"....ftypheic": "HEIC", b"....ftypmif1": "HEIC", b"....ftypavif": "AVIF",
            b"\0\0\0\x0cjP  ": "JPEG 2000", b"\0\0\0\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL"}  # fmt: skip
KINDS = "JPEG, PNG, WEBP, BMP, GIF or TIFF"  # what is read
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of Pillow: 8 bits a channel

Exif = Literal["apply", "ignore"]  # the orientation that EXIF tells: a switch of `create` and `predict`
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
# What turns stored pixels upright, by EXIF orientation: swap the axes, then mirror left and right, and up and down.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class DecodeError(ValueError):
    """Bytes that are not a whole picture of sane size; the message says which."""


class ForeignPicture(DecodeError):
    """A picture that may well be whole, of a kind or size that is not decoded."""


def decode(data: bytes | memoryview, size: int | None = None, *, max_side: int = MAX_SIDE) -> np.ndarray:
    """Decode a JPEG to (H, W, 3) uint8 RGB, resized to (size, size) where a size is given.

    Raises `DecodeError` for bytes that are no JPEG, are truncated or damaged, claim more than `max_side` pixels a side,
    or are more than 32 MiB or 100 scans.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ForeignPicture(f"{len(data)} bytes; at most {MAX_IMAGE_BYTES} are decoded")
    height, width = _read_header(data, max_side)
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


class Picture(NamedTuple):
    """A decoded picture, and what its file says of it."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    width: int  # as stored: not turned, not resized
    height: int
    orientation: int  # EXIF's, 1 (stored upright, or nothing said) to 8


def decode_picture(data: bytes, size: int | None = None, *, exif: Exif = "apply", max_side: int = MAX_SIDE) -> Picture:
    """Decode a picture of `KINDS` as `decode` does, upright by its EXIF: for `create` and `predict`.

    Raises `ForeignPicture` for other kinds and for more pixels or bytes than are decoded, else `DecodeError`.
    """
    if _is_jpeg(data):
        pixels, orientation = decode(data, size, max_side=max_side), _jpeg_orientation(data)
        height, width = _read_header(data, max_side)
    else:
        pixels, orientation = _decode_by_pillow(data, max_side)
        height, width = pixels.shape[:2]
        if size and (height, width) != (size, size):
            pixels = resize(pixels, size)
    if exif == "apply" and orientation != 1:
        pixels = np.ascontiguousarray(turn(pixels, *_TURNS[orientation]))
    return Picture(pixels, width, height, orientation)


class StoredPicture(NamedTuple):
    """What a shard holds of a picture."""

    jpeg: bytes
    orientation: int  # EXIF's, of the source


def read_file(path: str | Path) -> bytes:
    """Read a picture's file; of one that is too large to be decoded no more than shows that."""
    with open(path, "rb", buffering=0) as file:
        # Asked for the most there may be, read would make room for all of that every time.
        return file.read(min(os.fstat(file.fileno()).st_size, MAX_IMAGE_BYTES) + 1)


def as_jpeg(data: bytes, scratch: np.ndarray, *, exif: Exif = "apply") -> StoredPicture:
    """Return what a shard holds of a picture: a JPEG that is upright as it is, once checked; else its pixels as JPEG.

    Equal pictures give equal bytes. `scratch` is that of `check`. Raises as `decode_picture` does.
    """
    if _is_jpeg(data):
        orientation = _jpeg_orientation(data)
        if orientation == 1 or exif == "ignore":
            check(data, scratch)
            return StoredPicture(data, orientation)
    picture = decode_picture(data, exif=exif)
    jpeg = simplejpeg.encode_jpeg(picture.pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    if len(jpeg) > MAX_IMAGE_BYTES:
        raise ForeignPicture(f"{len(jpeg)} bytes as JPEG; at most {MAX_IMAGE_BYTES} are stored")
    return StoredPicture(jpeg, picture.orientation)


def lies_for_earlier_versions(data: bytes) -> bool:
    """Whether a picture is not stored upright and `as_jpeg` left it so before it read EXIF; Pillow turned TIFF then."""
    if _is_jpeg(data):
        return _jpeg_orientation(data) != 1
    kind = _kind(data, READ_BY_PILLOW)
    return kind not in (None, "TIFF") and _read_orientation(data, kind) != 1


def turn(pixels: np.ndarray, swap: bool, mirror_x: bool, mirror_y: bool) -> np.ndarray:
    """Return a view of (H, W, ...) pixels: axes swapped, then mirrored left and right, and up and down."""
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


def _turn_back(pixels: np.ndarray, swap: bool, mirror_x: bool, mirror_y: bool) -> np.ndarray:
    return turn(turn(pixels, False, mirror_x, mirror_y), swap, False, False)


def flatten(pixels: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) uint8 RGBA, colours not multiplied by alpha, on `BACKGROUND`: (H, W, 3)."""
    colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    background = np.array(BACKGROUND, np.uint16)
    return ((colours * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def from_pillow(image: Image.Image, size: int | None = None) -> np.ndarray:
    """Return what `decode_picture` would make of the file of an image of Pillow's, of one of `MODES`."""
    image.load()  # which turns a TIFF
    pixels = as_pixels(image)
    if size and pixels.shape[:2] != (size, size):
        pixels = resize(pixels, size)
    return np.ascontiguousarray(turn(pixels, *_TURNS[_orientation(image)]))


def as_pixels(image: Image.Image) -> np.ndarray:
    """Return a picture of Pillow's, of one of `MODES`, as (H, W, 3) uint8 RGB: as it is stored, on `BACKGROUND`."""
    if image.has_transparency_data:
        return flatten(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def check(data: bytes, scratch: np.ndarray) -> None:
    """Raise `DecodeError` unless `decode` would decode this. Pixels go to `scratch`, (n,) uint8, where they fit."""
    try:
        if len(data) * scratch.size <= 3 * COUNTED_FROM:
            simplejpeg.decode_jpeg(data, "RGB", buffer=scratch)
            return
    except ValueError:
        pass
    decode(data)


def resize(pixels: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size), or to a given height and width, bilinear with antialiasing."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    image = from_numpy(pixels).permute(2, 0, 1)[None]  # a channels_last view: no copy
    sides = (size, size) if isinstance(size, int) else size
    scaled = interpolate(image, size=sides, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _read_header(data: bytes | memoryview, max_side: int) -> tuple[int, int]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(f"not a JPEG image ({str(error).strip() or 'no header'})") from None
    if max(height, width) > max_side:
        raise ForeignPicture(f"{width} x {height} pixels; at most {max_side} a side are decoded")
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


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _kind(data: bytes, kinds: dict[bytes, str]) -> str | None:
    found = (name for magic, name in kinds.items() if all(m in (b, 0x2E) for m, b in zip(magic, data, strict=False)))
    return next(found, None) if len(data) >= 16 else None


def _jpeg_orientation(data: bytes) -> int:
    return 1 if _EXIF not in data else _read_orientation(data, "JPEG")  # 0.1 us where Pillow takes 100


def _read_orientation(data: bytes, kind: str) -> int:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            return _orientation(image)
    except Exception:  # whatever Pillow makes of what can be read
        return 1


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1


def _decode_by_pillow(data: bytes, max_side: int) -> tuple[np.ndarray, int]:
    """Decode a picture that is no JPEG to (H, W, 3) uint8 RGB as it is stored; and its EXIF orientation."""
    from PIL import Image, UnidentifiedImageError

    kind = _kind(data, READ_BY_PILLOW)
    if kind is None:
        if foreign := _kind(data, NOT_READ):
            raise ForeignPicture(f"a {foreign}, which is not read; convert it to PNG")
        raise DecodeError(f"no picture (it begins with {bytes(data[:16])!r})")
    if len(data) > MAX_IMAGE_BYTES:
        raise ForeignPicture(f"{len(data)} bytes; at most {MAX_IMAGE_BYTES} are decoded")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            if max(image.size) > max_side:
                raise ForeignPicture(f"{image.width} x {image.height} pixels; at most {max_side} a side are decoded")
            if image.mode not in MODES:
                raise ForeignPicture(f"{kind} of mode {image.mode}; expected 8 bits a channel")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ForeignPicture(f"{kind} of {frames} moving pictures; expected one that stands still")
            orientation = _orientation(image)
            pixels = as_pixels(image)
            if kind == "TIFF" and orientation != 1:  # which Pillow turns itself
                pixels = np.ascontiguousarray(_turn_back(pixels, *_TURNS[orientation]))
            return pixels, orientation
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise ForeignPicture(f"too many pixels ({error})") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged bytes, and lists none
        what = "its header" if isinstance(error, UnidentifiedImageError) else error  # whose text is an address
        raise DecodeError(f"damaged or truncated {kind} ({what})") from None
