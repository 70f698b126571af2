"""Detectors that a user brings as an ONNX file: YuNet, SCRFD and RetinaFace, told apart by what they give.

Which outputs there are is found out by running the network once, since files name them freely and leave their shapes
open. All three search maps of an 8th, 16th and 32nd of the picture, and are read here by what their papers say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtl_dist.errors import InputError
from mtl_dist.faces.face import Face, check_picture, fit, overlapping, scaled

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

STRIDES = (8, 16, 32)
MOST_CANDIDATES = 5000  # before boxes that overlap are dropped
_PROBE = 160, 96  # width and height that a network of any size is tried with
_KINDS = "YuNet (12 outputs), SCRFD with points (9), RetinaFace (3)"


class Rows(NamedTuple):
    """Candidates, in pixels of the network's input."""

    scores: np.ndarray  # (n,)
    boxes: np.ndarray  # (n, 4)
    points: np.ndarray  # (n, 10)


Outputs = list[np.ndarray]  # each (rows, columns)


class Layout(NamedTuple):
    """What a kind of network reads and gives."""

    name: str
    columns: dict[int, int]  # how many of its outputs have so many columns
    anchors: tuple[int, ...]  # at every place of a map, as there may be
    is_bgr: bool
    mean: tuple[float, float, float]  # taken off 0 to 255, in the order of the network's channels
    scale: float  # and divided by
    min_confidence: float
    decode: Callable[[Outputs, int, int, float], Rows]  # of an input's height and width, and the least score


