"""The two views of a face: what `prepare` writes of it, and models are trained on, is what `predict` cuts for them."""

from __future__ import annotations

import numpy as np

from mtl_dist.errors import InputError
from mtl_dist.faces.align import CONTEXT, crop
from mtl_dist.faces.finding import FoundFace

MOST_SIDE = 256  # pixels of a picture of `cropped`
LEAST_FACE = 16  # pixels of the longer side of a box: smaller ones are hardly a face, and show nothing


def cut_view(picture: np.ndarray, found: FoundFace, view: str, *, most_side: int = MOST_SIDE) -> np.ndarray:
    """Return a face of a (h, w, 3) uint8 picture in a view: `cropped`, its box with context, at most so many pixels a
    side and none enlarged; or `cropped_aligned`, (112, 112, 3). Raises `InputError` for another view.
    """
    if view == "cropped_aligned":
        return found.aligned
    if view != "cropped":
        raise InputError(f"faces are cut out as cropped and cropped_aligned, not as '{view}'")
    is_small = round(longer_side(found) * CONTEXT) <= most_side
    return crop(picture, found.face.box, size=None if is_small else most_side)


def longer_side(found: FoundFace) -> float:
    """Return how many pixels the longer side of a face's box has."""
    left, top, right, bottom = found.face.box
    return float(max(right - left, bottom - top))
