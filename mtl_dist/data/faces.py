"""Draw one face: who (`Identity`), what it does (`Look`), and the two pictures of it (`render_views`).

The demo's and the tests' substitute for s-Aff-Wild2, whose licence forbids redistribution. Each action unit (AU) moves
its own part of the face the way FACS describes it (Ekman, Friesen and Hager 2002) and leaves its furrow or bulge there.

Face coordinates: origin between the eyes, x to the viewer's right, y down, unit = the distance between the eyes. So the
eyes lie at x = -0.5 and 0.5, the mouth at y = 1.12, the chin at y = 1.85. The pose of the head turns a face point into
scene coordinates (same unit and axes, where body and background live); a similarity transform takes it from there into
the pixels of a view. `points_N2` is (N points, x and y).
Colours are (3,) float arrays or tuples, RGB in [0, 255].
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from mtl_dist.tasks import AUS

ALIGNED_PX = 112
ALIGNED_EYES_PX = np.array(
    [[37.0, 40.0], [75.0, 40.0]]
)  # where alignment puts the two eyes: the face fills the picture
# Unlabelled movements that the prototypes of EMFACS need: upper lid raiser, nose wrinkler, lip stretcher.
HIDDEN_AUS = (5, 9, 20)
ALL_AUS = tuple(sorted(AUS + HIDDEN_AUS))
HAIR_STYLES = ("short", "long", "fringe", "bun", "bald")
HANDS = ("", "chin", "head", "chest", "fist", "palm", "wave")  # what the hands do; they stay outside the aligned crop
SUPERSAMPLE = 2

SKIN_TONES = ((246, 214, 190), (233, 190, 160), (214, 164, 128), (184, 130, 96), (142, 96, 68), (104, 70, 52))
HAIR_TONES = ((28, 24, 22), (58, 40, 28), (98, 66, 40), (160, 118, 66), (208, 176, 116), (150, 148, 146), (128, 56, 30))
IRIS_TONES = ((66, 42, 26), (92, 62, 32), (74, 104, 124), (84, 108, 74))
CLOTHES_TONES = (
    (52, 66, 98),
    (120, 44, 48),
    (58, 92, 74),
    (148, 140, 128),
    (42, 42, 46),
    (172, 128, 64),
    (196, 200, 206),
)
WALL_TONES = ((150, 160, 168), (176, 164, 146), (120, 132, 128), (196, 192, 186), (104, 108, 124), (160, 140, 128))


@dataclass(frozen=True)
class Identity:
    """What stays over a video. Proportions are multipliers around 1, colours RGB in [0, 255]."""

    face_width: float
    jaw_width: float
    chin_width: float
    eye_size: float
    eye_slant: float  # height of the outer above the inner corner, face units
    brow_thickness: float
    brow_height: float
    nose_width: float
    nose_length: float
    mouth_width: float
    lip_fullness: float
    skin: tuple[float, ...]
    hair: tuple[float, ...]
    iris: tuple[float, ...]
    clothes: tuple[float, ...]
    wall: tuple[float, ...]
    hair_style: str
    glasses: bool
    beard: float  # opacity, 0 for none
    age: float  # 0..1, depth of the lines that a face at rest already has
    crop_px: int  # side of the `cropped` pictures
    crop_blur_px: float  # what the detector's resampling loses there


@dataclass(frozen=True)
class Look:
    """What changes from frame to frame. Angles in radians; `aus` maps an AU's number to its intensity in [0, 1]."""

    aus: dict[int, float]
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)  # of the irises, in iris radii
    shoulders: float = 0.0  # -1 slumped .. 1 raised to the ears
    lean: float = 0.0  # -1 back (small in the cropped view) .. 1 forward
    hand: str = ""
    hand_side: int = 1  # -1 or 1: left or right of the picture
    tint: float = 0.0  # -1 cold and dim .. 1 warm and bright surroundings
    light_angle: float = 0.0  # direction the light comes from, 0 = right, pi / 2 = below
    light_strength: float = 0.0
    crop_shift: tuple[float, float] = (0.0, 0.0)  # the detector's error, in face units
    blur_px: float = 0.0  # of motion and focus, in both views


