"""Pictures that a Python program has: arrays, images of Pillow, paths. Checked, and read as `predict` reads files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mtl_dist.data.decode import MAX_SIDE, MODES, from_pillow, resize
from mtl_dist.data.frames import read_picture
from mtl_dist.errors import InputError

Picture = np.ndarray | Image.Image | str | os.PathLike
Pictures = Picture | Sequence[Picture]

EXPECTED = (
    "expected RGB pictures: arrays (height, width, 3) or (n, height, width, 3) of uint8, images of Pillow, paths, or a "
    "list of these"
)


def list_pictures(given: Pictures) -> list[Picture]:
    """Return one or several pictures as a list, checked but for files, which are read later. Raises `InputError`."""
    if isinstance(given, np.ndarray):
        _check_array(given, "the array", shapes=(3, 4))
        return list(given) if given.ndim == 4 else [given]
    if _is_file(given) or _is_image(given):
        return [_checked(given, "the picture")]
    if not isinstance(given, Sequence):
        raise InputError(f"what was given is {_named(given)}; {EXPECTED}")
    if not given:
        raise InputError(f"there are no pictures: the list is empty; {EXPECTED}")
    return [_checked(picture, f"picture {number} of the list") for number, picture in enumerate(given)]


def read_pixels(picture: Picture, size: int | None = None, *, max_side: int = MAX_SIDE) -> np.ndarray:
    """Return a picture of `list_pictures` as (H, W, 3) uint8 RGB, upright by its EXIF; resized to a `size`.

    A file is decoded as `predict` decodes it, a large JPEG at a smaller scale: an array of its pixels may differ by
    some grey levels. Raises `InputError` naming a file that cannot be read.
    """
    if _is_file(picture):
        if os.path.isdir(picture):
            raise InputError(f"{os.fspath(picture)} is a directory; give the paths of its pictures")
        return read_picture(os.fspath(picture), size, max_side=max_side).pixels
    if not isinstance(picture, np.ndarray):
        return from_pillow(picture, size)
    if size is None or picture.shape[:2] == (size, size):
        return picture
    return resize(np.require(picture, requirements=["C", "W"]), size)  # as torch wants it


def _checked(picture: Picture, what: str) -> Picture:
    if isinstance(picture, np.ndarray):
        _check_array(picture, what, shapes=(3,))
    elif _is_image(picture):
        if picture.mode not in MODES:
            raise InputError(
                f"{what} is an image of Pillow's mode {picture.mode}; expected 8 bits a channel: convert('RGB')"
            )
        if 0 in picture.size:
            raise InputError(f"{what} is an image without a pixel")
    elif not _is_file(picture):
        raise InputError(f"{what} is {_named(picture)}; {EXPECTED}")
    return picture


def _check_array(array: np.ndarray, what: str, *, shapes: tuple[int, ...]) -> None:
    """Raise `InputError` unless it is RGB as uint8; what is nearly so is told what to do."""
    found = f"{what} is {array.dtype} of shape {array.shape}"
    if array.ndim in shapes and array.shape[-1] != 3 and array.shape[-3] == 3:
        raise InputError(f"{found}, its channels before height and width; {EXPECTED}: np.moveaxis(array, -3, -1)")
    if array.ndim == 2 or (array.ndim in shapes and array.shape[-1] == 1):
        raise InputError(f"{found}, in shades of grey; {EXPECTED}: np.repeat(grey[..., None], 3, axis=-1)")
    if array.ndim not in shapes or array.shape[-1] != 3:
        raise InputError(f"{found}; {EXPECTED}")
    if array.dtype != np.uint8:
        raise InputError(f"{found}; expected uint8, 0 to 255: of numbers from 0 to 1 (array * 255).astype(np.uint8)")
    if 0 in array.shape:
        raise InputError(f"{found}, without a pixel; {EXPECTED}")


def _is_file(picture: object) -> bool:
    return isinstance(picture, (str, os.PathLike))


def _is_image(picture: object) -> bool:
    return isinstance(picture, Image.Image)


def _named(thing: object) -> str:
    return f"of type {type(thing).__module__}.{type(thing).__qualname__}"
