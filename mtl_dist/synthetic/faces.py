"""Draw the two pictures of one face (`render_views`), back to front, a function a part of it.

The demo's and the tests' substitute for s-Aff-Wild2, whose licence forbids redistribution. Each action unit (AU) moves
its own part of the face the way FACS describes it (Ekman, Friesen and Hager 2002) and leaves its furrow or bulge there.

Coordinates and colours are those of `canvas.py`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from mtl_dist.synthetic.canvas import (
    ALIGNED_PX,
    Canvas,
    Head,
    align_transform,
    both_sides,
    crop_transform,
    ellipse,
    mirror,
    mix,
    shade,
    smooth,
)
from mtl_dist.synthetic.figure import (
    draw_body,
    draw_glasses,
    draw_hair_behind,
    draw_hair_in_front,
    draw_hands,
    draw_wall,
)
from mtl_dist.synthetic.person import Identity, Look
from mtl_dist.synthetic.spoiling import draw_passing_hand, spoil_picture

SUPERSAMPLE = 2


def render_views(identity: Identity, look: Look, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Render one scene twice: `cropped` (`identity.crop_px` square, with context) and `cropped_aligned` (112 x 112).

    `rng` draws only the sensor's noise.
    """
    head = Head(identity, look)
    cropped = _draw_scene(head, crop_transform(head), size_px=identity.crop_px)
    # The detector's box was small in its video and was enlarged: the fine lines of the face do not survive it.
    cropped = cropped.filter(ImageFilter.GaussianBlur(identity.crop_blur_px * identity.crop_px / 128 + look.blur_px))
    aligned = _draw_scene(head, align_transform(head), size_px=ALIGNED_PX)
    if look.blur_px > 0:
        aligned = aligned.filter(ImageFilter.GaussianBlur(look.blur_px))
    cropped, aligned = (spoil_picture(image, look.spoil) for image in (cropped, aligned))
    return _add_noise(cropped, rng), _add_noise(aligned, rng)


def encode_jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Encode as JPEG (`quality` of 1..95)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _draw_scene(head: Head, transform: np.ndarray, *, size_px: int) -> Image.Image:
    """Draw back to front."""
    identity, look = head.identity, head.look
    # Surroundings follow arousal only weakly, through `look.tint`.
    wall = mix(identity.wall, (236, 176, 112) if look.tint > 0 else (58, 74, 104), 0.38 * abs(look.tint))
    canvas = Canvas(head, transform * SUPERSAMPLE, Image.new("RGB", (size_px * SUPERSAMPLE,) * 2, wall))
    draw_wall(canvas, wall)
    draw_hair_behind(canvas)
    draw_body(canvas)
    _draw_head(canvas)
    _draw_cheeks_and_nose(canvas)
    for side in (-1, 1):
        _draw_eye(canvas, side)
    _draw_lid_lines(canvas)
    _draw_mouth(canvas)
    _draw_lower_face_lines(canvas)
    _draw_brows(canvas)
    draw_hair_in_front(canvas)
    if identity.glasses:
        draw_glasses(canvas)
    draw_hands(canvas)
    draw_passing_hand(canvas)
    return _light(canvas.image.reduce(SUPERSAMPLE), look)


def _head_contour(head: Head) -> np.ndarray:
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
    return smooth(both_sides(half), closed=True)


def _draw_head(canvas: Canvas) -> None:
    head, skin = canvas.head, canvas.head.identity.skin
    for side in (-1, 1):
        canvas.fill(ellipse((side * 1.1 * head.identity.face_width, 0.22), (0.15, 0.3)), shade(skin, 0.86))
    contour = _head_contour(head)
    canvas.fill(contour, shade(skin, 1))
    # The turn of the head away from the viewer: darker towards the outline.
    mask, pen = canvas.layer()
    pen.polygon(canvas.pixels(contour), fill=120)
    inner = contour * (0.83, 0.86) + (0, 0.02)
    pen.polygon(canvas.pixels(inner), fill=0)
    canvas.paste(
        shade(skin, 0.66),
        ImageChops.darker(mask.filter(ImageFilter.BoxBlur(0.1 * canvas.unit_px)), canvas.solid(contour)),
    )
    if head.identity.beard:
        _draw_beard(canvas, contour)


