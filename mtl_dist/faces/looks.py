"""Look again at what may be a face, upright and as large as the detector likes it.

YuNet's points lag behind a turn of the head in the picture (8 px at 112 for 25 degrees), and they depend on the size of
the face and on where it lies on the network's grid. So the face is cut out by these points, turned upright, and
searched for again in the small cut: twice by itself, then in four views, shifted, scaled and mirrored, whose points are
averaged. What was no face hardly ever looks like one again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from mtl_dist.faces.align import SIZE as TEMPLATE_SIZE
from mtl_dist.faces.align import similarity, warp
from mtl_dist.faces.face import Face, overlapping

SIDE = 96  # of the cut, in pixels
FILLED = 0.75  # of it, by the square of the template
_OTHER_SIDE = [1, 0, 2, 4, 3]  # the points of a mirrored face


class View(NamedTuple):
    """How a face is shown."""

    x: float = 0.0  # pixels of the cut beside its middle
    y: float = 0.0
    scale: float = 1.0
    is_mirrored: bool = False


LOOKS = (
    (View(),),
    (View(),),
    (View(scale=0.95), View(scale=1.05, is_mirrored=True), View(4, 4, 1.05), View(4, -4, 0.95, is_mirrored=True)),
)


def look_again(
    detect: Callable[[np.ndarray], list[Face]], picture: np.ndarray, candidates: Iterable[Face], min_confidence: float
) -> list[Face]:
    """Return the candidates of a (h, w, 3) picture that are faces again, each once, the most confident first.

    `detect` finds faces in (SIDE, SIDE, 3). A face's points and confidence are those of the last look; its box is
    upright about the same middle as that of the turned face, and as large.
    """
    faces: list[Face] = []
    for candidate in candidates:  # the surest first: what overlaps with a face that stands is part of it
        if not _is_new(candidate, faces):
            continue
        face = _confirm(detect, picture, candidate, min_confidence)
        if face is not None and _is_new(face, faces):
            faces.append(face)
    return sorted(faces, key=lambda face: -face.confidence)


def _confirm(
    detect: Callable[[np.ndarray], list[Face]], picture: np.ndarray, face: Face, min_confidence: float
) -> Face | None:
    for views in LOOKS:
        seen = [each for each in (_look(detect, picture, face, view) for view in views) if each is not None]
        confidence = sum(each.confidence for each in seen) / len(views)  # a view without a face counts as 0
        if confidence < min_confidence:
            return None
        face = Face(
            np.mean([each.box for each in seen], 0), np.mean([each.points for each in seen], 0), float(confidence)
        )
    return face


def _look(detect: Callable[[np.ndarray], list[Face]], picture: np.ndarray, face: Face, view: View) -> Face | None:
    """Find the face in one view of it: what is found about its middle, in coordinates of the picture."""
    if not np.ptp(face.points, axis=0).any():
        return None
    middle = (SIDE - 1) / 2
    scale = view.scale * FILLED * SIDE / TEMPLATE_SIZE
    shift = middle + np.array([view.x, view.y]) - scale * (TEMPLATE_SIZE - 1) / 2
    there = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    to_cut = there @ np.vstack([similarity(face.points), [0, 0, 1]])
    cut = warp(picture, to_cut, SIDE)
    if view.is_mirrored:
        cut = np.ascontiguousarray(cut[:, ::-1])
    found = [each for each in detect(cut) if (abs(_middle(each.box) - middle) < SIDE / 4).all()]
    if not found:
        return None
    best = max(found, key=lambda each: each.confidence)
    points, centre = best.points.astype(np.float64), _middle(best.box).astype(np.float64)
    if view.is_mirrored:
        points[:, 0], centre[0] = SIDE - 1 - points[:, 0], SIDE - 1 - centre[0]
        points = points[_OTHER_SIDE]
    back = np.linalg.inv(np.vstack([to_cut, [0, 0, 1]]))
    points, centre = (points @ back[:2, :2].T + back[:2, 2], centre @ back[:2, :2].T + back[:2, 2])
    half = (best.box[2:] - best.box[:2]) / 2 * np.hypot(back[0, 0], back[1, 0])
    box = np.concatenate([centre - half, centre + half]).astype(np.float32)
    return Face(box, points.astype(np.float32), best.confidence)


def _middle(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


def _is_new(face: Face, faces: list[Face]) -> bool:
    return not any(overlapping(face.box, other.box) for other in faces)
