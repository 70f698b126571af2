"""Augmentation and normalisation of a whole batch on the device, with randomness keyed by (seed, epoch, row).

A sample's augmentation depends on nothing else: not on rank, worker, batch or resume. An image larger than the model's
input is made as small as in evaluation. Then one affine sampling does crop, rotation, flip and enlarging. Colours are
changed last: brightness, contrast, saturation, hue, always in this order, and cut to their range once at the end.
(torchvision's ColorJitter draws the order at random, and cuts after each.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_dist.config import Config
from mtl_dist.constants import Constant
from mtl_dist.families import preparation_of, reads_videos
from mtl_dist.sections import AugmentConfig
from mtl_dist.tasks import GREY, IMAGENET_MEAN, IMAGENET_STD, Batch

NUM_FIRST_DRAWS = 12
NUM_DRAWS = 14  # those that came later are drawn beside the first: what the first are must not change
_MEAN, _STD, _GREY = (
    Constant(torch.tensor(values, dtype=torch.float64)[:, None, None]) for values in (IMAGENET_MEAN, IMAGENET_STD, GREY)
)


class Preparation(Protocol):
    """Makes a model's inputs of a batch, on the device."""

    def draw(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Return what is drawn for rows (B, T), on the host: (B, T, n) float32, a function of (seed, epoch, row)."""
        ...

    def __call__(self, batch: Batch, draws: Tensor | None) -> Tensor:
        """Return (B, T, ...) float32; `draws` are from `draw`, None in evaluation."""
        ...


@dataclass(frozen=True)
class ImagePreparation:
    """Augments images in training, and brings them to the model's size in evaluation; normalises them in both."""

    config: AugmentConfig
    size: int  # side of the model's input in pixels
    alike: bool = False  # all frames of a sample, which is a window of a video

    def draw(self, rows: Tensor, *, seed: int, epoch: int) -> Tensor:
        if self.alike and rows.numel():
            first = (rows >= 0).long().argmax(1, keepdim=True)  # that counts
            rows = rows.gather(1, first).expand_as(rows)
        return make_draws(rows, seed=seed, epoch=epoch)

    def __call__(self, batch: Batch, draws: Tensor | None) -> Tensor:
        if draws is None:
            return normalise(batch.inputs, self.size)
        return augment(batch.inputs, draws, self.config, self.size)


def build_preparation(config: Config) -> Preparation:
    """Build what the configured model's inputs are prepared by."""
    name = preparation_of(config.model.name, config.model.backbone)
    return resolve_name(f"mtl_dist.data.{name}")(config)


def build_image_preparation(config: Config) -> ImagePreparation:
    """Build what images are prepared by."""
    return ImagePreparation(config.augment, config.input_size, alike=reads_videos(config.model.name))


def normalise(inputs: Tensor, size: int) -> Tensor:
    """Turn (B, T, 3, H, W) uint8 into (B, T, 3, size, size) float32, normalised with ImageNet's statistics."""
    images = _resize(inputs.flatten(0, 1).float() / 255, size)
    return _standardise(images).unflatten(0, inputs.shape[:2])


def augment(inputs: Tensor, draws: Tensor, config: AugmentConfig, size: int) -> Tensor:
    """Augment and normalise (B, T, 3, H, W) uint8 to (B, T, 3, size, size) float32.

    `draws` (B, T, NUM_DRAWS) float32 uniform in [0, 1), from `make_draws`.
    """
    images, u = inputs.flatten(0, 1).float() / 255, draws.flatten(0, 1)
    # Sampling has no antialiasing: a larger image is first made as small as in evaluation.
    images = _resize(images, min(config.resize or size, images.shape[-1]))
    images = F.grid_sample(
        images, _affine_grid(u, config, size), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    jittered = _jitter(images, u, config)
    if config.jitter_p < 1:
        jittered = torch.where((u[:, 13] < config.jitter_p)[:, None, None, None], jittered, images)
    images = jittered
    if config.erase:
        images = _erase(images, u, config.erase)
    return _standardise(images).unflatten(0, inputs.shape[:2])


def _resize(images: Tensor, side: int) -> Tensor:
    """Resize (N, 3, H, W), antialiased where it makes them smaller."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def make_draws(rows: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return (B, T, NUM_DRAWS) uniform numbers for rows (B, T), a pure function of (seed, epoch, row)."""
    key = _mix(_mix(np.uint64(seed)) ^ np.uint64(epoch))
    first = _draw(rows, NUM_FIRST_DRAWS, key)
    return torch.from_numpy(np.concatenate([first, _draw(rows, NUM_DRAWS - NUM_FIRST_DRAWS, _mix(~key))], axis=-1))


def draw_bits(rows: Tensor, count: int, *, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Return `count` 64-bit numbers for rows (...), a pure function of (seed, epoch, row): (..., count) uint64.

    Those of one `purpose`, which is not 0, have nothing to do with another's.
    """
    return _bits(rows, count, _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(purpose)))


def _draw(rows: Tensor, count: int, key: np.uint64) -> np.ndarray:
    return (_bits(rows, count, key) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _bits(rows: Tensor, count: int, key: np.uint64) -> np.ndarray:
    counter = rows.numpy().astype(np.uint64)[..., None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    return _mix(_mix(counter) ^ key)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64-bit numbers that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _affine_grid(u: Tensor, config: AugmentConfig, size: int) -> Tensor:
    """Where every pixel of the output lies in the input, in units of half its side from its middle."""
    if config.resize:
        # Sampling the input where the resized image's pixels lie is resizing it: bilinear both. Whole pixels of it.
        spare = config.resize - size
        scale = torch.full_like(u[:, 0], size / config.resize)
        shift_x, shift_y = ((2 * (u[:, i] * (spare + 1)).floor() - spare) / config.resize for i in (2, 3))
    else:
        low, high = config.crop_scale
        scale = low + (high - low) * u[:, 0]
        shift_x, shift_y = ((2 * u[:, i] - 1) * (1 - scale) for i in (2, 3))
    angle = torch.deg2rad((2 * u[:, 1] - 1) * config.rotation)
    mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if config.flip else torch.ones_like(scale)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin, shift_x], 1), torch.stack([sin * mirror, cos, shift_y], 1)], 1
    )
    return F.affine_grid(theta, [len(u), 3, size, size], align_corners=False)


def _jitter(images: Tensor, u: Tensor, config: AugmentConfig) -> Tensor:
    """Change brightness, contrast and saturation, each by a factor in [1 - c, 1 + c], and hue by [-c, c] of a circle.

    Each is what torchvision's ColorJitter does.
    """
    factors = [
        1 + c * (2 * u[:, 5 + i, None, None, None] - 1)
        for i, c in enumerate((config.brightness, config.contrast, config.saturation))
    ]
    images, shares = images * factors[0], _GREY.like(images)
    grey = (images * shares).sum(1, keepdim=True)
    images = torch.lerp(grey.mean((2, 3), keepdim=True), images, factors[1])
    grey = (images * shares).sum(1, keepdim=True)
    images = torch.lerp(grey, images, factors[2]).clamp(0, 1)
    return turn_hue(images, (2 * u[:, 12] - 1) * config.hue) if config.hue else images


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of (N, 3, H, W) images in [0, 1] by `turns` (N,) of the colour circle; value and saturation stay.

    By way of HSV, as torchvision's adjust_hue.
    """
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    red, green, blue = images.unbind(1)
    spread = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / spread,
        torch.where(value == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    hue = sextant + 6 * turns[:, None, None]  # in sixths of the circle
    # A channel is the value, less the chroma by how far the hue is from the channel's own third of the circle.
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _erase(images: Tensor, u: Tensor, probability: float) -> Tensor:
    """Fill one rectangle of 10-35% of the side with mid grey, with the given probability."""
    size = images.shape[-1]
    place = (torch.arange(size, device=images.device) + 0.5) / size
    side = 0.1 + 0.25 * u[:, 9]
    inside = [
        (place[None] - (side[:, None] / 2 + (1 - side[:, None]) * u[:, i, None])).abs() < side[:, None] / 2
        for i in (10, 11)
    ]
    hit = inside[1][:, None, :, None] & inside[0][:, None, None, :] & (u[:, 8] < probability)[:, None, None, None]
    return torch.where(hit, 0.5, images)


def _standardise(images: Tensor) -> Tensor:
    return (images - _MEAN.like(images)) / _STD.like(images)
