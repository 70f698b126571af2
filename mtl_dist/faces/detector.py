"""Open a face detector: the one that comes with `mtl_dist[faces]`, or a user's ONNX file."""

from __future__ import annotations

from pathlib import Path

from mtl_dist.errors import InputError
from mtl_dist.faces.face import Detector, Face
from mtl_dist.faces.libfacedetection import LibFaceDetection
from mtl_dist.faces.onnx_nets import OnnxDetector

__all__ = ["Detector", "Face", "open_detector"]

DEFAULT = "yunet"
MAX_SIDE = 960  # of what is searched: more finds smaller faces, and costs by its square
LEAST_SIDE, MOST_SIDE = 64, 4096  # that --max-side may be; more could take minutes and gigabytes a picture


def open_detector(
    which: str | Path = DEFAULT, *, min_confidence: float | None = None, max_side: int = MAX_SIDE, threads: int = 1
) -> Detector:
    """Open a detector by name, or an ONNX file: YuNet, SCRFD or RetinaFace.

    Pictures with a longer side than `max_side` are searched at that size. A detector has its own default for
    `min_confidence`. Raises `InputError` for what is not installed, not known, or out of bounds.
    """
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise InputError(f"the least confidence of a face is {min_confidence}; expected 0 to 1")
    if not LEAST_SIDE <= max_side <= MOST_SIDE:
        raise InputError(f"the longest side to search is {max_side} pixels; expected {LEAST_SIDE} to {MOST_SIDE}")
    if str(which) == DEFAULT:
        return LibFaceDetection(min_confidence=min_confidence, max_side=max_side, threads=threads)
    if not str(which).endswith(".onnx"):
        raise InputError(f"no detector is called '{which}'; expected {DEFAULT}, or the path of an ONNX file")
    return OnnxDetector(Path(which), min_confidence=min_confidence, max_side=max_side, threads=threads)
