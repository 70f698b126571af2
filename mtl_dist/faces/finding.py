"""Find the faces of videos and photographs: what `prepare` cuts out is what `predict --faces` sees.

A video is read frame after frame, its faces followed through it. A photograph stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mtl_dist.data.frames import Seen
from mtl_dist.data.videos import whole_frames
from mtl_dist.faces.align import align
from mtl_dist.faces.face import Detector, Face
from mtl_dist.faces.tracking import Tracker, look
from mtl_dist.threads import DaemonThreads

AHEAD = 4  # frames that are decoded before they are searched
UNTOLD_S = 1 / 25  # from one frame to the next, where the container does not say
CUT = 35.0  # grey levels by which the picture changes everywhere, from one scene to another

Item = TypeVar("Item")


class FoundFace(NamedTuple):
    """A face, cut out."""

    face: Face
    aligned: np.ndarray  # (112, 112, 3) uint8 RGB
    track: int  # from 1; of a photograph the largest face's is 1


class FoundFrame(NamedTuple):
    """A picture as shown, with the faces that are in it."""

    number: int  # from 0: of the frame of a video; of a photograph 0
    seconds: float  # from where the container starts; NaN: not told
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    faces: tuple[FoundFace, ...]  # in the order of their tracks


def find_in_video(
    path: Path,
    detector: Detector,
    tracker: Tracker,
    *,
    every: int = 1,
    announced: int = 0,
    seen: Seen | None = None,
) -> Iterator[FoundFrame]:
    """Yield every so many frames of a local video with their faces, those without one too.

    A thread decodes meanwhile, a few frames ahead. At the end `tracker`, a new one, tells the persons of the tracks.
    Raises `InputError` as `whole_frames` does.
    """
    last, thumb = -math.inf, None
    for frame in read_ahead(whole_frames(path, every=every, announced=announced, seen=seen), AHEAD):
        is_later = frame.seconds > last  # not so where it is not told, or the container is wrong
        last = frame.seconds if is_later else last + every * UNTOLD_S if math.isfinite(last) else 0.0
        before, thumb = thumb, _thumb(frame.pixels)
        is_cut = before is not None and float(np.abs(thumb - before).mean()) > CUT
        yield _frame(frame.number, frame.seconds, frame.pixels, detector, tracker, last, is_cut)


def find_in_photograph(picture: np.ndarray, detector: Detector) -> FoundFrame:
    """Find the faces of a picture, (H, W, 3) uint8 RGB; their tracks are places, the largest face first."""
    return _frame(0, float("nan"), picture, detector, Tracker(), 0.0, False)


def _frame(
    number: int, seconds: float, picture: np.ndarray, detector: Detector, tracker: Tracker, time_s: float, is_cut: bool
) -> FoundFrame:
    # A face whose points are all at one place is none.
    faces = [face for face in detector(picture) if np.ptp(face.points, axis=0).any()]
    aligned = [align(picture, face.points) for face in faces]
    looks = [look(cut) if _is_within(face, picture) else None for face, cut in zip(faces, aligned)]
    tracks = tracker.update(time_s, faces, looks, is_cut=is_cut)
    found = map(FoundFace, faces, aligned, tracks)
    return FoundFrame(number, seconds, picture, tuple(sorted(found, key=lambda one: one.track)))


def _is_within(face: Face, picture: np.ndarray) -> bool:
    left, top, right, bottom = face.box
    room = 0.05 * (right - left)
    height, width = picture.shape[:2]
    return bool(left > room and top > room and right < width - room and bottom < height - room)


def _thumb(picture: np.ndarray) -> np.ndarray:
    """Return a scene at a glance, (9, 16) float32: means of points of its green."""
    rows = np.linspace(0, picture.shape[0] - 1, 36).round().astype(int)
    columns = np.linspace(0, picture.shape[1] - 1, 64).round().astype(int)
    return picture[rows[:, None], columns, 1].astype(np.float32).reshape(9, 4, 16, 4).mean((1, 3))


def read_ahead(items: Iterator[Item], most: int) -> Iterator[Item]:
    """Yield items that a thread makes meanwhile, at most so many before they are taken."""
    pool = DaemonThreads(1, "ahead")
    end = object()
    try:
        pending = [pool.submit(lambda: next(items, end)) for _ in range(most)]
        while (item := pending.pop(0).result()) is not end:
            yield item
            pending.append(pool.submit(lambda: next(items, end)))
    finally:
        pool.close()  # what is being made ends: it may hold a file