class OnnxDetector:
    """A detector of a user's ONNX file. Several threads may call it."""

    def __init__(self, path: Path, *, min_confidence: float | None, max_side: int, threads: int = 1):
        self._session = _open(path, threads)
        self._input = _check_input(self._session, path)
        height, width = (side if isinstance(side, int) else 0 for side in self._input.shape[2:])
        self._fixed = (height, width) if height and width else None
        self._max_side = max_side
        probe = self._fixed or _PROBE[::-1]
        try:
            outputs = self._run(np.zeros((1, 3, *probe), np.float32))
        except Exception as error:  # onnxruntime has a class for each of its faults, and no base of them
            raise InputError(f"the network of {path} cannot be run: {_first_line(error)}") from None
        self._layout = _recognise(outputs, *probe, path)
        self._min_confidence = self._layout.min_confidence if min_confidence is None else min_confidence
        self.name = f"{self._layout.name} ({path.name})"

    def __call__(self, picture: np.ndarray) -> list[Face]:
        """Find the faces of a (h, w, 3) uint8 RGB picture, the most confident first."""
        check_picture(picture)
        small, back = self._fit(picture)
        height, width = small.shape[:2]
        shape = self._fixed or tuple(-(-side // STRIDES[-1]) * STRIDES[-1] for side in (height, width))
        pixels = np.zeros((1, 3, *shape), np.float32)
        channels = small[..., ::-1] if self._layout.is_bgr else small
        mean = np.array(self._layout.mean, np.float32)
        pixels[0, :, :height, :width] = ((channels - mean) / np.float32(self._layout.scale)).transpose(2, 0, 1)
        outputs = self._run(pixels)
        rows = self._layout.decode(outputs, *shape, self._min_confidence)
        return scaled(_surest_of_each(rows), back)

    def _fit(self, picture: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        if not self._fixed:
            return fit(picture, self._max_side)
        height, width = picture.shape[:2]
        least = min(self._fixed[0] / height, self._fixed[1] / width)
        return fit(picture, max(1, min(self._max_side, int(least * max(height, width)))))

    def _run(self, pixels: np.ndarray) -> Outputs:
        found = self._session.run(None, {self._input.name: pixels})
        return [np.asarray(output).reshape(-1, output.shape[-1]) for output in found if np.ndim(output) >= 2]


def _open(path: Path, threads: int) -> InferenceSession:
    if not path.is_file():
        raise InputError(f"no detector at {path}; expected an ONNX file of {_KINDS}")
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "detectors of ONNX files need onnxruntime, which is not installed: pip install 'mtl_dist[export]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: warnings are about how files were exported
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} cannot be read as ONNX: {_first_line(error)}") from None


def _check_input(session: InferenceSession, path: Path):
    inputs = session.get_inputs()
    shapes = [list(each.shape) for each in inputs]
    if len(inputs) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or inputs[0].type != "tensor(float)":
        told = ", ".join(f"{each.name} {each.type} {list(each.shape)}" for each in inputs)
        raise InputError(f"{path} reads {told}; a detector reads one float picture, [1, 3, height, width]")
    return inputs[0]


def _recognise(outputs: Outputs, height: int, width: int, path: Path) -> Layout:
    """Return the layout whose outputs these are. Raises `InputError` that lists them where there is none."""
    columns = [output.shape[1] for output in outputs]
    counts = {each: columns.count(each) for each in sorted(set(columns))}
    places = [-(-height // stride) * -(-width // stride) for stride in STRIDES]
    for layout in LAYOUTS:
        for anchors in layout.anchors:
            rows = sorted({place * anchors for place in places}) if len(outputs) > 3 else [sum(places) * anchors]
            if counts == layout.columns and sorted({len(output) for output in outputs}) == rows:
                return layout
    told = ", ".join(f"{len(output)} x {output.shape[1]}" for output in outputs)
    raise InputError(
        f"{path} is no detector that is known: for a picture of {width} x {height} its outputs are {told or 'none'}; "
        f"expected those of {_KINDS}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# What the three give.


def _by_stride(outputs: Outputs) -> list[tuple[int, Outputs]]:
    """Return the outputs of every stride: those of points, of scores and of boxes."""
    lengths = sorted({len(output) for output in outputs}, reverse=True)  # the finest map is the longest
    return [
        (
            stride,
            sorted((each for each in outputs if len(each) == length), key=lambda each: (10, 1, 4).index(each.shape[1])),
        )
        for stride, length in zip(STRIDES, lengths, strict=True)
    ]


def _grid(height: int, width: int, stride: int, anchors: int = 1) -> np.ndarray:
    """Return the column and row of every place of a map, (n, 2)."""
    rows, columns = np.mgrid[: -(-height // stride), : -(-width // stride)]
    return np.repeat(np.stack([columns.ravel(), rows.ravel()], 1), anchors, 0).astype(np.float32)


def _joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*parts)))


def _yunet(outputs: Outputs, height: int, width: int, least: float) -> Rows:
    """W. Wu et al., 2023: middle and logarithm of the size of a box, points; all by stride, from a place of the map."""
    parts = []
    for stride, (points, *scores, boxes) in _by_stride(outputs):
        score = np.sqrt(np.prod([np.clip(each[:, 0], 0, 1) for each in scores], 0))
        kept = score >= least
        place, box = _grid(height, width, stride)[kept], boxes[kept]
        middle, half = (place + box[:, :2]) * stride, np.exp(np.minimum(box[:, 2:], 20)) * stride / 2
        at = (points[kept].reshape(-1, 5, 2) + place[:, None]) * stride
        parts.append(Rows(score[kept], np.concatenate([middle - half, middle + half], 1), at.reshape(-1, 10)))
    return _joined(parts)


def _scrfd(outputs: Outputs, height: int, width: int, least: float) -> Rows:
    """J. Guo et al., 2021: how far the four edges of a box and its points are from a place of the map, by stride."""
    parts = []
    for stride, (points, scores, boxes) in _by_stride(outputs):
        grid = _grid(height, width, stride)
        kept = scores[:, 0] >= least
        place = np.repeat(grid, len(scores) // len(grid), 0)[kept] * stride
        far = boxes[kept] * stride
        at = points[kept].reshape(-1, 5, 2) * stride + place[:, None]
        box = np.concatenate([place - far[:, :2], place + far[:, 2:]], 1)
        parts.append(Rows(scores[kept, 0], box, at.reshape(-1, 10)))
    return _joined(parts)


def _retinaface(outputs: Outputs, height: int, width: int, least: float) -> Rows:
    """J. Deng et al., 2020, as in PyTorch: by priors of two sizes at every place of a map, with variances."""
    by_columns = {output.shape[1]: output for output in outputs}
    both, boxes, points = by_columns[2], by_columns[4], by_columns[10]
    if not np.allclose(both.sum(1), 1, atol=1e-2):  # exported without its softmax
        both = np.exp(both - both.max(1, keepdims=True))
        both /= both.sum(1, keepdims=True)
    kept = both[:, 1] >= least
    middles, sizes = [], []
    for stride in STRIDES:
        grid = _grid(height, width, stride, anchors=2)
        middles.append((grid + 0.5) * stride)
        sizes.append(np.tile(np.array([2 * stride, 4 * stride], np.float32), len(grid) // 2))
    middle, size = np.concatenate(middles)[kept], np.concatenate(sizes)[kept, None]
    centre = middle + boxes[kept, :2] * 0.1 * size
    half = size * np.exp(np.minimum(boxes[kept, 2:] * 0.2, 20)) / 2
    at = middle[:, None] + points[kept].reshape(-1, 5, 2) * 0.1 * size[..., None]
    return Rows(both[kept, 1], np.concatenate([centre - half, centre + half], 1), at.reshape(-1, 10))


LAYOUTS = (
    Layout("yunet", {1: 6, 4: 3, 10: 3}, (1,), True, (0, 0, 0), 1.0, 0.6, _yunet),
    Layout("scrfd", {1: 3, 4: 3, 10: 3}, (1, 2), False, (127.5, 127.5, 127.5), 128.0, 0.5, _scrfd),
    Layout("retinaface", {2: 1, 4: 1, 10: 1}, (2,), True, (104, 117, 123), 1.0, 0.6, _retinaface),
)


def _surest_of_each(rows: Rows) -> list[Face]:
    """Drop what is less sure than another that it overlaps with; the most confident first."""
    order = np.argsort(-rows.scores, kind="stable")[:MOST_CANDIDATES]
    boxes, faces = rows.boxes[order].astype(np.float64), []
    free = np.isfinite(boxes).all(1) & np.isfinite(rows.points[order]).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    while free.any():
        best = int(np.argmax(free))
        confidence = float(min(rows.scores[order[best]], 1.0))
        points = rows.points[order[best]].reshape(5, 2).astype(np.float32)
        faces.append(Face(boxes[best].astype(np.float32), points, confidence))
        free &= ~overlapping(boxes, boxes[best])
        free[best] = False
    return faces