def _draw_beard(canvas: Canvas, contour: np.ndarray) -> None:
    head = canvas.head
    mask, pen = canvas.layer()
    jaw = contour[contour[:, 1] > 0.75]
    jaw = jaw[np.argsort(np.arctan2(jaw[:, 0], jaw[:, 1] - 0.75))]  # left to right along the chin
    cheek = smooth(
        [(0.86, 0.8), (0.62, 1.0), (0.3, 0.86), (0, 0.84), (-0.3, 0.86), (-0.62, 1.0), (-0.86, 0.8)], closed=False
    )
    pen.polygon(canvas.pixels(np.concatenate([jaw, cheek])), fill=round(190 * head.identity.beard))
    canvas.paste(mix(head.identity.hair, head.identity.skin, 0.25), mask, blur=0.05)


def _draw_cheeks_and_nose(canvas: Canvas) -> None:
    """Sockets, cheeks (AU 6 bulges them up to the lower lid) and nose (AU 9 and 10 lift its wings)."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    skin = who.skin
    dark, light, warm = (
        shade(skin, 0.62),
        mix(shade(skin, 1.22), (255, 235, 215), 0.14),
        mix(skin, (205, 80, 70), 0.5),
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
        nostril = ellipse((side * wing * 0.5, wing_y + 0.07), (wing * 0.3, 0.035), 12)
        canvas.fill(nostril, shade(skin, 0.32), relief=0.2)
        curl = smooth(
            mirror([(wing * 0.8, wing_y - 0.1), (wing * 1.12, wing_y), (wing * 0.85, wing_y + 0.09)], side),
            closed=False,
        )
        canvas.line(curl, shade(skin, 0.6), 0.022 + 0.015 * max(au[10], au[9]), relief=0.12)
    # AU 9 wrinkles the root of the nose.
    canvas.creases(
        shade(skin, 0.5), [([(-0.13, y), (0, y - 0.04), (0.13, y)], 0.025, 0.7 * au[9]) for y in (0.12, 0.2, 0.28)]
    )


def _lids(head: Head) -> tuple[float, float]:
    """How far the upper and the lower lid stand from the line between the eye's corners, in face units."""
    au, size, closed = head.au, head.identity.eye_size, head.look.spoil.lids
    upper = 0.135 * size * (1 + 0.5 * au[5]) * (1 - 0.65 * au[7]) * (1 - 0.1 * au[6])
    upper -= closed * (upper + 0.02)  # a closed lid hangs a little below the line
    lower = 0.085 * size * (1 + 0.15 * au[5]) * (1 - 0.85 * au[7]) * (1 - 0.6 * au[6])
    return upper, lower


def _eye_contour(head: Head, side: int) -> np.ndarray:
    upper, lower = _lids(head)
    wide, slant = 0.25 * head.identity.eye_size, head.identity.eye_slant
    half = [(0.5 - wide, 0.03), (0.44, -upper * 0.85), (0.53, -upper), (0.64, -upper * 0.7 - slant)]
    half += [(0.5 + wide, -slant), (0.62, lower * 0.8 - slant / 2), (0.5, lower), (0.38, lower * 0.75)]
    return smooth(mirror(half, side), closed=True)


def _draw_eye(canvas: Canvas, side: int) -> None:
    head, who = canvas.head, canvas.head.identity
    contour = _eye_contour(head, side)
    opening = canvas.solid(contour)
    radius = 0.118 * who.eye_size
    centre = np.array((side * 0.5, -0.025)) + radius * 0.6 * np.array(head.look.gaze)
    # The eyeball is drawn whole on a copy and shows through the opening of the lids.
    ball = Canvas(head, canvas.transform, canvas.image.copy())
    ball.fill(ellipse((side * 0.5, 0), (0.35, 0.3)), (240, 236, 232))
    ball.fill(ellipse(centre, (radius, radius)), shade(who.iris, 0.8))
    ball.fill(ellipse(centre, (radius * 0.8, radius * 0.8)), shade(who.iris, 1.25))
    ball.fill(ellipse(centre, (radius * 0.45, radius * 0.45)), (14, 12, 12))
    ball.fill(ellipse(centre - np.array((0.04, 0.045)), (0.025, 0.025), 10), (255, 255, 255))
    canvas.image.paste(ball.image, (0, 0), opening)
    canvas.line(contour[0:25], shade(who.skin, 0.22), 0.036)  # the upper lid with its lashes
    canvas.line(contour[24:], shade(who.skin, 0.55), 0.02)


