"""The geometry and the drawing primitives of a face: coordinates, curves, colours, and a picture that takes them.

Face coordinates: origin between the eyes, x to the viewer's right, y down, unit = the distance between the eyes. So the
eyes lie at x = -0.5 and 0.5, the mouth at y = 1.12, the chin at y = 1.85. The pose of the head turns a face point into
scene coordinates (same unit and axes, where body and background live); a similarity transform takes it from there into
the pixels of a view. `points_N2` is (N points, x and y).
Colours are (3,) float arrays or tuples, RGB in [0, 255].
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mtl_dist.synthetic.person import ALL_AUS, Identity, Look

ALIGNED_PX = 112
ALIGNED_EYES_PX = np.array([[37.0, 40.0], [75.0, 40.0]])  # where alignment puts the eyes: the face fills the picture


class Head:
    """The head of one frame: its movements, and the way from face coordinates to scene coordinates."""

    def __init__(self, identity: Identity, look: Look):
        self.identity = identity
        self.look = look
        self.au = {au: float(look.aus.get(au, 0.0)) for au in ALL_AUS}
        self.jaw = 0.30 * self.au[26]  # how far the chin has dropped
        self._cos, self._sin = np.cos(look.roll), np.sin(look.roll)
        self._sin_yaw, self._sin_pitch = np.sin(look.yaw), np.sin(look.pitch)

    def to_scene(self, points_N2, *, relief: float = 0.0) -> np.ndarray:
        """Turn face points by the pose; `relief` is the height over the ellipsoid of the head (the nose has some)."""
        x, y = np.asarray(points_N2, dtype=float).reshape(-1, 2).T
        depth = 0.9 * np.sqrt(np.maximum(0.0, 1 - (x / 1.2) ** 2 - ((y - 0.3) / 2.2) ** 2)) + relief
        x = x * np.sqrt(1 - self._sin_yaw**2) + depth * self._sin_yaw
        y = y * np.sqrt(1 - self._sin_pitch**2) + depth * self._sin_pitch
        y = y - 1.6  # roll turns the head about the neck
        return np.stack([self._cos * x - self._sin * y, self._sin * x + self._cos * y + 1.6], axis=1)


def crop_transform(head: Head) -> np.ndarray:
    """The (2, 3) matrix from scene to `cropped` pixels: a box of the detector, never rotated, 3.5 to 4.5 units wide."""
    look, side_px = head.look, head.identity.crop_px
    scale = side_px / (4.0 - 0.5 * look.lean)
    centre = (look.crop_shift[0], 0.75 + look.crop_shift[1])
    return np.array([[scale, 0, side_px / 2 - scale * centre[0]], [0, scale, side_px / 2 - scale * centre[1]]])


def align_transform(head: Head) -> np.ndarray:
    """The (2, 3) similarity from scene to `cropped_aligned` pixels that puts the eyes on ALIGNED_EYES_PX."""
    eyes = head.to_scene([(-0.5, 0), (0.5, 0)]) @ (1, 1j)  # as complex numbers a similarity is z -> a z + b
    target = ALIGNED_EYES_PX @ (1, 1j)
    a = (target[1] - target[0]) / (eyes[1] - eyes[0])
    b = target[0] - a * eyes[0]
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


class Canvas:
    """A supersampled picture that takes face or scene coordinates, with soft layers for what is light or dark skin."""

    def __init__(self, head: Head, transform: np.ndarray, image: Image.Image):
        self.head = head
        self.transform = transform  # scene to supersampled pixels
        self.unit_px = float(np.hypot(*transform[:, 0]))
        self.image = image
        self.pen = ImageDraw.Draw(image)

    def pixels(self, points_N2, *, relief: float = 0.0, scene: bool = False) -> list[tuple[float, float]]:
        """Turn face points into pixels of the supersampled picture; with `scene`, scene points."""
        points = np.asarray(points_N2, dtype=float) if scene else self.head.to_scene(points_N2, relief=relief)
        return list(map(tuple, (points @ self.transform[:, :2].T + self.transform[:, 2]).tolist()))

    def fill(self, points_N2, colour, *, relief: float = 0.0, scene: bool = False) -> None:
        """Fill a contour with an opaque colour."""
        self.pen.polygon(self.pixels(points_N2, relief=relief, scene=scene), fill=colour)

    def line(self, points_N2, colour, width: float, *, relief: float = 0.0, scene: bool = False) -> None:
        """`width` in face units."""
        width_px = max(1, round(width * self.unit_px))
        self.pen.line(self.pixels(points_N2, relief=relief, scene=scene), fill=colour, width=width_px, joint="curve")

    def layer(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """Return an empty mask as large as the picture, and a pen for it."""
        mask = Image.new("L", self.image.size, 0)
        return mask, ImageDraw.Draw(mask)

    def solid(self, points_N2) -> Image.Image:
        """A layer that is opaque inside the contour."""
        mask, pen = self.layer()
        pen.polygon(self.pixels(points_N2), fill=255)
        return mask

    def paste(self, colour, mask: Image.Image, *, blur: float = 0.0) -> None:
        """Lay `colour` over the picture where `mask` is; `blur` in face units."""
        box = mask.getbbox()  # most layers are small: blurring and pasting only there halves the time of a frame
        if box is None:
            return
        radius = 0.8 * blur * self.unit_px
        margin = math.ceil(radius) + 1
        box = (
            max(0, box[0] - margin),
            max(0, box[1] - margin),
            min(mask.width, box[2] + margin),
            min(mask.height, box[3] + margin),
        )
        mask = mask.crop(box)
        self.image.paste(colour, box, mask.filter(ImageFilter.BoxBlur(radius)) if blur > 0 else mask)

    def blobs(self, colour, blobs, *, blur: float) -> None:
        """Paint (centre, radii, opacity) ellipses of one colour as one blurred layer."""
        mask, pen = self.layer()
        for centre, radii, opacity in blobs:
            if opacity > 0.01:
                pen.polygon(self.pixels(ellipse(centre, radii)), fill=round(255 * min(1.0, opacity)))
        self.paste(colour, mask, blur=blur)

    def creases(self, colour, creases, *, blur: float = 0.012) -> None:
        """Paint (points, width, opacity) lines of one colour as one layer."""
        mask, pen = self.layer()
        for points, width, opacity in creases:
            if opacity > 0.03:
                line = self.pixels(smooth(points, closed=False))
                width_px = width * self.unit_px
                opacity = min(1.0, opacity) * min(1.0, width_px)  # a line thinner than a pixel is fainter instead
                pen.line(line, fill=round(255 * opacity), width=max(1, round(width_px)), joint="curve")
        self.paste(colour, mask, blur=blur)


def mirror(half_N2, side: int) -> np.ndarray:
    """Points written for the side x > 0, for `side` 1 or -1."""
    return np.asarray(half_N2, dtype=float) * (side, 1)


def both_sides(half_N2) -> np.ndarray:
    """Close a contour that is written for x >= 0, from top to bottom, by its mirror image."""
    half = np.asarray(half_N2, dtype=float)
    other = half[::-1] * (-1, 1)
    return np.concatenate([half, other[other[:, 0] < 0]])


def ellipse(centre, radii, num_points: int = 20) -> np.ndarray:
    """The contour of an ellipse, (num_points, 2)."""
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    return np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=1)


_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None]
# Catmull-Rom weights of the four neighbours of a segment, (6 steps, 4)
_CATMULL_ROM = (
    0.5
    * np.concatenate([np.ones_like(_STEPS), _STEPS, _STEPS**2, _STEPS**3], axis=1)
    @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
)


def smooth(points_N2, *, closed: bool) -> np.ndarray:
    """A Catmull-Rom curve through the points, six times as dense."""
    p = np.asarray(points_N2, dtype=float)
    padded = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    neighbours = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)], axis=1)
    curve = np.einsum("sk,nkd->nsd", _CATMULL_ROM, neighbours).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def mix(colour, other, amount: float) -> tuple[int, ...]:
    """Blend two colours; at `amount` 0 it is `colour`, at 1 `other`."""
    return tuple(int(c) for c in np.clip(np.asarray(colour) * (1 - amount) + np.asarray(other) * amount, 0, 255))


def shade(colour, factor: float) -> tuple[int, ...]:
    """Make a colour darker (`factor` below 1) or lighter, at most 255."""
    return tuple(int(c) for c in np.clip(np.asarray(colour) * factor, 0, 255))
