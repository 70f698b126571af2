"""Plan a drawn data set: who does what in which frame, and its labels. Everything but the pixels.

A video is one person who passes through a few *episodes*, each with one expression (`episodes.py`). What is not
labelled, how often and for which whole videos, follows the real set; so do duplicate rows and the gaps between frames.

`plan_static_video` plans a video whose frames tell nothing of each other that one frame does not show;
`dynamics.plan_dynamic_video` one that has time in it.

The two views complement each other by design: part of the expression and of the arousal is told by posture and hands,
which only `cropped` shows; its small face has lost the fine lines that `cropped_aligned` tells the action units by.

Every random number is keyed by (seed, split, video[, frame]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtl_dist.shards.annotations import HEADER
from mtl_dist.synthetic.episodes import AU_THRESHOLD, Episode, place, plan_episode
from mtl_dist.synthetic.person import ALL_AUS, Identity, Look, make_identity
from mtl_dist.tasks import AUS, EXPRESSIONS, MISSING_AU, MISSING_EXPR, MISSING_VA, SPLITS

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


Pattern = tuple[bool, bool, bool]  # which tasks a video is labelled for: VA, EXPR, AU
PlanVideo = Callable[..., Video]  # called as `plan_static_video` is


def plan_splits(
    *, num_train: int, num_val: int, seed: int, frames_per_video: int, plan_video: PlanVideo | None = None
) -> dict[str, list[Video]]:
    """Decide everything but the pixels, of each video by `plan_video` (None: `plan_static_video`).

    No video, and so no person, is in both splits.
    """
    if plan_video is None:
        plan_video = plan_static_video
    taken: set[str] = set()
    return {
        split: _plan_split(split, plan_video, num_frames, seed=seed, frames_per_video=frames_per_video, taken=taken)
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


def _plan_split(
    split: str, plan_video: PlanVideo, num_frames: int, *, seed: int, frames_per_video: int, taken: set[str]
) -> list[Video]:
    split_key = SPLITS.index(split)
    rng = keyed_rng(seed, split_key)
    patterns = Quota(TASK_PATTERNS[split])
    # Frames with an expression label fill their shares apart from those without: a small set has every class labelled.
    expressions = {has_expr: Quota(EXPRESSION_SHARES) for has_expr in (True, False)}
    videos = []
    for index, length in enumerate(_plan_lengths(rng, num_frames, frames_per_video)):
        pattern = patterns.pick(rng, length)
        has_expr = pattern[1]
        key = (seed, split_key, index)
        name = _plan_name(keyed_rng(*key, 0), taken)
        videos.append(
            plan_video(
                name, key, length=length, pattern=pattern, expressions=expressions[has_expr], is_train=split == "train"
            )
        )
    return _add_duplicates(videos, rng, int(DUPLICATE_SHARE * num_frames))


class Quota:
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


def plan_static_video(
    name: str, key: tuple[int, ...], *, length: int, pattern: Pattern, expressions: Quota, is_train: bool
) -> Video:
    """Plan a video of sparse frames and short episodes: each frame shows what its labels say."""
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
        va = (1 - blend) * place(before) + blend * place(now)
        row = plan_row(frame_rng, va, now.expression, look, pattern=pattern, is_train=is_train)
        frames.append(Frame(number=int(numbers[position]), look=look, jpeg_quality=quality, row=row))
    return Video(name=name, key=key, identity=identity, frames=tuple(frames), duplicates={})


def _plan_episodes(rng: np.random.Generator, length: int, expressions: Quota) -> list[tuple[Episode, Episode, float]]:
    """For each frame the episode before, the current one, and how far (0..1) the change has come."""
    plan: list[tuple[Episode, Episode, float]] = []
    previous = None
    while len(plan) < length:
        duration = min(int(rng.integers(4, 9)), length - len(plan))
        expression = expressions.pick(rng, duration, without=previous.expression if previous else None)
        episode = plan_episode(rng, expression)
        before = previous or episode
        # Frames are sparse: a change takes about one of them.
        ramp = [float(rng.uniform(0.55, 0.8))] + [1.0] * (duration - 1)
        plan += [(before, episode, blend) for blend in ramp]
        previous = episode
    return plan


def _blend(before: Episode, now: Episode, name: str, blend: float):
    return (1 - blend) * getattr(before, name) + blend * getattr(now, name)


def _plan_look(
    rng: np.random.Generator,
    before: Episode,
    now: Episode,
    blend: float,
    motion,
    *,
    facing,
    light_angle: float,
    light_strength: float,
) -> Look:
    aus = np.clip(_blend(before, now, "aus", blend) + rng.normal(0, 0.035, len(ALL_AUS)), 0, 1)
    # Energy shows in posture and surroundings.
    shoulders = (1 - blend) * (before.shoulders + 0.3 * before.energy) + blend * (now.shoulders + 0.3 * now.energy)
    lean = (1 - blend) * (before.lean + 0.2 * before.energy) + blend * (now.lean + 0.2 * now.energy)
    tint = 0.55 * place(now)[1] + 0.3 * now.energy + rng.normal(0, 0.3)
    return Look(
        aus=dict(zip(ALL_AUS, aus.tolist(), strict=True)),
        yaw=float(np.clip(facing[0] + 0.09 * motion[0], -0.35, 0.35)),
        pitch=float(np.clip(facing[1] + 0.05 * motion[1], -0.2, 0.2)),
        roll=float(_blend(before, now, "roll", blend) + 0.05 * motion[2]),
        gaze=(float(np.clip(0.25 * motion[3], -0.6, 0.6)), float(np.clip(0.12 * motion[4], -0.3, 0.3))),
        shoulders=float(np.clip(shoulders + rng.normal(0, 0.12), -1, 1)),
        lean=float(np.clip(lean + rng.normal(0, 0.2), -1, 1)),
        hand=now.hand,
        hand_side=now.hand_side,
        tint=float(np.clip(tint, -1, 1)),
        light_angle=light_angle,
        light_strength=light_strength,
        crop_shift=(float(0.1 * motion[5]), float(rng.normal(0, 0.07))),
        blur_px=float(max(0.0, rng.normal(0.0, 0.3))),
    )


def plan_row(
    rng: np.random.Generator, va: np.ndarray, expression: str, look: Look, *, pattern: Pattern, is_train: bool
) -> Row:
    """The labels of a frame: `va` with an annotator's noise, the expression, and the AUs that `look` shows."""
    has_va, has_expr, has_aus = pattern
    va = np.clip(va + rng.normal(0, 0.04, 2), -1, 1)
    aus: list[int | None] = [int(look.aus[au] > AU_THRESHOLD) if has_aus else None for au in AUS]
    if is_train and rng.random() < NO_LABEL_SHARE:
        return Row(va=None, expr=None, aus=(None,) * len(AUS))
    if is_train and has_aus and rng.random() < SINGLE_AU_MISSING_SHARE:
        aus[rng.integers(len(AUS))] = None
    return Row(
        va=(float(va[0]), float(va[1])) if has_va else None,
        expr=EXPRESSIONS.index(expression) if has_expr else None,
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