def make_identity(rng: np.random.Generator) -> Identity:
    """Draw a person and a place at random."""

    def around_one(spread: float) -> float:
        return float(np.clip(rng.normal(1, spread), 1 - 2 * spread, 1 + 2 * spread))

    def tone(palette) -> tuple[float, ...]:
        # mostly lighter or darker: a shift of a single channel makes people of green or lilac
        shift = rng.normal(0, 8) + rng.normal(0, 2, 3)
        return tuple(np.clip(np.array(palette[rng.integers(len(palette))]) + shift, 10, 250).tolist())

    skin = tone(SKIN_TONES)
    is_dark = sum(skin) < 400  # then hair and eyes are the darkest tones of their lists

    return Identity(
        face_width=around_one(0.05),
        jaw_width=around_one(0.05),
        chin_width=around_one(0.12),
        eye_size=around_one(0.07),
        eye_slant=float(rng.normal(0.01, 0.015)),
        brow_thickness=around_one(0.2),
        brow_height=around_one(0.06),
        nose_width=around_one(0.1),
        nose_length=around_one(0.04),
        mouth_width=around_one(0.06),
        lip_fullness=around_one(0.12),
        skin=skin,
        hair=tone(HAIR_TONES[:2] if is_dark else HAIR_TONES),
        iris=tone(IRIS_TONES[:2] if is_dark else IRIS_TONES),
        clothes=tone(CLOTHES_TONES),
        wall=tone(WALL_TONES),
        hair_style=str(rng.choice(HAIR_STYLES, p=(0.34, 0.26, 0.16, 0.14, 0.10))),
        glasses=bool(rng.random() < 0.16),
        beard=float(rng.uniform(0.35, 0.75)) if rng.random() < 0.18 else 0.0,
        age=float(rng.random() ** 2),
        crop_px=int(rng.integers(96, 161)),
        crop_blur_px=float(rng.uniform(0.6, 0.9)),
    )


