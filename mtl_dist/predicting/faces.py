"""Faces of whole pictures as models want to see them: cut out as `prepare` cuts them, for every view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mtl_dist.data.decode import resize
from mtl_dist.errors import InputError
from mtl_dist.faces.finding import FoundFace, FoundFrame
from mtl_dist.faces.views import LEAST_FACE, cut_view, longer_side
from mtl_dist.predicting.averaging import Cut


def check_cuts(runs: Sequence[str], cuts: Iterable[Cut]) -> None:
    """Raise `InputError` for models that do not say how their faces were cut out."""
    for cut in cuts:
        if cut.view is None:
            raise InputError(
                f"{', '.join(runs)} do not say on which view they were trained, so faces cannot be cut out for them: "
                "cut them with python -m mtl_dist.prepare, and predict its pictures"
            )


def cut_face(picture: np.ndarray, face: FoundFace, cuts: Iterable[Cut]) -> dict[Cut, np.ndarray]:
    """Return a face of a (h, w, 3) uint8 picture as every cut has it, (size, size, 3)."""
    views: dict[str, np.ndarray] = {}
    found = {}
    for cut in cuts:
        assert cut.view is not None
        if cut.view not in views:
            views[cut.view] = cut_view(picture, face, cut.view)
        pixels = views[cut.view]
        found[cut] = (
            pixels if len(pixels) == cut.size else resize(np.require(pixels, requirements=["C", "W"]), cut.size)
        )
    return found


def large_enough(found: FoundFrame) -> list[FoundFace]:
    """Return the faces of a frame that are cut out: not what is a few pixels in the distance."""
    return [face for face in found.faces if longer_side(face) >= LEAST_FACE]


def stack_cuts(faces: Sequence[dict[Cut, np.ndarray]]) -> dict[Cut, np.ndarray]:
    """Return n faces of `cut_face` as (n, size, size, 3) of every cut."""
    return {cut: np.stack([face[cut] for face in faces]) for cut in faces[0]}
