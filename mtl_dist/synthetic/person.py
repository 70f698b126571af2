"""Who a drawn face is (`Identity`), what it does in a frame (`Look`), and what spoils that frame (`Spoil`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_dist.tasks import AUS

# Unlabelled movements that the prototypes of EMFACS need: upper lid raiser, nose wrinkler, lip stretcher.
HIDDEN_AUS = (5, 9, 20)
ALL_AUS = tuple(sorted(AUS + HIDDEN_AUS))
HAIR_STYLES = ("short", "long", "fringe", "bun", "bald")
HANDS = ("", "chin", "head", "chest", "fist", "palm", "wave")  # what the hands do; they stay outside the aligned crop

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
class Spoil:
    """What spoils a single picture and is in no label; by default nothing does."""

    motion_px: float = 0.0  # standard deviation of the path along which the picture is smeared
    motion_angle: float = 0.0  # radians
    lids: float = 0.0  # 0 as the action units have them .. 1 closed
    hand: tuple[float, float] | None = None  # where a hand passes before the face, in scene coordinates
    hand_angle: float = 0.0
    exposure: float = 1.0  # factor of the brightness


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
    spoil: Spoil = Spoil()


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
        crop_px=int(rng.integers(112, 161)),
        crop_blur_px=float(rng.uniform(0.25, 0.5)),
    )
