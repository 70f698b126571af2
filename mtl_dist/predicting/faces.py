"""Faces of whole pictures as models want to see them: cut out as `prepare` cuts them, for every view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mtl_dist.data.decode import resize
from mtl_dist.errors import InputError
from mtl_dist.faces.align import crop
from mtl_dist.faces.finding import FoundFace
from mtl_dist.predicting.averaging import Cut

CUTTERS: dict[str, Callable[[np.ndarray, FoundFace], np.ndarray]] = {
    "cropped": lambda picture, found: crop(picture, found.face.box),
    "cropped_aligned": lambda picture, found: found.aligned,
}


def check_cuts(runs: Sequence[str], cuts: Iterable[Cut]) -> None:
    """Raise `InputError` for models that do not say how their faces were cut out."""
    for cut in cuts:
        if cut.view is None:
            raise InputError(
                f"{', '.join(runs)} do not say on which view they were trained, so faces cannot be cut out for them: "
                "cut them with python -m mtl_dist.prepare, and predict its pictures"
            )
        if cut.view not in CUTTERS:
            raise InputError(f"faces can be cut out as {' and '.join(CUTTERS)}, not as '{cut.view}'")


def cut_face(picture: np.ndarray, face: FoundFace, cuts: Iterable[Cut]) -> dict[Cut, np.ndarray]:
    """Return a face of a (h, w, 3) uint8 picture as every cut has it, (size, size, 3)."""
    views: dict[str, np.ndarray] = {}
    found = {}
    for cut in cuts:
        assert cut.view is not None
        if cut.view not in views:
            views[cut.view] = CUTTERS[cut.view](picture, face)
        pixels = views[cut.view]
        found[cut] = (
            pixels if len(pixels) == cut.size else resize(np.require(pixels, requirements=["C", "W"]), cut.size)
        )
    return found


def stack_cuts(faces: Sequence[dict[Cut, np.ndarray]]) -> dict[Cut, np.ndarray]:
    """Return n faces of `cut_face` as (n, size, size, 3) of every cut."""
    return {cut: np.stack([face[cut] for face in faces]) for cut in faces[0]}
