"""Draw what is around the face: wall, body, hair, glasses and hands. Posture and hands show in `cropped` only."""

from __future__ import annotations

import numpy as np

from mtl_dist.synthetic.canvas import Canvas, both_sides, ellipse, mirror, shade, smooth


def draw_wall(canvas: Canvas, wall) -> None:
    """A door frame and a picture, placed by the colour of the wall so that a video keeps them."""
    place = (sum(canvas.head.identity.wall) % 1.0) * 2 - 1
    canvas.fill(
        [(place * 2 - 4, -4), (place * 2 - 1.6, -4), (place * 2 - 1.6, 6), (place * 2 - 4, 6)],
        shade(wall, 0.84),
        scene=True,
    )
    canvas.fill(
        [(1.3 + place, -2.2), (2.3 + place, -2.2), (2.3 + place, -1.0), (1.3 + place, -1.0)],
        shade(wall, 1.12),
        scene=True,
    )


def draw_hair_behind(canvas: Canvas) -> None:
    """Long hair or a bun, drawn before the head, which covers most of it."""
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
        canvas.fill(smooth(both_sides(half), closed=True), shade(identity.hair, 0.8))
    elif identity.hair_style == "bun":
        canvas.fill(ellipse((0, -1.75), (0.48, 0.42)), shade(identity.hair, 0.9))


def draw_body(canvas: Canvas) -> None:
    """Neck and shoulders, in scene coordinates: raised shoulders swallow the neck, slumped ones slope away."""
    identity, raised = canvas.head.identity, canvas.head.look.shoulders
    top = 2.25 - 0.52 * raised
    slope = 0.55 - 0.42 * raised
    neck = both_sides([(0, 1.0), (0.52, 1.0), (0.5, top), (0.62, top + 0.5), (0, top + 0.6)])
    canvas.fill(neck, shade(identity.skin, 0.78), scene=True)
    half = [
        (0.45, top - 0.02),
        (1.1, top + 0.05 + 0.3 * slope),
        (1.75, top + 0.15 + slope),
        (2.15, top + 0.6 + slope),
        (2.3, top + 3),
    ]
    collar = [(0.0, top + 0.38)]
    canvas.fill(smooth(both_sides(collar + half), closed=True), shade(identity.clothes, 1), scene=True)
    canvas.line(smooth(mirror(half[:3], 1), closed=False), shade(identity.clothes, 0.7), 0.05, scene=True)
    canvas.line(smooth(mirror(half[:3], -1), closed=False), shade(identity.clothes, 0.7), 0.05, scene=True)


def draw_hair_in_front(canvas: Canvas) -> None:
    """Hair over the forehead and temples, drawn after the face."""
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
        np.concatenate([smooth(outer, closed=False), smooth(inner, closed=False)]),
        shade(identity.hair, 1),
    )
    canvas.line(smooth([(-0.7, -1.25), (-0.1, -1.42), (0.6, -1.3)], closed=False), shade(identity.hair, 1.25), 0.08)


def draw_glasses(canvas: Canvas) -> None:
    """Two rims, their sides and the bridge between them."""
    for side in (-1, 1):
        rim = smooth(
            mirror([(0.16, -0.18), (0.5, -0.24), (0.86, -0.18), (0.84, 0.18), (0.5, 0.27), (0.2, 0.2)], side),
            closed=True,
        )
        canvas.line(np.concatenate([rim, rim[:1]]), (38, 34, 36), 0.035, relief=0.1)
        canvas.line(mirror([(0.86, -0.1), (1.08, -0.06)], side), (38, 34, 36), 0.035)
    canvas.line([(-0.17, -0.06), (0, -0.1), (0.17, -0.06)], (38, 34, 36), 0.035, relief=0.1)


def draw_hands(canvas: Canvas) -> None:
    """Hands say in the cropped view what the aligned one does not see."""
    hand, side = canvas.head.look.hand, canvas.head.look.hand_side
    if hand == "chin":  # the head rests on a fist
        draw_hand(canvas, (side * 0.42, 2.28), angle=-side * 0.15, spread=0.0)
    elif hand == "head":  # both hands thrown up to the temples
        for s in (-1, 1):
            draw_hand(canvas, (s * 1.98, -0.05), angle=-s * 0.1, spread=0.2)
    elif hand == "chest":  # both fists drawn up below the chin
        for s in (-1, 1):
            draw_hand(canvas, (s * 0.62, 2.35), angle=-s * 0.1, spread=0.0)
    elif hand == "fist":
        draw_hand(canvas, (side * 1.65, 1.75), angle=0.0, spread=0.0)
    elif hand == "palm":  # pushes something away
        for s in (-1, 1):
            draw_hand(canvas, (s * 1.65, 2.15), angle=s * 0.35, spread=0.22)
    elif hand == "wave":
        draw_hand(canvas, (side * 1.9, 0.75), angle=side * 0.4, spread=0.34)


def draw_hand(canvas: Canvas, centre, *, angle: float, spread: float, size: float = 1.0) -> None:
    """A forearm, a palm and four fingers and a thumb (`spread` radians apart; 0 is a fist), in scene coordinates."""
    skin = canvas.head.identity.skin
    centre = np.asarray(centre, dtype=float)
    up = size * np.array((np.sin(angle), -np.cos(angle)))
    across = size * np.array((np.cos(angle), np.sin(angle)))
    elbow = centre - up * 2.4 + (np.sign(centre[0]) * 0.35, 0)
    canvas.line([centre - up * 0.25, elbow], shade(canvas.head.identity.clothes, 0.82), 0.44 * size, scene=True)
    canvas.fill(ellipse(centre, (0.3 * size, 0.32 * size)), shade(skin, 0.96), scene=True)
    for finger in range(4):
        root = centre + across * (0.14 * (finger - 1.5)) + up * 0.18
        if spread == 0.0:
            canvas.fill(ellipse(root, (0.09 * size, 0.13 * size), 10), shade(skin, 0.86), scene=True)
            continue
        tilt = angle + spread * (finger - 1.5)
        tip = root + size * np.array((np.sin(tilt), -np.cos(tilt))) * 0.46
        canvas.line([root, tip], shade(skin, 0.7), 0.15 * size, scene=True)
        canvas.line([root, tip], shade(skin, 1), 0.11 * size, scene=True)
    thumb = centre - across * np.sign(centre[0]) * 0.24
    canvas.line(
        [thumb, thumb + up * 0.22 - across * np.sign(centre[0]) * 0.12], shade(skin, 0.9), 0.13 * size, scene=True
    )
