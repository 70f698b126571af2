"""Networks of single images, run over the frames of samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Outputs


class PerFrame(nn.Module):
    """What all networks of single images are: a family writes `predict_images`, and knows of no samples or frames.

    It is a base class and not a module around another, which would put a prefix to the names of the weights in
    every checkpoint.
    """

    def predict_images(self, images: Tensor) -> Outputs:
        """Predict N normalised images (N, 3, H, W) float: VA (N, 2) in [-1, 1], logits (N, 8) and (N, 12)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, valid: Tensor) -> Outputs:
        """Predict the valid frames of (B, T, 3, H, W) images; `valid` (B, T) bool. What is padding has zeros.

        No frame knows of another, and padding is not seen, by BatchNorm neither. A rank without samples has empty
        outputs, whose gradients are zero, and leaves the moments of BatchNorm alone.
        """
        if not len(inputs):
            return of_no_samples(self, inputs)
        if inputs.shape[1] == 1:  # a sample has a frame at least: nothing to look for, which a GPU would wait for
            return Outputs(*(output[:, None] for output in self.predict_images(channels_last(inputs[:, 0]))))
        flat = self.predict_images(channels_last(inputs[valid]))
        return Outputs(*(laid_out(output, valid) for output in flat))


def of_no_samples(model: nn.Module, inputs: Tensor) -> Outputs:
    """Return the empty outputs of inputs (0, T, ...). Every parameter has a gradient, which is zero."""
    nothing = sum(parameter.sum() for parameter in model.parameters())
    widths = Outputs(va=2, expr_logits=NUM_EXPRESSIONS, au_logits=NUM_AUS)
    return Outputs(*(inputs.new_zeros(0, inputs.shape[1], width) + nothing for width in widths))


def channels_last(images: Tensor) -> Tensor:
    """Lay (N, 3, H, W) images out as backbones read them.

    10-25% faster on a CPU, and what tensor cores read. It spreads from the images through every layer, so parameters
    stay contiguous, as DeepSpeed's flat buffers and safetensors want them.
    """
    return images.contiguous(memory_format=torch.channels_last)


def laid_out(flat: Tensor, valid: Tensor) -> Tensor:
    """Lay (n, C) of the n valid frames out as (B, T, C), with zeros between."""
    laid_out = flat.new_zeros(*valid.shape, flat.shape[-1])
    laid_out[valid] = flat
    return laid_out