def render_views(identity: Identity, look: Look, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Render one scene twice: `cropped` (`identity.crop_px` square, with context) and `cropped_aligned` (112 x 112).

    `rng` draws only the sensor's noise.
    """
    head = _Head(identity, look)
    cropped = _draw_scene(head, _crop_transform(head), size_px=identity.crop_px)
    # The detector's box was small in its video and was enlarged: the fine lines of the face do not survive it.
    cropped = cropped.filter(ImageFilter.GaussianBlur(identity.crop_blur_px * identity.crop_px / 128 + look.blur_px))
    aligned = _draw_scene(head, _align_transform(head), size_px=ALIGNED_PX)
    if look.blur_px > 0:
        aligned = aligned.filter(ImageFilter.GaussianBlur(look.blur_px))
    return _add_noise(cropped, rng), _add_noise(aligned, rng)


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode as JPEG (`quality` of 1..95)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


# ---------------------------------------------------------------- geometry


class _Head:
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


def _crop_transform(head: _Head) -> np.ndarray:
    """The (2, 3) matrix from scene to `cropped` pixels: a box of the detector, never rotated, 4.2 to 5.4 units wide."""
    look, side_px = head.look, head.identity.crop_px
    scale = side_px / (4.8 - 0.6 * look.lean)
    centre = (look.crop_shift[0], 0.8 + look.crop_shift[1])
    return np.array([[scale, 0, side_px / 2 - scale * centre[0]], [0, scale, side_px / 2 - scale * centre[1]]])


def _align_transform(head: _Head) -> np.ndarray:
    """The (2, 3) similarity from scene to `cropped_aligned` pixels that puts the eyes on ALIGNED_EYES_PX."""
    eyes = head.to_scene([(-0.5, 0), (0.5, 0)]) @ (1, 1j)  # as complex numbers a similarity is z -> a z + b
    target = ALIGNED_EYES_PX @ (1, 1j)
    a = (target[1] - target[0]) / (eyes[1] - eyes[0])
    b = target[0] - a * eyes[0]
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def _mirror(half_N2, side: int) -> np.ndarray:
    """Points written for the side x > 0, for `side` 1 or -1."""
    return np.asarray(half_N2, dtype=float) * (side, 1)


def _both(half_N2) -> np.ndarray:
    """Close a contour that is written for x >= 0, from top to bottom, by its mirror image."""
    half = np.asarray(half_N2, dtype=float)
    other = half[::-1] * (-1, 1)
    return np.concatenate([half, other[other[:, 0] < 0]])


def _ellipse(centre, radii, num_points: int = 20) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    return np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=1)


_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None]
# Catmull-Rom weights of the four neighbours of a segment, (6 steps, 4)
_CATMULL_ROM = (
    0.5
    * np.concatenate([np.ones_like(_STEPS), _STEPS, _STEPS**2, _STEPS**3], axis=1)
    @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
)


def _smooth(points_N2, *, closed: bool) -> np.ndarray:
    """A Catmull-Rom curve through the points, six times as dense."""
    p = np.asarray(points_N2, dtype=float)
    padded = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    neighbours = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)], axis=1)
    curve = np.einsum("sk,nkd->nsd", _CATMULL_ROM, neighbours).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


# ---------------------------------------------------------------- drawing


def _mix(colour, other, amount: float) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.asarray(colour) * (1 - amount) + np.asarray(other) * amount, 0, 255))


def _shade(colour, factor: float) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.asarray(colour) * factor, 0, 255))


class _Canvas:
    """A supersampled picture that takes face or scene coordinates, with soft layers for what is light or dark skin."""

    def __init__(self, head: _Head, transform: np.ndarray, image: Image.Image):
        self.head = head
        self.transform = transform  # scene to supersampled pixels
        self.unit_px = float(np.hypot(*transform[:, 0]))
        self.image = image
        self.pen = ImageDraw.Draw(image)

    def pixels(self, points_N2, *, relief: float = 0.0, scene: bool = False) -> list[tuple[float, float]]:
        points = np.asarray(points_N2, dtype=float) if scene else self.head.to_scene(points_N2, relief=relief)
        return list(map(tuple, (points @ self.transform[:, :2].T + self.transform[:, 2]).tolist()))

    def fill(self, points_N2, colour, *, relief: float = 0.0, scene: bool = False) -> None:
        self.pen.polygon(self.pixels(points_N2, relief=relief, scene=scene), fill=colour)

    def line(self, points_N2, colour, width: float, *, relief: float = 0.0, scene: bool = False) -> None:
        """`width` in face units."""
        width_px = max(1, round(width * self.unit_px))
        self.pen.line(self.pixels(points_N2, relief=relief, scene=scene), fill=colour, width=width_px, joint="curve")

    def layer(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        mask = Image.new("L", self.image.size, 0)
        return mask, ImageDraw.Draw(mask)

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
                pen.polygon(self.pixels(_ellipse(centre, radii)), fill=round(255 * min(1.0, opacity)))
        self.paste(colour, mask, blur=blur)

    def creases(self, colour, creases, *, blur: float = 0.012) -> None:
        """Paint (points, width, opacity) lines of one colour as one layer."""
        mask, pen = self.layer()
        for points, width, opacity in creases:
            if opacity > 0.03:
                line = self.pixels(_smooth(points, closed=False))
                width_px = width * self.unit_px
                opacity = min(1.0, opacity) * min(1.0, width_px)  # a line thinner than a pixel is fainter instead
                pen.line(line, fill=round(255 * opacity), width=max(1, round(width_px)), joint="curve")
        self.paste(colour, mask, blur=blur)


def _draw_scene(head: _Head, transform: np.ndarray, *, size_px: int) -> Image.Image:
    """Draw back to front."""
    identity, look = head.identity, head.look
    # Surroundings follow arousal only weakly, through `look.tint`.
    wall = _mix(identity.wall, (236, 176, 112) if look.tint > 0 else (58, 74, 104), 0.38 * abs(look.tint))
    canvas = _Canvas(head, transform * SUPERSAMPLE, Image.new("RGB", (size_px * SUPERSAMPLE,) * 2, wall))
    _draw_wall(canvas, wall)
    _draw_hair_behind(canvas)
    _draw_body(canvas)
    _draw_head(canvas)
    _draw_cheeks_and_nose(canvas)
    for side in (-1, 1):
        _draw_eye(canvas, side)
    _draw_lid_lines(canvas)
    _draw_mouth(canvas)
    _draw_lower_face_lines(canvas)
    _draw_brows(canvas)
    _draw_hair_in_front(canvas)
    if identity.glasses:
        _draw_glasses(canvas)
    _draw_hands(canvas)
    return _light(canvas.image.reduce(SUPERSAMPLE), look)


def _draw_wall(canvas: _Canvas, wall) -> None:
    """A door frame and a picture, placed by the colour of the wall so that a video keeps them."""
    place = (sum(canvas.head.identity.wall) % 1.0) * 2 - 1
    canvas.fill(
        [(place * 2 - 4, -4), (place * 2 - 1.6, -4), (place * 2 - 1.6, 6), (place * 2 - 4, 6)],
        _shade(wall, 0.84),
        scene=True,
    )
    canvas.fill(
        [(1.3 + place, -2.2), (2.3 + place, -2.2), (2.3 + place, -1.0), (1.3 + place, -1.0)],
        _shade(wall, 1.12),
        scene=True,
    )


def _draw_hair_behind(canvas: _Canvas) -> None:
    identity = canvas.head.identity
    wide = identity.face_width
    if identity.hair_style in ("long", "fringe"):
        half = [
            (0, -1.72),
            (0.8, -1.5),
            (1.28 * wide, -0.7),
            (1.36 * wide, 0.4),
            (1.34 * wide, 1.5),
            (1.15, 2.2),
            (0, 2.3),
        ]
        canvas.fill(_smooth(_both(half), closed=True), _shade(identity.hair, 0.8))
    elif identity.hair_style == "bun":
        canvas.fill(_ellipse((0, -1.75), (0.48, 0.42)), _shade(identity.hair, 0.9))


def _draw_body(canvas: _Canvas) -> None:
    """Neck and shoulders, in scene coordinates: raised shoulders swallow the neck, slumped ones slope away."""
    identity, raised = canvas.head.identity, canvas.head.look.shoulders
    top = 2.25 - 0.52 * raised
    slope = 0.55 - 0.42 * raised
    neck = _both([(0, 1.0), (0.52, 1.0), (0.5, top), (0.62, top + 0.5), (0, top + 0.6)])
    canvas.fill(neck, _shade(identity.skin, 0.78), scene=True)
    half = [
        (0.45, top - 0.02),
        (1.1, top + 0.05 + 0.3 * slope),
        (1.75, top + 0.15 + slope),
        (2.15, top + 0.6 + slope),
        (2.3, top + 3),
    ]
    collar = [(0.0, top + 0.38)]
    canvas.fill(_smooth(_both(collar + half), closed=True), _shade(identity.clothes, 1), scene=True)
    canvas.line(_smooth(_mirror(half[:3], 1), closed=False), _shade(identity.clothes, 0.7), 0.05, scene=True)
    canvas.line(_smooth(_mirror(half[:3], -1), closed=False), _shade(identity.clothes, 0.7), 0.05, scene=True)


def _head_contour(head: _Head) -> np.ndarray:
    """The outline of the face; AU 26 lengthens the jaw."""
    who, drop = head.identity, head.jaw
    half = [
        (0, -1.48),
        (0.6, -1.36),
        (1.0 * who.face_width, -0.82),
        (1.1 * who.face_width, -0.05),
        (1.06 * who.face_width * who.jaw_width, 0.65),
        (0.88 * who.jaw_width, 1.28 + 0.5 * drop),
        (0.44 * who.chin_width, 1.73 + drop),
        (0, 1.85 + drop),
    ]
    return _smooth(_both(half), closed=True)


def _draw_head(canvas: _Canvas) -> None:
    head, skin = canvas.head, canvas.head.identity.skin
    for side in (-1, 1):
        canvas.fill(_ellipse((side * 1.1 * head.identity.face_width, 0.22), (0.15, 0.3)), _shade(skin, 0.86))
    contour = _head_contour(head)
    canvas.fill(contour, _shade(skin, 1))
    # The turn of the head away from the viewer: darker towards the outline.
    mask, pen = canvas.layer()
    pen.polygon(canvas.pixels(contour), fill=120)
    inner = contour * (0.83, 0.86) + (0, 0.02)
    pen.polygon(canvas.pixels(inner), fill=0)
    canvas.paste(
        _shade(skin, 0.66),
        ImageChops.darker(mask.filter(ImageFilter.BoxBlur(0.1 * canvas.unit_px)), _solid(canvas, contour)),
    )
    if head.identity.beard:
        _draw_beard(canvas, contour)


def _solid(canvas: _Canvas, points_N2) -> Image.Image:
    mask, pen = canvas.layer()
    pen.polygon(canvas.pixels(points_N2), fill=255)
    return mask


def _draw_beard(canvas: _Canvas, contour: np.ndarray) -> None:
    head = canvas.head
    mask, pen = canvas.layer()
    jaw = contour[contour[:, 1] > 0.75]
    jaw = jaw[np.argsort(np.arctan2(jaw[:, 0], jaw[:, 1] - 0.75))]  # left to right along the chin
    cheek = _smooth(
        [(0.86, 0.8), (0.62, 1.0), (0.3, 0.86), (0, 0.84), (-0.3, 0.86), (-0.62, 1.0), (-0.86, 0.8)], closed=False
    )
    pen.polygon(canvas.pixels(np.concatenate([jaw, cheek])), fill=round(190 * head.identity.beard))
    canvas.paste(_mix(head.identity.hair, head.identity.skin, 0.25), mask, blur=0.05)


def _draw_cheeks_and_nose(canvas: _Canvas) -> None:
    """Sockets, cheeks (AU 6 bulges them up to the lower lid) and nose (AU 9 and 10 lift its wings)."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    skin = who.skin
    dark, light, warm = (
        _shade(skin, 0.62),
        _mix(_shade(skin, 1.22), (255, 235, 215), 0.14),
        _mix(skin, (205, 80, 70), 0.5),
    )
    wing, long = 0.21 * who.nose_width, 0.64 * who.nose_length
    wing_y = long - 0.05 * au[10] - 0.06 * au[9]
    sides = (-1, 1)
    canvas.blobs(
        dark,
        [((s * 0.5, -0.14), (0.3, 0.13), 0.28) for s in sides]
        + [((s * 0.13, 0.3), (0.05, 0.3), 0.2) for s in sides]
        + [((0, long + 0.1), (0.2, 0.05), 0.45), ((0, 1.42 + head.jaw * 0.9), (0.22, 0.05), 0.3)]
        # The bulge of AU 6 throws a shadow under itself.
        + [((s * 0.7, 0.74), (0.3, 0.09), 0.55 * au[6]) for s in sides],
        blur=0.09,
    )
    canvas.blobs(warm, [((s * 0.66, 0.5 - 0.06 * au[6]), (0.26, 0.18), 0.24 + 0.4 * au[6]) for s in sides], blur=0.12)
    canvas.blobs(
        light,
        [((0, 0.25), (0.05, 0.35), 0.4), ((0, long - 0.06), (0.09, 0.08), 0.5), ((0, -0.75), (0.5, 0.25), 0.22)]
        + [((s * 0.62, 0.42 - 0.06 * au[6]), (0.2, 0.1 + 0.05 * au[6]), 0.2 + 0.75 * au[6]) for s in sides],
        blur=0.07,
    )
    for side in sides:
        nostril = _ellipse((side * wing * 0.5, wing_y + 0.07), (wing * 0.3, 0.035), 12)
        canvas.fill(nostril, _shade(skin, 0.32), relief=0.2)
        curl = _smooth(
            _mirror([(wing * 0.8, wing_y - 0.1), (wing * 1.12, wing_y), (wing * 0.85, wing_y + 0.09)], side),
            closed=False,
        )
        canvas.line(curl, _shade(skin, 0.6), 0.022 + 0.015 * max(au[10], au[9]), relief=0.12)
    # AU 9 wrinkles the root of the nose.
    canvas.creases(
        _shade(skin, 0.5), [([(-0.13, y), (0, y - 0.04), (0.13, y)], 0.025, 0.7 * au[9]) for y in (0.12, 0.2, 0.28)]
    )


def _lids(head: _Head) -> tuple[float, float]:
    """How far the upper and the lower lid stand from the line between the eye's corners, in face units."""
    au, size = head.au, head.identity.eye_size
    upper = 0.135 * size * (1 + 0.5 * au[5]) * (1 - 0.65 * au[7]) * (1 - 0.1 * au[6])
    lower = 0.085 * size * (1 + 0.15 * au[5]) * (1 - 0.85 * au[7]) * (1 - 0.6 * au[6])
    return upper, lower


def _eye_contour(head: _Head, side: int) -> np.ndarray:
    upper, lower = _lids(head)
    wide, slant = 0.25 * head.identity.eye_size, head.identity.eye_slant
    half = [(0.5 - wide, 0.03), (0.44, -upper * 0.85), (0.53, -upper), (0.64, -upper * 0.7 - slant)]
    half += [(0.5 + wide, -slant), (0.62, lower * 0.8 - slant / 2), (0.5, lower), (0.38, lower * 0.75)]
    return _smooth(_mirror(half, side), closed=True)


def _draw_eye(canvas: _Canvas, side: int) -> None:
    head, who = canvas.head, canvas.head.identity
    contour = _eye_contour(head, side)
    opening = _solid(canvas, contour)
    radius = 0.118 * who.eye_size
    centre = np.array((side * 0.5, -0.025)) + radius * 0.6 * np.array(head.look.gaze)
    # The eyeball is drawn whole on a copy and shows through the opening of the lids.
    ball = _Canvas(head, canvas.transform, canvas.image.copy())
    ball.fill(_ellipse((side * 0.5, 0), (0.35, 0.3)), (240, 236, 232))
    ball.fill(_ellipse(centre, (radius, radius)), _shade(who.iris, 0.8))
    ball.fill(_ellipse(centre, (radius * 0.8, radius * 0.8)), _shade(who.iris, 1.25))
    ball.fill(_ellipse(centre, (radius * 0.45, radius * 0.45)), (14, 12, 12))
    ball.fill(_ellipse(centre - np.array((0.04, 0.045)), (0.025, 0.025), 10), (255, 255, 255))
    canvas.image.paste(ball.image, (0, 0), opening)
    canvas.line(contour[0:25], _shade(who.skin, 0.22), 0.036)  # the upper lid with its lashes
    canvas.line(contour[24:], _shade(who.skin, 0.55), 0.02)


def _draw_lid_lines(canvas: _Canvas) -> None:
    """The fold of the upper lid, the pouch under the eye (AU 6 and 7) and crow's feet (AU 6)."""
    head, au = canvas.head, canvas.head.au
    upper, lower = _lids(head)
    age = head.identity.age
    creases = []
    for side in (-1, 1):
        fold = 0.07 - 0.03 * au[7] + 0.02 * au[5]
        fold_line = [(0.3, -0.03 - fold * 0.6), (0.5, -upper - fold), (0.72, -upper * 0.5 - fold * 0.7)]
        pouch_y = lower + 0.07
        pouch = [(0.3, pouch_y - 0.01), (0.5, pouch_y + 0.05), (0.72, pouch_y - 0.03)]
        creases += [
            (_mirror(fold_line, side), 0.022, 0.55),
            (_mirror(pouch, side), 0.03, 0.12 + 0.15 * age + 0.75 * au[7] + 0.4 * au[6]),
        ]
        for rise in (-0.14, -0.02, 0.1):
            foot = [(0.82, rise * 0.35 + 0.03), (0.92, rise + 0.03), (1.0, rise * 1.5 + 0.05)]
            creases.append((_mirror(foot, side), 0.026, 0.1 * age + 0.9 * au[6]))
    canvas.creases(_shade(head.identity.skin, 0.42), creases)


def _draw_brows(canvas: _Canvas) -> None:
    """AU 1 lifts the inner ends, AU 2 the outer ends, AU 4 draws both down and together; the forehead folds."""
    who, au = canvas.head.identity, canvas.head.au
    rest = 0.36 * who.brow_height
    inner_x = 0.2 - 0.085 * au[4]
    inner_y = -rest + 0.06 - 0.2 * au[1] - 0.03 * au[2] + 0.15 * au[4] * (1 - 0.6 * au[1]) + 0.04 * au[9]
    arch_y = -rest - 0.05 - 0.06 * au[1] - 0.16 * au[2] + 0.1 * au[4]
    outer_y = -rest + 0.08 - 0.2 * au[2] + 0.03 * au[4]
    thick = 0.055 * who.brow_thickness
    creases = []
    for side in (-1, 1):
        centre = np.array([(inner_x, inner_y), (0.36, (inner_y + arch_y) / 2 - 0.015), (0.6, arch_y), (0.88, outer_y)])
        upper, lower = (
            centre - np.outer((1, 1.1, 0.9, 0.2), (0, thick)),
            centre + np.outer((1, 1, 0.7, 0.1), (0, thick)),
        )
        band = np.concatenate([_smooth(upper, closed=False), _smooth(lower, closed=False)[::-1]])
        canvas.fill(_mirror(band, side), _mix(_shade(who.hair, 0.75), who.skin, 0.12))
        # Outer forehead folds of AU 2 curve over the lifted brow; the vertical furrow of AU 4 stands between the brows.
        for k, y in enumerate((-0.14, -0.25)):
            fold = [(0.45, arch_y + y), (0.7, arch_y + y - 0.03), (0.92, outer_y + y + 0.02)]
            creases.append((_mirror(fold, side), 0.028, (0.8 - 0.2 * k) * au[2]))
        furrow = [(0.085, inner_y - 0.12), (0.065, inner_y + 0.02), (0.085, inner_y + 0.16)]
        creases.append((_mirror(furrow, side), 0.036, 0.1 * who.age + 0.95 * au[4]))
        creases.append(
            (_mirror([(0.22, inner_y - 0.2), (0.16, inner_y - 0.12), (0.14, inner_y - 0.03)], side), 0.024, 0.5 * au[4])
        )
    for k, y in enumerate((-0.13, -0.24, -0.35)):
        fold = [
            (-0.36, inner_y + y + 0.02),
            (-0.15, inner_y + y - 0.02),
            (0.15, inner_y + y - 0.02),
            (0.36, inner_y + y + 0.02),
        ]
        creases.append((fold, 0.028, (0.85 - 0.2 * k) * au[1] + 0.12 * who.age))
    canvas.blobs(_shade(who.skin, 0.5), [((0, inner_y + 0.06), (0.11, 0.14), 0.5 * au[4])], blur=0.05)
    canvas.creases(_shade(who.skin, 0.42), creases)


@dataclass(frozen=True)
class _Mouth:
    """The mouth's shape in face units: x of the corner, and the y of corner and of the four lip edges at the middle."""

    wide: float
    corner_y: float
    top: float
    upper_edge: float
    lower_edge: float
    bottom: float


def _mouth(head: _Head) -> _Mouth:
    au, full = head.au, head.identity.lip_fullness
    opening = 0.11 * au[25] + head.jaw * (0.5 + 0.45 * au[25])
    # Tightening (23) rolls the lips in and draws the corners together; pressing (24) only thins them.
    thin = (1 - 0.45 * au[23]) * (1 - 0.85 * au[24])
    rest = 1.12 - 0.03 * au[12]
    upper_edge = rest - 0.14 * au[10] - 0.3 * opening * au[12]
    lower_edge = upper_edge + opening + 0.07 * au[10] * au[25] + 0.02
    return _Mouth(
        wide=0.38
        * head.identity.mouth_width
        * (1 + 0.36 * au[12] + 0.35 * au[20] + 0.14 * au[24] - 0.3 * au[23] - 0.16 * au[26] * (1 - au[12])),
        corner_y=rest + 0.01 + 0.02 * au[10] - 0.17 * au[12] + 0.17 * au[15] + 0.4 * opening + 0.03 * au[20],
        top=upper_edge - 0.1 * full * thin * (1 - 0.2 * au[12]),
        upper_edge=upper_edge,
        lower_edge=lower_edge,
        bottom=lower_edge + 0.13 * full * thin * (1 - 0.15 * au[12]),
    )


def _lip_curve(mouth: _Mouth, y: float, *, bow: float = 0.0, fullness: float = 0.6) -> np.ndarray:
    """One edge of a lip, from the left to the right corner; `bow` dips the middle as in a cupid's bow."""
    side_y = mouth.corner_y + (y - mouth.corner_y) * fullness
    half = [(0.14, y - bow), (0.55 * mouth.wide, side_y - bow * 0.4), (mouth.wide, mouth.corner_y)]
    return _smooth([(-x, v) for x, v in half[::-1]] + [(0, y)] + half, closed=False)


def _draw_mouth(canvas: _Canvas) -> None:
    """Lips, and between parted lips (AU 25) teeth, tongue and the dark of the mouth."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    mouth = _mouth(head)
    lips = _mix(_mix(who.skin, (176, 62, 66), 0.48), (150, 40, 44), 0.3 * au[23])
    top, bottom = _lip_curve(mouth, mouth.top, bow=0.03), _lip_curve(mouth, mouth.bottom, fullness=0.78)
    upper, lower = _lip_curve(mouth, mouth.upper_edge, fullness=0.75), _lip_curve(mouth, mouth.lower_edge, fullness=0.8)
    canvas.fill(np.concatenate([top, lower[::-1]]), _shade(lips, 0.88))
    canvas.fill(np.concatenate([upper, bottom[::-1]]), lips)
    gap = mouth.lower_edge - mouth.upper_edge
    if gap > 0.08:  # less is a face at rest
        inside = np.concatenate([upper, lower[::-1]])
        hole = _solid(canvas, inside)
        canvas.image.paste((58, 16, 18), (0, 0), hole)
        teeth = np.concatenate([upper, upper[::-1] + np.array((0, min(0.11, gap * 0.75)))])
        canvas.image.paste((238, 232, 220), (0, 0), ImageChops.darker(hole, _solid(canvas, teeth)))
        if gap > 0.2:
            tongue = _ellipse((0, mouth.lower_edge + 0.01), (mouth.wide * 0.55, gap * 0.32))
            canvas.image.paste((176, 76, 78), (0, 0), ImageChops.darker(hole, _solid(canvas, tongue)))
    else:
        # Pressed lips (AU 24) meet in a hard straight line.
        canvas.line(upper, _shade(lips, 0.42 - 0.2 * au[24]), 0.026 + 0.03 * au[24])
    canvas.blobs(
        _mix(lips, (255, 225, 220), 0.6), [((0, (mouth.lower_edge + mouth.bottom) / 2), (0.16, 0.025), 0.45)], blur=0.03
    )


def _draw_lower_face_lines(canvas: _Canvas) -> None:
    """Nasolabial fold (AU 10, 12), lines at the corners (15), around the lips (23), bulges beside pressed lips (24)."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    mouth = _mouth(head)
    wing = 0.24 * who.nose_width
    fold_strength = 0.12 + 0.15 * who.age + 0.6 * au[10] + 0.4 * au[12]
    creases, pressed = [], []
    for side in (-1, 1):
        out = mouth.wide + 0.12 + 0.08 * au[12]
        fold = [(wing + 0.05, 0.6 - 0.06 * au[10]), (wing + 0.16 + 0.06 * au[10], 0.76), (out, mouth.corner_y - 0.08)]
        creases.append((_mirror(fold, side), 0.026 + 0.018 * au[10], fold_strength))
        dimple = [
            (mouth.wide + 0.05, mouth.corner_y - 0.09),
            (mouth.wide + 0.09, mouth.corner_y),
            (mouth.wide + 0.05, mouth.corner_y + 0.08),
        ]
        creases.append((_mirror(dimple, side), 0.03, 0.7 * au[12] + 0.85 * au[24]))
        hook = [
            (mouth.wide - 0.02, mouth.corner_y),
            (mouth.wide + 0.07, mouth.corner_y + 0.1),
            (mouth.wide + 0.06, mouth.corner_y + 0.22),
        ]
        creases.append((_mirror(hook, side), 0.034, 0.9 * au[15]))
        for x in (0.08, 0.18, 0.27):  # the rim of tightened lips gathers in short upright lines
            creases.append((_mirror([(x, mouth.top - 0.1), (x * 0.95, mouth.top - 0.01)], side), 0.022, 0.5 * au[23]))
            creases.append(
                (_mirror([(x, mouth.bottom + 0.1), (x * 0.95, mouth.bottom + 0.01)], side), 0.022, 0.5 * au[23])
            )
        pressed.append(((side * 0.2, mouth.bottom + 0.09), (0.2, 0.075), 0.75 * au[24]))
        pressed.append(((side * 0.17, mouth.top - 0.07), (0.17, 0.06), 0.75 * au[24]))
    canvas.blobs(_mix(_shade(who.skin, 1.25), (255, 235, 220), 0.15), pressed, blur=0.04)
    # A shadow below the lower lip, deeper below the bulge of pressed lips; the chin's boss wrinkles with AU 15.
    shadow = [
        ((0, mouth.bottom + 0.09), (0.2, 0.035), 0.3 * (1 - au[24])),
        ((0, mouth.bottom + 0.24), (0.34, 0.05), 0.6 * au[24]),
        ((0, mouth.bottom + 0.3), (0.2, 0.1), 0.4 * au[15]),
    ]
    canvas.blobs(_shade(who.skin, 0.6), shadow, blur=0.05)
    canvas.creases(_shade(who.skin, 0.42), creases)


def _draw_hair_in_front(canvas: _Canvas) -> None:
    identity = canvas.head.identity
    wide = identity.face_width
    if identity.hair_style == "bald":
        return
    low = -0.72 if identity.hair_style == "fringe" else -1.0
    outer = [
        (1.14 * wide, 0.0),
        (1.16 * wide, -0.8),
        (0.72, -1.55),
        (0, -1.7),
        (-0.72, -1.55),
        (-1.16 * wide, -0.8),
        (-1.14 * wide, 0.0),
    ]
    inner = [
        (-1.02 * wide, -0.35),
        (-0.8, low + 0.06),
        (-0.2, low - 0.08),
        (0.35, low),
        (0.85, low + 0.1),
        (1.02 * wide, -0.35),
    ]
    canvas.fill(
        np.concatenate([_smooth(outer, closed=False), _smooth(inner, closed=False)]),
        _shade(identity.hair, 1),
    )
    canvas.line(_smooth([(-0.7, -1.25), (-0.1, -1.42), (0.6, -1.3)], closed=False), _shade(identity.hair, 1.25), 0.08)


def _draw_glasses(canvas: _Canvas) -> None:
    for side in (-1, 1):
        rim = _smooth(
            _mirror([(0.16, -0.18), (0.5, -0.24), (0.86, -0.18), (0.84, 0.18), (0.5, 0.27), (0.2, 0.2)], side),
            closed=True,
        )
        canvas.line(np.concatenate([rim, rim[:1]]), (38, 34, 36), 0.035, relief=0.1)
        canvas.line(_mirror([(0.86, -0.1), (1.08, -0.06)], side), (38, 34, 36), 0.035)
    canvas.line([(-0.17, -0.06), (0, -0.1), (0.17, -0.06)], (38, 34, 36), 0.035, relief=0.1)


def _draw_hands(canvas: _Canvas) -> None:
    """Hands say in the cropped view what the aligned one does not see."""
    hand, side = canvas.head.look.hand, canvas.head.look.hand_side
    if hand == "chin":  # the head rests on a fist
        _draw_hand(canvas, (side * 0.42, 2.28), angle=-side * 0.15, spread=0.0)
    elif hand == "head":  # both hands thrown up to the temples
        for s in (-1, 1):
            _draw_hand(canvas, (s * 1.98, -0.05), angle=-s * 0.1, spread=0.2)
    elif hand == "chest":  # both fists drawn up below the chin
        for s in (-1, 1):
            _draw_hand(canvas, (s * 0.62, 2.35), angle=-s * 0.1, spread=0.0)
    elif hand == "fist":
        _draw_hand(canvas, (side * 1.65, 1.75), angle=0.0, spread=0.0)
    elif hand == "palm":  # pushes something away
        for s in (-1, 1):
            _draw_hand(canvas, (s * 1.65, 2.15), angle=s * 0.35, spread=0.22)
    elif hand == "wave":
        _draw_hand(canvas, (side * 1.9, 0.75), angle=side * 0.4, spread=0.34)


def _draw_hand(canvas: _Canvas, centre, *, angle: float, spread: float) -> None:
    """A forearm, a palm and four fingers and a thumb (`spread` radians apart; 0 is a fist), in scene coordinates."""
    skin = canvas.head.identity.skin
    centre = np.asarray(centre, dtype=float)
    up = np.array((np.sin(angle), -np.cos(angle)))
    across = np.array((np.cos(angle), np.sin(angle)))
    elbow = centre - up * 2.4 + (np.sign(centre[0]) * 0.35, 0)
    canvas.line([centre - up * 0.25, elbow], _shade(canvas.head.identity.clothes, 0.82), 0.44, scene=True)
    canvas.fill(_ellipse(centre, (0.3, 0.32)), _shade(skin, 0.96), scene=True)
    for finger in range(4):
        root = centre + across * (0.14 * (finger - 1.5)) + up * 0.18
        if spread == 0.0:
            canvas.fill(_ellipse(root, (0.09, 0.13), 10), _shade(skin, 0.86), scene=True)
            continue
        tilt = angle + spread * (finger - 1.5)
        tip = root + np.array((np.sin(tilt), -np.cos(tilt))) * 0.46
        canvas.line([root, tip], _shade(skin, 0.7), 0.15, scene=True)
        canvas.line([root, tip], _shade(skin, 1), 0.11, scene=True)
    thumb = centre - across * np.sign(centre[0]) * 0.24
    canvas.line([thumb, thumb + up * 0.22 - across * np.sign(centre[0]) * 0.12], _shade(skin, 0.9), 0.13, scene=True)


def _light(image: Image.Image, look: Look) -> Image.Image:
    """Multiply by a linear gradient (the light's direction) and a colour cast (warm or cold)."""
    size = image.size[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    gradient = np.cos(look.light_angle) * ramp[None, :] + np.sin(look.light_angle) * ramp[:, None]
    cast = 1 + np.array((0.05, 0.01, -0.05), dtype=np.float32) * look.tint
    pixels = np.asarray(image, dtype=np.float32) * ((1 + look.light_strength * gradient)[:, :, None] * cast)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.integers(-4, 5, size=(image.size[1], image.size[0], 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))