def _draw_lid_lines(canvas: Canvas) -> None:
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
            (mirror(fold_line, side), 0.022, 0.55),
            (mirror(pouch, side), 0.03, 0.12 + 0.15 * age + 0.75 * au[7] + 0.4 * au[6]),
        ]
        for rise in (-0.14, -0.02, 0.1):
            foot = [(0.82, rise * 0.35 + 0.03), (0.92, rise + 0.03), (1.0, rise * 1.5 + 0.05)]
            creases.append((mirror(foot, side), 0.026, 0.1 * age + 0.9 * au[6]))
    canvas.creases(shade(head.identity.skin, 0.42), creases)


def _draw_brows(canvas: Canvas) -> None:
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
        band = np.concatenate([smooth(upper, closed=False), smooth(lower, closed=False)[::-1]])
        canvas.fill(mirror(band, side), mix(shade(who.hair, 0.75), who.skin, 0.12))
        # Outer forehead folds of AU 2 curve over the lifted brow; the vertical furrow of AU 4 stands between the brows.
        for k, y in enumerate((-0.14, -0.25)):
            fold = [(0.45, arch_y + y), (0.7, arch_y + y - 0.03), (0.92, outer_y + y + 0.02)]
            creases.append((mirror(fold, side), 0.028, (0.8 - 0.2 * k) * au[2]))
        furrow = [(0.085, inner_y - 0.12), (0.065, inner_y + 0.02), (0.085, inner_y + 0.16)]
        creases.append((mirror(furrow, side), 0.036, 0.1 * who.age + 0.95 * au[4]))
        creases.append(
            (mirror([(0.22, inner_y - 0.2), (0.16, inner_y - 0.12), (0.14, inner_y - 0.03)], side), 0.024, 0.5 * au[4])
        )
    for k, y in enumerate((-0.13, -0.24, -0.35)):
        fold = [
            (-0.36, inner_y + y + 0.02),
            (-0.15, inner_y + y - 0.02),
            (0.15, inner_y + y - 0.02),
            (0.36, inner_y + y + 0.02),
        ]
        creases.append((fold, 0.028, (0.85 - 0.2 * k) * au[1] + 0.12 * who.age))
    canvas.blobs(shade(who.skin, 0.5), [((0, inner_y + 0.06), (0.11, 0.14), 0.5 * au[4])], blur=0.05)
    canvas.creases(shade(who.skin, 0.42), creases)


@dataclass(frozen=True)
class _Mouth:
    """The mouth's shape in face units: x of the corner, and the y of corner and of the four lip edges at the middle."""

    wide: float
    corner_y: float
    top: float
    upper_edge: float
    lower_edge: float
    bottom: float


def _mouth(head: Head) -> _Mouth:
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
    return smooth([(-x, v) for x, v in half[::-1]] + [(0, y)] + half, closed=False)


