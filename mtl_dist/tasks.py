"""The words of the project: tasks, classes and action units; what a batch and a prediction are made of.

Task order is always VA, EXPR, AU. Shapes: B samples, T frames of a sample (1 for single images), H x W pixels.
This module imports nothing heavy: torch is needed only by type checkers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TASKS = ("va", "expr", "au")
VIEWS = ("cropped", "cropped_aligned")
SPLITS = ("train", "val")
SET_BITS = 32  # of a row of several sets: above them is the number of its set
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1], as models read it
GREY = (0.299, 0.587, 0.114)  # what red, green and blue have of the luma (ITU-R BT.601)
PERSON = "person: "  # begins what stands for a video's name where there is none: a person's pictures, which are no film

EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
AUS = (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26)  # FACS numbers, in the order of the annotation files
NUM_EXPRESSIONS = len(EXPRESSIONS)
NUM_AUS = len(AUS)

# The codes for "not labelled" in annotation text. They stop at the parser: everything after it carries masks.
MISSING_VA = -5.0
MISSING_EXPR = -1
MISSING_AU = -1


class Labels(NamedTuple):
    """Labels of a batch; an entry means something only where its mask is True (elsewhere it is 0)."""

    va: Tensor  # (B, T, 2) float32, valence and arousal in [-1, 1]
    expr: Tensor  # (B, T) int64, 0..7
    au: Tensor  # (B, T, 12) float32, 0 or 1
    va_mask: Tensor  # (B, T) bool
    expr_mask: Tensor  # (B, T) bool
    au_mask: Tensor  # (B, T, 12) bool

    def to(self, device, non_blocking: bool = True) -> Labels:
        """Copy all tensors to a device."""
        return Labels(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def keep_own(self, task: str, places: np.ndarray) -> None:
        """Mask the labels of all other tasks in some of the samples, in place."""
        for other in TASKS:
            if other != task:
                getattr(self, f"{other}_mask")[places] = False


class Batch(NamedTuple):
    """What a loader yields, on the host: B samples, padded to T frames. A sample has one frame at least."""

    inputs: Tensor  # (B, T, 3, H, W) uint8, or what it was prepared to
    valid: Tensor  # (B, T) bool; False is padding
    labels: Labels  # their masks are False where a frame is not valid
    # (B, T) int64, row numbers of the annotation file or table: what predictions are of; -1 is padding, or a frame that
    # is only seen for the sake of others
    rows: Tensor
    samples: Tensor  # (B,) int64, places in the set: what the order and its audit speak of

    def to(self, device) -> Batch:
        """Move what a model and its losses need. Numbers of rows and samples stay on the host."""
        inputs, valid = (tensor.to(device, non_blocking=True) for tensor in (self.inputs, self.valid))
        return self._replace(inputs=inputs, valid=valid, labels=self.labels.to(device))

    def take(self, places: Tensor | slice) -> Batch:
        """Return some of the samples."""
        labels = Labels(*(tensor[places] for tensor in self.labels))
        return Batch(self.inputs[places], self.valid[places], labels, self.rows[places], self.samples[places])

    def valid_rows(self) -> list[int]:
        """Return the rows of the frames that count, one sample's after another's."""
        return self.rows[self.rows >= 0].tolist()


class Outputs(NamedTuple):
    """What every model of labels returns."""

    va: Tensor  # (B, T, 2) in [-1, 1]
    expr_logits: Tensor  # (B, T, 8)
    au_logits: Tensor  # (B, T, 12)


class Reconstruction(NamedTuple):
    """What an autoencoder returns of n frames of L patches of p x p pixels, in the order row, column, channel."""

    predicted: Tensor  # (n, L, 3pp) what is told of every patch
    patches: Tensor  # (n, L, 3pp) its pixels, normalised as the inputs are
    hidden: Tensor  # (n, L) bool: whether the model did not see it
