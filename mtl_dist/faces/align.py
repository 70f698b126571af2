"""Cut faces out of pictures: aligned by five points, or their box with context; and what is told of how a face looks.

Coordinates are those of detectors: the middle of the first pixel is (0, 0).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 112
# Where ArcFace (J. Deng et al., CVPR 2019) has the five points in a picture of 112 x 112, and most aligned sets since.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
CONTEXT = 1.3  # sides of a crop, by the longer one of the box
NOSE_DEPTH = 0.5  # how far the tip of the nose is before the line of the eyes, by the distance of these
_LUMA = np.array([0.299, 0.587, 0.114])


def similarity(points: np.ndarray, template: np.ndarray = TEMPLATE) -> np.ndarray:
    """Return the (2, 3) matrix of turn, scale and shift that brings (n, 2) points nearest to those of a template.

    Nearest by squared distances (S. Umeyama, 1991): never mirrored. Raises `ValueError` where all points are one.
    """
    source, target = points[:, 0] + 1j * points[:, 1], template[:, 0] + 1j * template[:, 1]
    middle = source.mean()
    spread = float((abs(source - middle) ** 2).sum())
    if not spread > 0:
        raise ValueError(f"no face: all its points are at {points[0].tolist()}")
    turn = complex((np.conj(source - middle) * (target - target.mean())).sum() / spread)
    shift = target.mean() - turn * middle
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def align(picture: np.ndarray, points: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Cut a face out of (h, w, 3) uint8, its points on `TEMPLATE`: (size, size, 3), black beyond the edges."""
    by = size / SIZE
    enlarge = np.array([[by, 0, (by - 1) / 2], [0, by, (by - 1) / 2]])  # edges stay on edges, not middles of pixels
    return warp(picture, enlarge @ np.vstack([similarity(points), [0, 0, 1]]), size)


def warp(picture: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Return (size, size, 3) of a (h, w, 3) uint8 picture after a (2, 3) turn, scale and shift; black beyond its edges.

    What becomes smaller is shrunk by all of its pixels, not by some.
    """
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    # What is read, with two pixels around it for the filter.
    corners = back[:2] @ np.array([[-0.5, size - 0.5, -0.5, size - 0.5], [-0.5, -0.5, size - 0.5, size - 0.5], [1] * 4])
    left, top = (int(low) for low in np.floor(corners.min(1)) - 2)
    right, bottom = (int(high) for high in np.ceil(corners.max(1)) + 3)
    image = Image.fromarray(_window(picture, left, top, right, bottom))
    back[:2, 2] -= left, top
    by = math.hypot(back[0, 0], back[1, 0])
    if by > 1:
        shape = max(1, round(image.width / by)), max(1, round(image.height / by))
        factors = image.width / shape[0], image.height / shape[1]
        image = image.resize(shape, Image.Resampling.HAMMING)
        back = _resized(1 / factors[0], 1 / factors[1]) @ back
    # Pillow's coordinates begin at the edge of the first pixel.
    edges = _shift(0.5) @ back @ _shift(-0.5)
    cut = image.transform(
        (size, size), Image.Transform.AFFINE, edges[:2].ravel().tolist(), resample=Image.Resampling.BILINEAR
    )
    return np.asarray(cut)


def crop(picture: np.ndarray, box: np.ndarray, scale: float = CONTEXT, size: int | None = None) -> np.ndarray:
    """Cut the square around a box out of a (h, w, 3) uint8 picture, its side `scale` times the longer one of the box.

    (size, size, 3), or without a size as many pixels as there are; black beyond the edges.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    side = max(1, round(max(right - left, bottom - top) * scale))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    square = _window(picture, x, y, x + side, y + side)
    if size is None or size == side:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR))


def sharpness(aligned: np.ndarray) -> float:
    """Return the variance of the Laplacian of an aligned face's luma: near 0 where it is blurred, in grey levels²."""
    return float(ndimage.laplace(aligned.astype(np.float32) @ _LUMA.astype(np.float32)).var())


def yaw(points: np.ndarray) -> float:
    """Estimate by how many degrees a face is turned to the right of the picture, from (5, 2) points; left is negative.

    By how far the tip of the nose is from between the eyes, along their line, on a head of usual depth.
    """
    eyes = points[1].astype(float) - points[0]
    distance = float(eyes @ eyes)
    if distance == 0:  # one eye is behind the other
        return math.copysign(90.0, float(points[2, 0] - points[0, 0]))
    offset = float((points[2] - (points[0] + points[1]) / 2.0) @ eyes) / distance
    return math.degrees(math.atan(offset / NOSE_DEPTH))


def _window(picture: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return the pixels of a rectangle that may reach beyond the picture, or lie beside it; black there."""
    height, width = picture.shape[:2]
    pixels = np.zeros((bottom - top, right - left, 3), np.uint8)
    x, y, x_end, y_end = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x < x_end and y < y_end:
        pixels[y - top : y_end - top, x - left : x_end - left] = picture[y:y_end, x:x_end]
    return pixels


def _shift(by: float) -> np.ndarray:
    return np.array([[1, 0, by], [0, 1, by], [0, 0, 1]])


def _resized(x: float, y: float) -> np.ndarray:
    """Return the matrix of a resize: coordinates of middles of pixels, by what widths and heights are multiplied."""
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
