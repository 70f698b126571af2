"""Follow faces through a video: which face of a frame is whose of the frames before.

A track goes on with the face that is nearest to where its velocity leads. Where two people cross, looks decide. After
a second without a face, soon after it left the picture, or at a cut, a track has ended. One that begins later is of the
same person if, over several frames, it looks very much like one that ended less than half a minute before it began. How
a face looks is told by a few pixels of it: that is trusted so long and no longer. Who comes back later, or in another
light, is somebody new.

What is remembered does not grow with the length of a video, but for a number a track.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mtl_dist.faces.face import Face

LOST_S, LOST_STEPS = 1.0, 2.5  # without a face, or so many frames of few; then a track has ended
LEFT_STEPS = 1.5  # and where the face was at the picture's edge: somebody else may enter there
COAST_S = 0.5  # so long a face that is not seen is taken to move on
REACH, REACH_PER_S, MOST_REACH = 0.6, 4.0, 2.5  # how far a face may be from where it is expected, in its own sides
MOST_GROWTH = 2.0  # of a face's sides between two frames
ALIKE = 0.2  # least likeness of a face and the track that it continues: a face that turns away still is
ALIKE_AGAIN = 0.75  # and of one that the edge cut off before
LOOKS_WEIGH = 2.0  # what one face's side of distance is worth in likeness
UNTOLD = 0.8  # likeness of a face that the picture's edge cuts off
MOVES, CHANGES = 0.5, 0.1  # the share of what is new in a track's velocity and looks

RETURN_S = 30.0  # so long after its end a track may be continued by another of the same person
KNOWN_AFTER = 5  # frames that show the whole face, and no other over it; of a track that ends before
KNOWN_AT_LEAST = 2
KNOWN_AGAIN = 0.92  # least likeness then: 1% of all pairs of 102 people in one light are so much alike
REMEMBERED = 64  # tracks that ended

MIN_FRAMES = 3  # of a person: what is found for a moment is often no face
LOOK_BLOCK = (
    8  # pixels of an aligned face that become one; as many at its edges, where hair and walls are, do not count
)
_FORBIDDEN = 1e6


def look(aligned: np.ndarray) -> np.ndarray:
    """Tell how a face looks: (n,) float32 of length 1, from (112, 112, 3) uint8. Their product is a correlation."""
    inner = aligned[LOOK_BLOCK:-LOOK_BLOCK, LOOK_BLOCK:-LOOK_BLOCK]
    side = inner.shape[0] // LOOK_BLOCK
    blocks = inner.reshape(side, LOOK_BLOCK, side, LOOK_BLOCK, 3)
    values = blocks.mean((1, 3), dtype=np.float32).ravel()
    return _unit(values - values.mean())


class Tracker:
    """Gives the faces of a video, frame after frame, the numbers of their tracks; and tracks their persons, at the end.

    One is of one video.
    """

    def __init__(self) -> None:
        self._active: list[_Track] = []
        self._ended: list[_Track] = []  # the last that ended is the last
        self._frames: list[int] = []  # of every track
        self._num_seen = 0  # frames, with faces or without
        self._last_s: float | None = None  # of the frame before
        self._same: dict[int, int] = {}  # the first track of the person, of tracks that are not it

    def update(
        self, seconds: float, faces: Sequence[Face], looks: Sequence[np.ndarray | None], *, is_cut: bool = False
    ) -> list[int]:
        """Return the track of every face of the next frame, numbers from 1 in the order in which they are first seen.

        Of two that are first seen in one frame the larger face comes first. The order of the faces does not matter.

        Args:
            seconds: later than those before.
            looks: what `look` says of each face; None: the picture's edge cuts it off.
            is_cut: the picture is of another scene than the one before.
        """
        order = sorted(range(len(faces)), key=lambda place: _rank(faces[place]))
        seen = [_Seen.of(faces[place], looks[place], seconds) for place in order]
        self._end(seconds, is_cut)
        self._num_seen += 1
        found = _assign(self._active, seen)
        for place, one in enumerate(seen):
            is_alone = not any(_meet(one, other) for other in seen if other is not one)
            if place in found:
                found[place].go_on(one, is_alone)
            else:
                self._frames.append(0)
                found[place] = _Track(len(self._frames), one, is_alone)
                self._active.append(found[place])
            self._frames[found[place].number - 1] += 1
            self._recognise(found[place], KNOWN_AFTER)
        numbers = [0] * len(faces)
        for place, where in enumerate(order):
            numbers[where] = found[place].number
        return numbers

    def persons(self, *, min_frames: int = MIN_FRAMES) -> dict[int, int]:
        """Return, at the end of a video, the person of every track, from 1 in the order in which they are first seen.

        Tracks of persons with fewer frames have none; of a video that is shorter they have all of it.
        """
        for track in self._active:
            self._recognise(track, KNOWN_AT_LEAST)
        first = {number: self._same.get(number, number) for number in range(1, len(self._frames) + 1)}
        frames: dict[int, int] = {}
        for number, one in first.items():
            frames[one] = frames.get(one, 0) + self._frames[number - 1]
        least = min(min_frames, self._num_seen)
        kept = [one for one, count in sorted(frames.items()) if count >= least]
        person = {one: place for place, one in enumerate(kept, start=1)}
        return {number: person[one] for number, one in first.items() if one in person}

    def _end(self, seconds: float, is_cut: bool) -> None:
        step = 0.0 if self._last_s is None else seconds - self._last_s
        self._last_s = seconds
        stays, leaves = max(LOST_S, LOST_STEPS * step), LEFT_STEPS * step
        limits = [leaves if track.seen.look is None else stays for track in self._active]
        over = [track for track, limit in zip(self._active, limits) if is_cut or seconds - track.seen.seconds > limit]
        self._active = [track for track in self._active if track not in over]
        for track in over:
            self._recognise(track, KNOWN_AT_LEAST)
        ended = [track for track in [*self._ended, *over] if seconds - track.seen.seconds <= RETURN_S]
        self._ended = ended[-REMEMBERED:]

    def _recognise(self, track: _Track, least: int) -> None:
        """Look once, where there were enough looks, whether the person of a track was there before."""
        if track.is_known or track.num_looks < least:
            return
        track.is_known = True
        before = [old for old in self._ended if old.seen.seconds < track.begun and old.num_looks]
        if not before:
            return
        likeness, number = max((float(track.look @ old.look), old.number) for old in before)
        if likeness >= KNOWN_AGAIN:
            self._same[track.number] = self._same.get(number, number)
            self._ended = [old for old in self._ended if old.number != number]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A face of a frame."""

    seconds: float
    middle: np.ndarray  # (2,)
    side: float  # of a square as large as the box
    look: np.ndarray | None

    @classmethod
    def of(cls, face: Face, how: np.ndarray | None, seconds: float) -> _Seen:
        left, top, right, bottom = (float(edge) for edge in face.box)
        side = max((right - left) * (bottom - top), 1.0) ** 0.5
        return cls(seconds, np.array([(left + right) / 2, (top + bottom) / 2]), side, how)


