"""Plan a video that has time in it: what a single frame leaves open, the frames around it tell.

Against the static plan of `plan.py`:

- Episodes are long (12 to 30 rows) and come and go over 3 rows each, through a face at rest; valence and arousal
  follow.
- One episode in three is *subtle*: face and body show it in bursts of 3 rows, a quarter of the episode, and only hint
  at it between them. Expression, valence and arousal are the episode's, as of an annotator who saw the video; the
  action units are what shows.
- Energy, which arousal contains, is told by how much head and eyes move from row to row, and by nothing in one picture.
- Some frames, each by itself, are spoiled in the pixels (`spoiling.py`) and not in the labels.

So the set is made to reward the use of time. A gain on it shows that a model can use time, and says nothing of how much
there is to gain in real videos.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from mtl_dist.synthetic.episodes import Episode, place, plan_episode
from mtl_dist.synthetic.person import ALL_AUS, Look, make_identity
from mtl_dist.synthetic.plan import Frame, Pattern, Quota, Video, keyed_rng, plan_row
from mtl_dist.synthetic.spoiling import plan_spoil

DYNAMICS_VERSION = 1  # raise it when the plan or the pictures of these videos change
FRAMES_PER_VIDEO = 96

MIN_EPISODE, MAX_EPISODE = 12, 30  # rows
RAMP = (0.15, 0.35, 0.75)  # few rows have an AU near the intensity from which it is labelled
SUBTLE_SHARE = 0.35  # of episodes of an expression
BURST_ROWS = 3
BURST_SHARE = 0.25  # of a subtle episode's rows
HINT = (0.05, 0.3)  # intensity of its AUs between the bursts
SPOILED_SHARE = 0.3  # of rows

# Every kind of number has a stream of its own, apart from the static plan's: of one seed, the sets share no person.
PERSON, EPISODES, ROWS, MOVEMENT, SPOILS = range(10, 15)


class Moment(NamedTuple):
    """What one row of an episode shows, and what it is labelled by."""

    episode: Episode
    level: float  # 0..1, how far the episode has come in: valence, arousal and energy follow it
    shown: float  # 0..1, how much of it face and body show
    aus: np.ndarray  # (num ALL_AUS,) intensities in this row
    is_subtle: bool
    is_burst: bool


def plan_dynamic_video(
    name: str, key: tuple[int, ...], *, length: int, pattern: Pattern, expressions: Quota, is_train: bool
) -> Video:
    """Plan a video of long episodes; the arguments are those of `plan.plan_static_video`."""
    rng = keyed_rng(*key, PERSON)
    identity = make_identity(rng)
    scene = _plan_scene(rng)
    quality = int(rng.integers(85, 93))
    numbers = np.cumsum(1 + rng.poisson(rng.exponential(3.6, length)))
    moments = plan_moments(key, length, expressions)
    movement = plan_movement(key, np.array([moment.level * moment.episode.energy for moment in moments]))
    spoil_rng = keyed_rng(*key, SPOILS)
    frames = []
    for position, moment in enumerate(moments):
        row_rng = keyed_rng(*key, ROWS, position)
        look = _plan_look(row_rng, scene, moment, movement[position])
        va = moment.level * place(moment.episode)
        row = plan_row(row_rng, va, moment.episode.expression, look, pattern=pattern, is_train=is_train)
        if spoil_rng.random() < SPOILED_SHARE:
            look = dataclasses.replace(look, spoil=plan_spoil(spoil_rng))
        frames.append(Frame(number=int(numbers[position]), look=look, jpeg_quality=quality, row=row))
    return Video(name=name, key=key, identity=identity, frames=tuple(frames), duplicates={})


def plan_moments(key: tuple[int, ...], length: int, expressions: Quota) -> list[Moment]:
    """String episodes together: a `Moment` for each of `length` rows."""
    rng = keyed_rng(*key, EPISODES)
    moments: list[Moment] = []
    while left := length - len(moments):
        # What is left after an episode is long enough for another.
        duration = left if left <= MAX_EPISODE else int(rng.integers(MIN_EPISODE, _longest(left) + 1))
        previous = moments[-1].episode.expression if moments else None
        episode = plan_episode(rng, expressions.pick(rng, duration, without=previous), reticent_share=0.0)
        moments += _plan_rows(rng, episode, duration)
    return moments


def _longest(left: int) -> int:
    return min(MAX_EPISODE, left - MIN_EPISODE)


def _plan_rows(rng: np.random.Generator, episode: Episode, duration: int) -> list[Moment]:
    is_subtle = bool(rng.random() < SUBTLE_SHARE) and episode.expression != "Neutral"
    in_burst = _plan_bursts(rng, duration) if is_subtle else np.ones(duration, dtype=bool)
    hint = np.minimum(episode.aus, rng.uniform(*HINT, len(ALL_AUS)))
    rest = rng.uniform(0, 0.16, len(ALL_AUS))
    if episode.expression == "Neutral":  # an action unit that strays in and stays would be an expression
        episode = episode._replace(aus=rest)
    ramp = np.ones(duration)
    for row, level in enumerate(RAMP[: (duration + 1) // 2]):
        ramp[row] = ramp[duration - 1 - row] = level
    moments = []
    for level, bursts in zip(ramp.tolist(), in_burst.tolist(), strict=True):
        aus = rest + level * ((episode.aus if bursts else hint) - rest)
        moments.append(Moment(episode, level, level if bursts else 0.0, aus, is_subtle, is_subtle and bursts))
    return moments


def _plan_bursts(rng: np.random.Generator, duration: int) -> np.ndarray:
    """Which of the rows are in a burst, (duration,) bool: one burst at least, outside the ramps."""
    num_bursts = max(1, math.floor(BURST_SHARE * duration / BURST_ROWS + rng.random()))
    # Free rows around the bursts: one at least between two of them.
    free = duration - 2 * len(RAMP) - num_bursts * BURST_ROWS - (num_bursts - 1)
    in_burst = np.zeros(duration, dtype=bool)
    if free < 0:
        in_burst[:] = True  # too short to be subtle
        return in_burst
    before = np.sort(rng.integers(0, free + 1, num_bursts))
    for count, gap in enumerate(before.tolist()):
        begin = len(RAMP) + gap + count * (BURST_ROWS + 1)
        in_burst[begin : begin + BURST_ROWS] = True
    return in_burst


def plan_movement(key: tuple[int, ...], energy_T: np.ndarray) -> np.ndarray:
    """Drift of yaw, pitch, roll, gaze x and y and of the detector's box, (rows, 6), larger where there is energy.

    Autoregressive of order 1 in the rows; energy of -1..1 scales what is new in a row from 0.2 to 1.2. The box is the
    detector's and does not tell.
    """
    rng = keyed_rng(*key, MOVEMENT)
    scales = np.full((len(energy_T), 6), 0.66)
    scales[:, :5] = (0.2 + 0.5 * (energy_T + 1))[:, None]
    movement = np.zeros_like(scales)
    now = np.zeros(6)
    for row, new in enumerate(scales * rng.normal(size=scales.shape)):
        now = movement[row] = 0.75 * now + new
    return movement


class _Scene(NamedTuple):
    """What stays over a video beside the person."""

    facing: np.ndarray  # yaw and pitch, radians
    light_angle: float
    light_strength: float
    tint: float


def _plan_scene(rng: np.random.Generator) -> _Scene:
    return _Scene(
        facing=rng.normal(0, (0.08, 0.05)),
        light_angle=float(rng.uniform(-math.pi, 0)),
        light_strength=float(rng.uniform(0.02, 0.22)),
        tint=float(np.clip(rng.normal(0, 0.4), -1, 1)),
    )


def _plan_look(rng: np.random.Generator, scene: _Scene, moment: Moment, drift: np.ndarray) -> Look:
    """Draw a row's look. Hands and posture come and go with the face: else they would tell a subtle episode."""
    episode, shown = moment.episode, moment.shown
    aus = np.clip(moment.aus + rng.normal(0, 0.035, len(ALL_AUS)), 0, 1)
    return Look(
        aus=dict(zip(ALL_AUS, aus.tolist(), strict=True)),
        yaw=_within(0.45, scene.facing[0] + 0.14 * drift[0]),
        pitch=_within(0.28, scene.facing[1] + 0.075 * drift[1]),
        roll=float(shown * episode.roll + 0.06 * drift[2]),
        gaze=(_within(0.7, 0.3 * drift[3]), _within(0.4, 0.15 * drift[4])),
        shoulders=float(np.clip(shown * episode.shoulders + rng.normal(0, 0.05), -1, 1)),
        lean=float(np.clip(shown * episode.lean + rng.normal(0, 0.05), -1, 1)),
        hand=episode.hand if shown > 0.5 else "",
        hand_side=episode.hand_side,
        tint=scene.tint,
        light_angle=scene.light_angle,
        light_strength=scene.light_strength,
        crop_shift=(float(0.04 * drift[5]), float(rng.normal(0, 0.03))),
        blur_px=float(max(0.0, rng.normal(0.0, 0.2))),
    )


def _within(limit: float, value: float) -> float:
    """Bend `value` softly into -limit..limit: what moves more still differs more, where a hard limit would hide it."""
    return float(limit * np.tanh(value / limit))
