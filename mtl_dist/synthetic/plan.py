"""Plan a drawn data set: who does what in which frame, and its labels. Everything but the pixels.

A video is one person who passes through a few *episodes*, each with one expression: its action units come from the
prototypes of EMFACS (Friesen and Ekman 1983), valence and arousal from its place on the circumplex (Russell 1980). What
is not labelled, how often and for which whole videos, follows the real set; so do duplicate rows and the gaps between
frames.

The two views complement each other by design: part of the expression and of the arousal is told by posture and hands,
which only `cropped` shows; its small face has lost the fine lines that `cropped_aligned` tells the action units by.

Every random number is keyed by (seed, split, video[, frame]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mtl_dist.shards.annotations import HEADER
from mtl_dist.synthetic.person import ALL_AUS, HANDS, Identity, Look, make_identity
from mtl_dist.tasks import AUS, EXPRESSIONS, MISSING_AU, MISSING_EXPR, MISSING_VA, SPLITS

AU_THRESHOLD = 0.4  # an AU is labelled 1 above this intensity; few frames come near it
DUPLICATE_SHARE = 0.007
NO_LABEL_SHARE = 0.003  # of train rows
SINGLE_AU_MISSING_SHARE = 0.005

# Which tasks a video is labelled for, as (VA, EXPR, AU), and how often. Train: 73%, 64% and 73%, and 37% for all three.
TASK_PATTERNS = {
    "train": {
        (True, True, True): 0.366,
        (True, True, False): 0.08,
        (True, False, True): 0.20,
        (False, True, True): 0.081,
        (True, False, False): 0.084,
        (False, True, False): 0.11,
        (False, False, True): 0.079,
    },
    "val": {(True, True, True): 0.57, (True, False, True): 0.43},
}

EXPRESSION_SHARES = {
    "Neutral": 0.18,
    "Anger": 0.10,
    "Disgust": 0.09,
    "Fear": 0.09,
    "Happiness": 0.16,
    "Sadness": 0.11,
    "Surprise": 0.11,
    "Other": 0.16,
}


class Prototype(NamedTuple):
    """How an expression looks: what face and body do, and where it lies on the circumplex."""

    aus: dict[int, float]  # probability of each AU
    va: tuple[float, float]
    shoulders: float  # -1 slumped .. 1 raised
    lean: float  # -1 back .. 1 forward
    roll: float  # tilt of the head to either side, radians
    hand: str


PROTOTYPES = {
    "Neutral": Prototype({}, (0.0, 0.0), 0.0, 0.0, 0.0, ""),
    "Anger": Prototype({4: 0.97, 7: 0.85, 23: 0.65, 24: 0.6, 10: 0.1}, (-0.6, 0.6), 0.25, 0.8, 0.0, "fist"),
    "Disgust": Prototype({10: 0.97, 4: 0.6, 7: 0.45, 25: 0.4, 9: 0.8}, (-0.6, 0.25), 0.1, -0.9, 0.14, "palm"),
    "Fear": Prototype(
        {1: 0.97, 2: 0.85, 4: 0.8, 7: 0.35, 25: 0.85, 26: 0.4, 20: 0.9, 5: 0.7}, (-0.6, 0.75), 0.9, -0.4, 0.0, "chest"
    ),
    "Happiness": Prototype({6: 0.9, 12: 0.98, 25: 0.65, 26: 0.15}, (0.75, 0.4), 0.1, 0.2, 0.08, "wave"),
    "Sadness": Prototype({1: 0.92, 4: 0.7, 15: 0.95}, (-0.65, -0.4), -0.9, 0.1, 0.20, "chin"),
    "Surprise": Prototype({1: 0.95, 2: 0.97, 25: 0.97, 26: 0.9, 5: 0.75}, (0.15, 0.75), 0.35, -0.2, 0.0, "head"),
}
# "Other" is whatever is none of the prototypes: talk, doubt, a knowing smile, pain, a yawn.
OTHER_COMBINATIONS = (
    (25,),
    (25, 26),
    (12, 24),
    (2, 15),
    (12, 15),
    (1, 2, 12),
    (6, 7, 10),
    (2, 10),
    (7, 12),
    (2, 24),
    (15, 23),
    (6, 7, 23),
    (23, 24),
)
OTHER_VALENCE = {12: 0.35, 6: 0.1, 15: -0.3, 10: -0.25, 24: -0.15, 23: -0.15, 4: -0.2}
OTHER_AROUSAL = {26: 0.2, 25: 0.15, 2: 0.15, 7: 0.1, 1: 0.1, 15: -0.15}


@dataclass(frozen=True)
class Row:
    """The labels of one frame; None is a missing label."""

    va: tuple[float, float] | None
    expr: int | None
    aus: tuple[int | None, ...]


@dataclass(frozen=True)
class Frame:
    """One picture of a video: what it shows, how it is compressed, its labels."""

    number: int  # 1-based
    look: Look
    jpeg_quality: int
    row: Row


@dataclass(frozen=True)
class Video:
    """The frames of one person, in order."""

    name: str
    key: tuple[int, ...]  # (seed, split, index): what its random numbers are keyed by
    identity: Identity
    frames: tuple[Frame, ...]
    duplicates: dict[int, Row]  # a second row right after the first, by position in `frames`


def plan_splits(*, num_train: int, num_val: int, seed: int, frames_per_video: int) -> dict[str, list[Video]]:
    """Decide everything but the pixels. No video, and so no person, is in both splits."""
    taken: set[str] = set()
    return {
        split: _plan_split(split, num_frames=num_frames, seed=seed, frames_per_video=frames_per_video, taken=taken)
        for split, num_frames in zip(SPLITS, (num_train, num_val), strict=True)
    }


def annotation_text(videos: list[Video]) -> str:
    """The annotation file of a split: the header, then a line a row with 16 values."""
    lines = [HEADER]
    for video in videos:
        for position, frame in enumerate(video.frames):
            image = f"{video.name}/{frame.number:05d}.jpg"
            lines.append(_annotation_line(image, frame.row))
            if position in video.duplicates:
                lines.append(_annotation_line(image, video.duplicates[position]))
    return "\n".join(lines) + "\n"


def _annotation_line(image: str, row: Row) -> str:
    va = [f"{value:.4f}" for value in row.va] if row.va is not None else [str(MISSING_VA)] * 2
    expr = MISSING_EXPR if row.expr is None else row.expr
    aus = [MISSING_AU if value is None else value for value in row.aus]
    return ",".join([image, *va, str(expr), *map(str, aus)])


def _plan_split(split: str, *, num_frames: int, seed: int, frames_per_video: int, taken: set[str]) -> list[Video]:
    split_key = SPLITS.index(split)
    rng = keyed_rng(seed, split_key)
    patterns = _Quota(TASK_PATTERNS[split])
    # Frames with an expression label fill their shares apart from those without: a small set has every class labelled.
    expressions = {has_expr: _Quota(EXPRESSION_SHARES) for has_expr in (True, False)}
    videos = []
    for index, length in enumerate(_plan_lengths(rng, num_frames, frames_per_video)):
        pattern = patterns.pick(rng, length)
        has_expr = pattern[1]
        key = (seed, split_key, index)
        name = _plan_name(keyed_rng(*key, 0), taken)
        videos.append(
            _plan_video(
                name, key, length=length, pattern=pattern, expressions=expressions[has_expr], is_train=split == "train"
            )
        )
    return _add_duplicates(videos, rng, int(DUPLICATE_SHARE * num_frames))


class _Quota:
    """Picks among weighted choices so that the shares hold after few picks, where independent draws would wander."""

    def __init__(self, shares: dict):
        self.shares = shares
        self.given = dict.fromkeys(shares, 0.0)

    def pick(self, rng: np.random.Generator, amount: float, *, without=None):
        """The choice that is furthest behind its share, with some chance; it is credited with `amount`."""
        total = sum(self.given.values()) + amount
        behind = {
            choice: self.shares[choice] * total - self.given[choice] + 0.3 * amount * rng.random()
            for choice in self.shares
            if choice != without
        }
        choice = max(behind, key=behind.__getitem__)
        self.given[choice] += amount
        return choice


def _plan_lengths(rng: np.random.Generator, num_frames: int, frames_per_video: int) -> list[int]:
    """Lengths of the videos around `frames_per_video`; they sum to `num_frames`."""
    num_videos = max(1, round(num_frames / frames_per_video))
    weights = rng.uniform(0.75, 1.25, num_videos)
    ends = np.round(np.cumsum(weights) / weights.sum() * num_frames).astype(int)
    return [length for length in np.diff(ends, prepend=0).tolist() if length > 0]


def _plan_name(rng: np.random.Generator, taken: set[str]) -> str:
    """A video id in one of the styles of the real set."""
    while True:
        style, number = rng.random(), int(rng.integers(1, 600 + 2 * len(taken)))
        if style < 0.5:
            name = str(number)
        elif style < 0.7:
            name = f"video{number}"
        elif style < 0.8:
            name = f"video{number}_{rng.integers(1, 6)}"
        elif style < 0.9:
            name = f"video{number}_{('left', 'right')[rng.integers(2)]}"
        else:
            name = f"{number}-{rng.choice((24, 25, 30))}-{rng.choice(('640x360', '1280x720', '1920x1080'))}"
        if name not in taken:
            taken.add(name)
            return name


class _Episode(NamedTuple):
    """The targets of a stretch of frames."""

    expression: str
    strength: float  # 0.6..1
    aus: np.ndarray  # (num ALL_AUS,) intensities
    energy: float  # arousal beyond the expression's own; posture and surroundings show it, the face does not
    shoulders: float
    lean: float
    roll: float
    hand: str
    hand_side: int


def _plan_video(name: str, key, *, length: int, pattern, expressions: _Quota, is_train: bool) -> Video:
    rng = keyed_rng(*key, 1)
    identity = make_identity(rng)
    episodes = _plan_episodes(rng, length, expressions)
    facing, light_angle = rng.normal(0, (0.1, 0.07)), rng.uniform(-math.pi, 0)
    light_strength, quality = rng.uniform(0.02, 0.22), int(rng.integers(85, 93))
    gaps = 1 + rng.poisson(rng.exponential(3.6, length))
    numbers = np.cumsum(gaps)
    frames = []
    motion = np.zeros(6)
    for position, (before, now, blend) in enumerate(episodes):
        frame_rng = keyed_rng(*key, 2, position)
        # A drift of unit variance: yaw, pitch, roll, gaze x and y, box.
        motion = 0.75 * motion + frame_rng.normal(0, 0.66, 6)
        look = _plan_look(
            frame_rng, before, now, blend, motion, facing=facing, light_angle=light_angle, light_strength=light_strength
        )
        row = _plan_row(frame_rng, before, now, blend, look, pattern=pattern, is_train=is_train)
        frames.append(Frame(number=int(numbers[position]), look=look, jpeg_quality=quality, row=row))
    return Video(name=name, key=key, identity=identity, frames=tuple(frames), duplicates={})


def _plan_episodes(
    rng: np.random.Generator, length: int, expressions: _Quota
) -> list[tuple[_Episode, _Episode, float]]:
    """For each frame the episode before, the current one, and how far (0..1) the change has come."""
    plan: list[tuple[_Episode, _Episode, float]] = []
    previous = None
    while len(plan) < length:
        duration = min(int(rng.integers(4, 9)), length - len(plan))
        expression = expressions.pick(rng, duration, without=previous.expression if previous else None)
        episode = _plan_episode(rng, expression)
        before = previous or episode
        # Frames are sparse: a change takes about one of them.
        ramp = [float(rng.uniform(0.55, 0.8))] + [1.0] * (duration - 1)
        plan += [(before, episode, blend) for blend in ramp]
        previous = episode
    return plan


def _plan_episode(rng: np.random.Generator, expression: str) -> _Episode:
    strength = float(rng.uniform(0.6, 1.0))
    if expression == "Other":
        combination = OTHER_COMBINATIONS[rng.integers(len(OTHER_COMBINATIONS))]
        body = PROTOTYPES[str(rng.choice(("Neutral", *PROTOTYPES)))]
        prototype = body._replace(aus=dict.fromkeys(combination, 1.0), hand=str(rng.choice(("", "", *HANDS))))
    else:
        prototype = PROTOTYPES[expression]
    # One face in three gives little away: then posture and hands are the better witnesses.
    readiness = 0.3 if rng.random() < 0.35 else 1.0
    chance = np.array([max(0.02, readiness * prototype.aus.get(au, 0.0)) for au in ALL_AUS])
    is_on = rng.random(len(ALL_AUS)) < chance
    if is_on[ALL_AUS.index(26)]:
        is_on[ALL_AUS.index(25)] = True  # a jaw drops with the lips apart
    if is_on[ALL_AUS.index(25)]:
        is_on[ALL_AUS.index(24)] = False  # lips that part do not press
    if is_on[ALL_AUS.index(5)]:
        is_on[ALL_AUS.index(7)] = False
    intensities = np.where(
        is_on, rng.uniform(0.55, 0.75, len(ALL_AUS)) + 0.25 * strength, rng.uniform(0, 0.16, len(ALL_AUS))
    )
    energy = float(rng.uniform(-1, 1))
    shows_body = rng.random() < 0.92  # the rest of the time the posture says nothing
    return _Episode(
        expression=expression,
        strength=strength,
        aus=intensities,
        energy=energy,
        shoulders=prototype.shoulders * shows_body + 0.3 * energy,
        lean=prototype.lean * shows_body + 0.2 * energy,
        roll=prototype.roll * shows_body * float(rng.choice((-1, 1))),
        hand=prototype.hand if shows_body and rng.random() < 0.9 else "",
        hand_side=int(rng.choice((-1, 1))),
    )


def _blend(before: _Episode, now: _Episode, name: str, blend: float):
    return (1 - blend) * getattr(before, name) + blend * getattr(now, name)


def _plan_look(
    rng: np.random.Generator,
    before: _Episode,
    now: _Episode,
    blend: float,
    motion,
    *,
    facing,
    light_angle: float,
    light_strength: float,
) -> Look:
    aus = np.clip(_blend(before, now, "aus", blend) + rng.normal(0, 0.035, len(ALL_AUS)), 0, 1)
    tint = 0.55 * _place(now)[1] + 0.3 * now.energy + rng.normal(0, 0.3)
    return Look(
        aus=dict(zip(ALL_AUS, aus.tolist(), strict=True)),
        yaw=float(np.clip(facing[0] + 0.09 * motion[0], -0.35, 0.35)),
        pitch=float(np.clip(facing[1] + 0.05 * motion[1], -0.2, 0.2)),
        roll=float(_blend(before, now, "roll", blend) + 0.05 * motion[2]),
        gaze=(float(np.clip(0.25 * motion[3], -0.6, 0.6)), float(np.clip(0.12 * motion[4], -0.3, 0.3))),
        shoulders=float(np.clip(_blend(before, now, "shoulders", blend) + rng.normal(0, 0.12), -1, 1)),
        lean=float(np.clip(_blend(before, now, "lean", blend) + rng.normal(0, 0.2), -1, 1)),
        hand=now.hand,
        hand_side=now.hand_side,
        tint=float(np.clip(tint, -1, 1)),
        light_angle=light_angle,
        light_strength=light_strength,
        crop_shift=(float(0.1 * motion[5]), float(rng.normal(0, 0.07))),
        blur_px=float(max(0.0, rng.normal(0.0, 0.3))),
    )


def _place(episode: _Episode) -> np.ndarray:
    """The episode's valence and arousal on the circumplex: the expression's place, further out when it is stronger."""
    if episode.expression == "Other":
        on = {au for au, intensity in zip(ALL_AUS, episode.aus, strict=True) if intensity > AU_THRESHOLD}
        valence, arousal = (
            sum(effect for au, effect in table.items() if au in on) for table in (OTHER_VALENCE, OTHER_AROUSAL)
        )
    else:
        valence, arousal = PROTOTYPES[episode.expression].va
    return np.array((valence, arousal)) * (0.35 + 0.75 * episode.strength) + (0, 0.25 * episode.energy)


def _plan_row(
    rng: np.random.Generator, before: _Episode, now: _Episode, blend: float, look: Look, *, pattern, is_train: bool
) -> Row:
    has_va, has_expr, has_aus = pattern
    va = (1 - blend) * _place(before) + blend * _place(now)
    va = np.clip(va + rng.normal(0, 0.04, 2), -1, 1)
    aus: list[int | None] = [int(look.aus[au] > AU_THRESHOLD) if has_aus else None for au in AUS]
    if is_train and rng.random() < NO_LABEL_SHARE:
        return Row(va=None, expr=None, aus=(None,) * len(AUS))
    if is_train and has_aus and rng.random() < SINGLE_AU_MISSING_SHARE:
        aus[rng.integers(len(AUS))] = None
    return Row(
        va=(float(va[0]), float(va[1])) if has_va else None,
        expr=EXPRESSIONS.index(now.expression) if has_expr else None,
        aus=tuple(aus),
    )


def _add_duplicates(videos: list[Video], rng: np.random.Generator, num_duplicates: int) -> list[Video]:
    """Repeat some rows, every other time with VA a little off, as two annotators would differ."""
    places = [(video, position) for video in videos for position in range(len(video.frames))]
    for count, index in enumerate(sorted(rng.choice(len(places), num_duplicates, replace=False).tolist())):
        video, position = places[index]
        row = video.frames[position].row
        if count % 2 and row.va is not None:
            va = np.clip(np.array(row.va) + rng.normal(0, 0.03, 2), -1, 1)
            row = Row(va=(float(va[0]), float(va[1])), expr=row.expr, aus=row.aus)
        video.duplicates[position] = row
    return videos


def count_labels(videos: list[Video]) -> dict:
    """Count videos, frames, rows and labels, as `shards synth` prints them."""
    rows = [frame.row for video in videos for frame in video.frames] + [
        row for video in videos for row in video.duplicates.values()
    ]
    return {
        "num_videos": len(videos),
        "num_frames": sum(len(video.frames) for video in videos),
        "num_rows": len(rows),
        "num_va": sum(row.va is not None for row in rows),
        "num_expr": sum(row.expr is not None for row in rows),
        "num_au": sum(None not in row.aus for row in rows),
        "expressions": {name: sum(row.expr == index for row in rows) for index, name in enumerate(EXPRESSIONS)},
        "au_positives": {au: sum(row.aus[index] == 1 for row in rows) for index, au in enumerate(AUS)},
    }


def keyed_rng(*key: int) -> np.random.Generator:
    """Return a random generator that depends on the key alone, not on what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