class _Track:
    def __init__(self, number: int, seen: _Seen, is_alone: bool):
        self.number, self.begun, self.seen = number, seen.seconds, seen
        self.velocity = np.zeros(2)  # pixels a second
        # Of all the time, and of the last time it was told; not where another face may cover this one in part.
        self.look = self.last_look = seen.look if is_alone else None
        self.num_looks = int(self.look is not None)
        self.is_known = False

    def go_on(self, seen: _Seen, is_alone: bool) -> None:
        """Continue with a face."""
        moved = (seen.middle - self.seen.middle) / (seen.seconds - self.seen.seconds)
        self.velocity = (1 - MOVES) * self.velocity + MOVES * moved
        self.seen = seen
        if seen.look is None or not is_alone:
            return
        self.last_look, self.num_looks = seen.look, self.num_looks + 1
        share = max(CHANGES, 1 / self.num_looks)
        self.look = seen.look if self.look is None else _unit((1 - share) * self.look + share * seen.look)

    def likeness(self, seen: _Seen) -> float:
        """Return how much a face looks like this person as last seen, or as seen all the time; at most 1."""
        if seen.look is None or self.look is None:
            return UNTOLD
        return float(max(self.look @ seen.look, self.last_look @ seen.look))

    def cost_of(self, seen: _Seen) -> float:
        """Return what it costs to go on with a face, in its sides."""
        passed = seen.seconds - self.seen.seconds
        expected = self.seen.middle + self.velocity * min(passed, COAST_S)
        distance = float(np.hypot(*(seen.middle - expected))) / (self.seen.side * seen.side) ** 0.5
        growth = max(self.seen.side, seen.side) / min(self.seen.side, seen.side)
        likeness = self.likeness(seen)
        least = ALIKE_AGAIN if self.seen.look is None and seen.look is not None else ALIKE
        if distance > min(REACH + REACH_PER_S * passed, MOST_REACH) or growth > MOST_GROWTH or likeness < least:
            return _FORBIDDEN
        return distance + LOOKS_WEIGH * (1 - likeness)


def _assign(tracks: Sequence[_Track], faces: Sequence[_Seen]) -> dict[int, _Track]:
    """Let as many tracks go on as can, at the least cost altogether; by the places of their faces."""
    costs = np.array([[track.cost_of(face) for face in faces] for track in tracks]).reshape(len(tracks), len(faces))
    return {int(face): tracks[row] for row, face in zip(*linear_sum_assignment(costs)) if costs[row, face] < _FORBIDDEN}


def _meet(one: _Seen, other: _Seen) -> bool:
    return float(np.hypot(*(one.middle - other.middle))) < (one.side + other.side) / 2


def _rank(face: Face) -> tuple[float, ...]:
    left, top, right, bottom = (float(edge) for edge in face.box)
    return (-(right - left) * (bottom - top), left, top, right, *map(float, face.points.ravel()), face.confidence)


def _unit(values: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(values))
    return (values / length if length > 0 else values).astype(np.float32)
