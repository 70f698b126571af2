"""What a detector finds, and what all of them do with a picture before they search it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mtl_dist.errors import InputError

MOST_OVERLAP = 0.4  # of two boxes, else they are of one face: intersection by union


class Face(NamedTuple):
    """A face that was found."""

    box: np.ndarray  # (4,) float32: left, top, right, bottom in pixels of the picture as shown
    # (5, 2) float32: x, y of the eyes, the tip of the nose and the corners of the mouth; of two the one at the left of
    # an upright picture first, which is the person's right.
    points: np.ndarray
    confidence: float  # 0 to 1


class Detector(Protocol):
    """Finds the faces of a picture. One detector may be used by several threads."""

    name: str  # what tables and notes call it

    def __call__(self, picture: np.ndarray) -> list[Face]:
        """Find the faces of a (h, w, 3) uint8 RGB picture, the most confident first."""


def check_picture(picture: np.ndarray) -> None:
    """Raise `InputError` for what is no (h, w, 3) uint8 picture with a pixel in it."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        found = f"{'x'.join(map(str, picture.shape))} {picture.dtype}"
        raise InputError(f"faces are searched in RGB pictures, (height, width, 3) of uint8; found {found}")


def fit(picture: np.ndarray, max_side: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the picture with no side longer than `max_side`, and what to multiply x and y by to come back."""
    height, width = picture.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return picture, (1.0, 1.0)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small), (width / size[0], height / size[1])


def overlapping(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Whether each of some boxes (..., 4) is of the same face as one (4,)."""
    inner = _areas(np.maximum(boxes[..., :2], box[:2]), np.minimum(boxes[..., 2:], box[2:]))
    union = _areas(boxes[..., :2], boxes[..., 2:]) + _areas(box[:2], box[2:]) - inner
    return inner > MOST_OVERLAP * union


def _areas(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    return np.maximum(last - first, 0).prod(-1)


def scaled(faces: Iterable[Face], by: tuple[float, float]) -> list[Face]:
    """Return the faces with every x and y multiplied by two factors."""
    factors = np.array(by, np.float32)
    return [Face(face.box * np.tile(factors, 2), face.points * factors, face.confidence) for face in faces]
