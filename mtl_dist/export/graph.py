"""A trained model as an ONNX graph that takes pixels, and the check that it answers as torch does."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.errors import InputError
from mtl_dist.models.per_frame import PerFrame
from mtl_dist.objective.metrics import Predictions
from mtl_dist.tasks import AUS, EXPRESSIONS, IMAGENET_MEAN, IMAGENET_STD

OPSET = 18  # the first with Col2Im, which `fold` becomes
INPUT = "images"
OUTPUTS = Predictions._fields  # va, expr, au
EXTRA = "exporting to ONNX needs {}, which is not installed: pip install 'mtl_dist[export]', or --formats safetensors"


class PixelModel(nn.Module):
    """Predict (N, 3, S, S) uint8 RGB: VA (N, 2), expression and AU probabilities (N, 8), (N, 12).

    What `evaluate.predict` does, with the resize of `augment.normalise` written as two matrix products: a bilinear
    resize with antialiasing is linear and separable, and ONNX runtimes differ in theirs.
    """

    def __init__(self, model: PerFrame, *, image_size: int, input_size: int):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.register_buffer("resize", resize_matrix(image_size, input_size) if image_size != input_size else None)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images.float() / 255
        if self.resize is not None:
            pixels = self.resize @ pixels @ self.resize.T
        va, expr, au = self.model.predict_images((pixels - self.mean) / self.std)
        return va, expr.softmax(-1), au.sigmoid()


def resize_matrix(size: int, to_size: int) -> Tensor:
    """Return (to_size, size): the weights of a bilinear resize with antialiasing along one side."""
    columns = torch.eye(size)[None, None]
    return F.interpolate(columns, size=(to_size, size), mode="bilinear", antialias=True)[0, 0]


def check_onnx_installed() -> None:
    """Raise `InputError` naming what is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(EXTRA.format(error.name or error)) from None


def write_onnx(model: PerFrame, path: Path, *, image_size: int, input_size: int) -> None:
    """Write a model on the CPU, in evaluation mode, as one ONNX file that takes any number of images.

    Raises `InputError` for a model that torch's exporter has no graph for.
    """
    import onnx

    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with _exporting():
        try:
            program = torch.onnx.export(
                PixelModel(model, image_size=image_size, input_size=input_size).eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"torch cannot write this model as ONNX ({reason}); use --formats safetensors") from error
    graph = program.model_proto
    about = {"expressions": ",".join(EXPRESSIONS), "aus": ",".join(map(str, AUS)), "va": "valence,arousal"}
    onnx.helper.set_model_props(graph, about)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString())


def run_onnx(path: Path, images: np.ndarray, *, batch: int) -> Predictions:
    """Predict (n, 3, S, S) uint8 with onnxruntime on the CPU, in batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [session.run(OUTPUTS, {INPUT: images[i : i + batch]}) for i in range(0, len(images), batch)]
    return Predictions(*(np.concatenate(column) for column in zip(*parts)))


def largest_difference(mine: Predictions, other: Predictions) -> float:
    """Return the largest absolute difference of any VA or probability; NaN where one is."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(mine, other)]))


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """The transformer's fused fast path is one operator that ONNX does not have; torch's exporter talks much."""
    was_fast, logger = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch.onnx")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The list of its own weights, which torch's GRU makes anew: they are what they were.
            warnings.filterwarnings("ignore", r"The tensor attributes self\.\S*gru\._flat_weights")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        logger.setLevel(level)