def _draw_mouth(canvas: Canvas) -> None:
    """Lips, and between parted lips (AU 25) teeth, tongue and the dark of the mouth."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    mouth = _mouth(head)
    lips = mix(mix(who.skin, (176, 62, 66), 0.48), (150, 40, 44), 0.3 * au[23])
    top, bottom = _lip_curve(mouth, mouth.top, bow=0.03), _lip_curve(mouth, mouth.bottom, fullness=0.78)
    upper, lower = _lip_curve(mouth, mouth.upper_edge, fullness=0.75), _lip_curve(mouth, mouth.lower_edge, fullness=0.8)
    canvas.fill(np.concatenate([top, lower[::-1]]), shade(lips, 0.88))
    canvas.fill(np.concatenate([upper, bottom[::-1]]), lips)
    gap = mouth.lower_edge - mouth.upper_edge
    if gap > 0.08:  # less is a face at rest
        inside = np.concatenate([upper, lower[::-1]])
        hole = canvas.solid(inside)
        canvas.image.paste((58, 16, 18), (0, 0), hole)
        teeth = np.concatenate([upper, upper[::-1] + np.array((0, min(0.11, gap * 0.75)))])
        canvas.image.paste((238, 232, 220), (0, 0), ImageChops.darker(hole, canvas.solid(teeth)))
        if gap > 0.2:
            tongue = ellipse((0, mouth.lower_edge + 0.01), (mouth.wide * 0.55, gap * 0.32))
            canvas.image.paste((176, 76, 78), (0, 0), ImageChops.darker(hole, canvas.solid(tongue)))
    else:
        # Pressed lips (AU 24) meet in a hard straight line.
        canvas.line(upper, shade(lips, 0.42 - 0.2 * au[24]), 0.026 + 0.03 * au[24])
    canvas.blobs(
        mix(lips, (255, 225, 220), 0.6), [((0, (mouth.lower_edge + mouth.bottom) / 2), (0.16, 0.025), 0.45)], blur=0.03
    )


def _draw_lower_face_lines(canvas: Canvas) -> None:
    """Nasolabial fold (AU 10, 12), lines at the corners (15), around the lips (23), bulges beside pressed lips (24)."""
    head, who, au = canvas.head, canvas.head.identity, canvas.head.au
    mouth = _mouth(head)
    wing = 0.24 * who.nose_width
    fold_strength = 0.12 + 0.15 * who.age + 0.6 * au[10] + 0.4 * au[12]
    creases, pressed = [], []
    for side in (-1, 1):
        out = mouth.wide + 0.12 + 0.08 * au[12]
        fold = [(wing + 0.05, 0.6 - 0.06 * au[10]), (wing + 0.16 + 0.06 * au[10], 0.76), (out, mouth.corner_y - 0.08)]
        creases.append((mirror(fold, side), 0.026 + 0.018 * au[10], fold_strength))
        dimple = [
            (mouth.wide + 0.05, mouth.corner_y - 0.09),
            (mouth.wide + 0.09, mouth.corner_y),
            (mouth.wide + 0.05, mouth.corner_y + 0.08),
        ]
        creases.append((mirror(dimple, side), 0.03, 0.7 * au[12] + 0.85 * au[24]))
        hook = [
            (mouth.wide - 0.02, mouth.corner_y),
            (mouth.wide + 0.07, mouth.corner_y + 0.1),
            (mouth.wide + 0.06, mouth.corner_y + 0.22),
        ]
        creases.append((mirror(hook, side), 0.034, 0.9 * au[15]))
        for x in (0.08, 0.18, 0.27):  # the rim of tightened lips gathers in short upright lines
            creases.append((mirror([(x, mouth.top - 0.1), (x * 0.95, mouth.top - 0.01)], side), 0.022, 0.5 * au[23]))
            creases.append(
                (mirror([(x, mouth.bottom + 0.1), (x * 0.95, mouth.bottom + 0.01)], side), 0.022, 0.5 * au[23])
            )
        pressed.append(((side * 0.2, mouth.bottom + 0.09), (0.2, 0.075), 0.75 * au[24]))
        pressed.append(((side * 0.17, mouth.top - 0.07), (0.17, 0.06), 0.75 * au[24]))
    canvas.blobs(mix(shade(who.skin, 1.25), (255, 235, 220), 0.15), pressed, blur=0.04)
    # A shadow below the lower lip, deeper below the bulge of pressed lips; the chin's boss wrinkles with AU 15.
    shadow = [
        ((0, mouth.bottom + 0.09), (0.2, 0.035), 0.3 * (1 - au[24])),
        ((0, mouth.bottom + 0.24), (0.34, 0.05), 0.6 * au[24]),
        ((0, mouth.bottom + 0.3), (0.2, 0.1), 0.4 * au[15]),
    ]
    canvas.blobs(shade(who.skin, 0.6), shadow, blur=0.05)
    canvas.creases(shade(who.skin, 0.42), creases)


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
