"""What spoils single frames of a video: movement, a blink, a hand in the way, a camera that is still adapting.

It is in the pixels of both views and not in the labels: an annotator saw the frames around it.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mtl_dist.synthetic.canvas import Canvas
from mtl_dist.synthetic.figure import draw_hand
from mtl_dist.synthetic.person import Spoil

KINDS = ("motion", "blink", "hand", "exposure")
NUM_SHIFTS = 9  # pictures that a moving one is the mean of
HAND_SIZE = 1.6  # a hand before the face is nearer to the camera


def plan_spoil(rng: np.random.Generator) -> Spoil:
    """Draw one kind of fault and how bad it is."""
    kind = KINDS[rng.integers(len(KINDS))]
    if kind == "motion":
        return Spoil(motion_px=float(rng.uniform(1.5, 3.0)), motion_angle=float(rng.uniform(0, math.pi)))
    if kind == "blink":
        return Spoil(lids=float(rng.uniform(0.5, 0.9)))
    if kind == "hand":
        side = float(rng.choice((-1, 1)))
        place = (side * float(rng.uniform(0.1, 0.7)), float(rng.uniform(0.3, 1.5)))
        return Spoil(hand=place, hand_angle=-side * float(rng.uniform(0.1, 0.7)))
    is_dark = rng.random() < 0.5
    return Spoil(exposure=float(rng.uniform(0.3, 0.5) if is_dark else rng.uniform(1.5, 2.0)))


def draw_passing_hand(canvas: Canvas) -> None:
    """The hand that passes before the face, in both views; drawn last."""
    spoil = canvas.head.look.spoil
    if spoil.hand is not None:
        draw_hand(canvas, spoil.hand, angle=spoil.hand_angle, spread=0.16, size=HAND_SIZE)


def spoil_picture(image: Image.Image, spoil: Spoil) -> Image.Image:
    """Smear and expose a finished picture (RGB); the same object where there is nothing to do."""
    if spoil.motion_px > 0:
        image = _smear(image, spoil.motion_px, spoil.motion_angle)
    if spoil.exposure != 1:
        image = image.point([min(255, round(level * spoil.exposure)) for level in range(256)] * 3)
    return image


def _smear(image: Image.Image, motion_px: float, angle: float) -> Image.Image:
    """The mean of the picture over a straight path whose standard deviation is `motion_px`."""
    along = np.linspace(-1, 1, NUM_SHIFTS)
    shifts = along / along.std() * motion_px
    margin = math.ceil(shifts.max()) + 1  # what moves in from outside the picture is its border
    padded = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
    total = np.zeros((image.height, image.width, 3), dtype=np.float32)
    for shift in shifts:
        matrix = (1, 0, margin + shift * math.cos(angle), 0, 1, margin + shift * math.sin(angle))
        total += np.asarray(padded.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    return Image.fromarray(np.round(total / NUM_SHIFTS).astype(np.uint8))
