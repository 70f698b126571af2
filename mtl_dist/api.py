"""Predictions from Python.

    import mtl_dist

    model = mtl_dist.load("runs/cropped_aligned")  # a run, checkpoint or export; of several the mean
    result = model.predict(images)  # arrays, images of Pillow, paths
    found = model.predict_faces(pictures)  # of whole pictures: finds the faces first

What is wrong with what was given raises `mtl_dist.InputError`, a `ValueError`, whose message says what to do. Names and
fields that are here stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch

from mtl_dist.data.decode import MAX_SCENE_SIDE
from mtl_dist.device import named_device
from mtl_dist.errors import InputError
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.face import Detector, Face
from mtl_dist.faces.finding import find_in_photograph
from mtl_dist.families import FEATURES
from mtl_dist.objective.metrics import Predictions
from mtl_dist.predicting.averaging import Cut, Mean, find_views, no_predictions
from mtl_dist.predicting.faces import check_cuts, cut_face, large_enough, stack_cuts
from mtl_dist.predicting.pictures import Picture, Pictures, list_pictures, read_pixels
from mtl_dist.predicting.predictions import check_finite, predicted_columns
from mtl_dist.runs.weights import open_weights
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS

BATCH = 64  # as of the command: on some processors the last bits depend on it


def load(
    runs: str | os.PathLike | Sequence[str | os.PathLike], *, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> Model:
    """Load a run, a checkpoint of one or an exported directory, local or s3://; or several: their plain mean.

    Several are of one view, or of both. `auto` is a GPU where torch sees one. Raises `InputError`.
    """
    if isinstance(runs, (str, os.PathLike)):
        runs = [runs]
    if not runs or not all(isinstance(run, (str, os.PathLike)) for run in runs):
        raise InputError(f"runs are {runs!r}; expected a path or URI of a run, checkpoint or export, or a list of them")
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {device!r}; expected auto, cpu or cuda")
    return Model([os.fspath(run) for run in runs], device=device)


@dataclass(frozen=True)
class Prediction:
    """What is predicted of n faces, in the order in which they were given."""

    expression_names: ClassVar[tuple[str, ...]] = EXPRESSIONS
    au_numbers: ClassVar[tuple[int, ...]] = AUS

    valence: np.ndarray  # (n,) float32 in [-1, 1]
    arousal: np.ndarray  # (n,) float32 in [-1, 1]
    expression: np.ndarray  # (n, 8) float32: probabilities of `expression_names`, of sum 1
    au: np.ndarray  # (n, 12) float32: probability that each of `au_numbers` is on

    def __len__(self) -> int:
        return len(self.valence)

    @property
    def most_probable(self) -> list[str]:
        """The most probable expression of every face, by name."""
        return [EXPRESSIONS[number] for number in self.expression.argmax(-1)]

    def table(self) -> pa.Table:
        """Return a row a face, with the columns that `python -m mtl_dist.predict` writes; `.to_pandas()` has them."""
        va = np.column_stack([self.valence, self.arousal])
        return pa.table(self._places() | predicted_columns(Predictions(va, self.expression, self.au)))

    def _places(self) -> dict[str, pa.Array]:
        return {}


@dataclass(frozen=True)
class FacePrediction(Prediction):
    """What is predicted of n faces that were found in whole pictures: picture by picture, the largest face first.

    A picture without a face has no row.
    """

    picture: np.ndarray  # (n,) int64: which of the pictures, from 0
    box: np.ndarray  # (n, 4) float32: left, top, right, bottom in pixels of the picture as shown
    points: np.ndarray  # (n, 5, 2) float32: x, y of the eyes, the tip of the nose, the corners of the mouth
    confidence: np.ndarray  # (n,) float32: how sure the detector is, 0 to 1
    num_pictures: int

    def _places(self) -> dict[str, pa.Array]:
        edges = zip(("left", "top", "right", "bottom"), self.box.T)
        return {"picture": self.picture} | {name: edge for name, edge in edges} | {"confidence": self.confidence}


class Model:
    """Trained models that predict together, on one device: what `load` returns."""

    def __init__(self, runs: Sequence[str], *, device: str = "auto"):
        weights = [open_weights(run) for run in runs]
        for run, own in zip(runs, weights):
            if own.config.model.backbone == FEATURES:
                raise InputError(
                    f"{run} reads features of whole videos; predict with python -m mtl_dist.predict --extractors"
                )
        self.runs = tuple(runs)
        self.views = find_views(runs, weights)  # that it reads; empty where no run tells
        self._mean = Mean(weights, named_device(device))

    @property
    def device(self) -> torch.device:
        """What it computes on."""
        return self._mean.device

    def predict(
        self,
        images: Pictures | None = None,
        *,
        cropped: Pictures | None = None,
        cropped_aligned: Pictures | None = None,
        batch: int = BATCH,
    ) -> Prediction:
        """Predict pictures that are cut to one face, as those that the models were trained on.

        Args:
            images: of the models' one view: an array (n, height, width, 3) or (height, width, 3) of uint8 RGB, an image
                of Pillow, a path, or a list of these, of any sizes.
            cropped: for models of both views: the pictures of this one.
            cropped_aligned: the same faces in the other view, in the same order.
            batch: faces of a forward pass.

        Raises `InputError`.
        """
        named = {VIEWS[0]: cropped, VIEWS[1]: cropped_aligned}
        listed = {view: list_pictures(given) for view, given in self._given(images, named).items()}
        counts = {view: len(pictures) for view, pictures in listed.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"views hold {counts} pictures; expected the same faces in each, in the same order")
        _check_batch(batch)
        return Prediction(*self._fields(map(self._mean, _read_batches(listed, self._mean.cuts, batch))))

    def predict_faces(
        self,
        pictures: Pictures,
        *,
        detector: str | os.PathLike | Detector = "yunet",
        min_confidence: float | None = None,
        batch: int = BATCH,
    ) -> FacePrediction:
        """Find the faces of whole pictures, cut them out as `python -m mtl_dist.prepare` does, and predict them.

        Args:
            pictures: as `predict` takes them.
            detector: a name, the path of an ONNX file (YuNet, SCRFD, RetinaFace), or what
                `mtl_dist.faces.detector.open_detector` returned.
            min_confidence: leave out faces that the detector is less sure of; None: as the detector has it.
            batch: faces of a forward pass.

        Raises `InputError`.
        """
        check_cuts(self.runs, self._mean.cuts)
        _check_batch(batch)
        if isinstance(detector, (str, os.PathLike)):
            detector = open_detector(detector, min_confidence=min_confidence)
        listed, found = list_pictures(pictures), []

        def batches() -> Iterator[Predictions]:
            faces = _cut_faces(listed, detector, min_confidence or 0.0, self._mean.cuts)
            while taken := list(islice(faces, batch)):
                found.extend((number, face) for number, face, _ in taken)
                yield self._mean(stack_cuts([own for *_, own in taken]))

        fields = self._fields(batches())
        return FacePrediction(
            *fields,
            picture=np.array([number for number, _ in found], np.int64),
            box=np.array([face.box for _, face in found], np.float32).reshape(-1, 4),
            points=np.array([face.points for _, face in found], np.float32).reshape(-1, 5, 2),
            confidence=np.array([face.confidence for _, face in found], np.float32),
            num_pictures=len(listed),
        )

    def _given(self, images: Pictures | None, named: dict[str, Pictures | None]) -> dict[str | None, Pictures]:
        """Return what was given by the views of cuts. Raises `InputError` where that is not what the models read."""
        wanted = {cut.view for cut in self._mean.cuts}
        given = {view: pictures for view, pictures in named.items() if pictures is not None}
        if len(wanted) == 1 and images is not None and not given:
            return {view: images for view in wanted}
        if wanted == set(given) and images is None:
            return dict(given)
        expected = "predict(images)"
        if len(self.views) > 1:
            expected = f"predict({', '.join(f'{view}=...' for view in self.views)}), or predict_faces(pictures)"
        what = " and ".join([*(["images"] if images is not None else []), *given]) or "nothing"
        views = " and ".join(self.views) or "one view"
        raise InputError(f"{', '.join(self.runs)} read {views}, and {what} was given; expected {expected}")

    def _fields(self, parts: Iterable[Predictions]) -> tuple[np.ndarray, ...]:
        va, expression, au = (np.concatenate(column) for column in zip(no_predictions(), *parts))
        names = [f"number {number}" for number in range(len(va))]
        check_finite(Predictions(va, expression, au), names, source=" or ".join(self.runs))
        return va[:, 0].clip(-1, 1), va[:, 1].clip(-1, 1), expression, au


def _check_batch(batch: int) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch is {batch!r}; expected a number of faces, 1 or more")


def _read_batches(
    listed: dict[str | None, list[Picture]], cuts: Sequence[Cut], batch: int
) -> Iterator[dict[Cut, np.ndarray]]:
    for first in range(0, len(next(iter(listed.values()))), batch):
        yield {
            cut: np.stack([read_pixels(picture, cut.size) for picture in listed[cut.view][first : first + batch]])
            for cut in cuts
        }


def _cut_faces(
    listed: Sequence[Picture], detector: Detector, min_confidence: float, cuts: Sequence[Cut]
) -> Iterator[tuple[int, Face, dict[Cut, np.ndarray]]]:
    """Yield the number of a picture, a face of it, and that as every cut has it."""
    for number, picture in enumerate(listed):
        pixels = read_pixels(picture, max_side=MAX_SCENE_SIDE)
        for found in large_enough(find_in_photograph(pixels, detector)):
            if found.face.confidence >= min_confidence:
                yield number, found.face, cut_face(pixels, found, cuts)
