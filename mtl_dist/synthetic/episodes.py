"""What an expression does with face and body, and where it lies in valence and arousal.

The action units come from the prototypes of EMFACS (Friesen and Ekman 1983), valence and arousal from the expression's
place on the circumplex (Russell 1980). A plan strings episodes together, each with one expression.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtl_dist.synthetic.person import ALL_AUS, HANDS

AU_THRESHOLD = 0.4  # an AU is labelled 1 above this intensity; few frames come near it
RETICENT_SHARE = 0.35  # of episodes: their face gives little away


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


class Episode(NamedTuple):
    """The targets of a stretch of frames."""

    expression: str
    strength: float  # 0.6..1
    aus: np.ndarray  # (num ALL_AUS,) intensities
    energy: float  # -1..1, arousal beyond the expression's own, which the face does not show
    shoulders: float
    lean: float
    roll: float
    hand: str
    hand_side: int


def plan_episode(rng: np.random.Generator, expression: str, *, reticent_share: float = RETICENT_SHARE) -> Episode:
    """Draw an episode; of those with a reticent face, action units come less often."""
    strength = float(rng.uniform(0.6, 1.0))
    if expression == "Other":
        combination = OTHER_COMBINATIONS[rng.integers(len(OTHER_COMBINATIONS))]
        body = PROTOTYPES[str(rng.choice(("Neutral", *PROTOTYPES)))]
        prototype = body._replace(aus=dict.fromkeys(combination, 1.0), hand=str(rng.choice(("", "", *HANDS))))
    else:
        prototype = PROTOTYPES[expression]
    # Where a face gives little away, posture and hands are the better witnesses.
    readiness = 0.3 if rng.random() < reticent_share else 1.0
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
    return Episode(
        expression=expression,
        strength=strength,
        aus=intensities,
        energy=energy,
        shoulders=prototype.shoulders * shows_body,
        lean=prototype.lean * shows_body,
        roll=prototype.roll * shows_body * float(rng.choice((-1, 1))),
        hand=prototype.hand if shows_body and rng.random() < 0.9 else "",
        hand_side=int(rng.choice((-1, 1))),
    )


def place(episode: Episode) -> np.ndarray:
    """The episode's valence and arousal on the circumplex: the expression's place, further out when it is stronger."""
    if episode.expression == "Other":
        on = {au for au, intensity in zip(ALL_AUS, episode.aus, strict=True) if intensity > AU_THRESHOLD}
        valence, arousal = (
            sum(effect for au, effect in table.items() if au in on) for table in (OTHER_VALENCE, OTHER_AROUSAL)
        )
    else:
        valence, arousal = PROTOTYPES[episode.expression].va
    return np.array((valence, arousal)) * (0.35 + 0.75 * episode.strength) + (0, 0.25 * episode.energy)
