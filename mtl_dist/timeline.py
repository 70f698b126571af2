"""Where images stand in time: the video of each, and the number of its frame."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mtl_dist.tasks import PERSON

# A longer number at the end of a name is an identifier or a time, and no frame; nor is what follows a decimal point.
_FRAME = re.compile(r"(?<!\d)(?<!\d\.)(\d{1,9})(?:\.[^.]*)?$")


class Timeline(NamedTuple):
    """Where each of n rows stands."""

    video: np.ndarray  # (n,) int64, numbers from 0 in order of appearance
    frame: np.ndarray  # (n,) int64, from 0 at the first frame of each video


def video_names(images: list[str]) -> list[str]:
    """Return the video of every image: its directory, or the image itself where it has none and stands alone."""
    return [image.rpartition("/")[0] or image for image in images]


def owners_of(images: list[str], own: Iterable[str | None]) -> list[str]:
    """Return whose every image is: of its `own` video, or of its directory where that is None.

    Rows of one owner stay together in folds: those of a video, and the pictures of one person.
    """
    return [name or directory for name, directory in zip(own, video_names(images))]


def name_videos(images: list[str], own: Iterable[str | None]) -> list[str]:
    """Return the video of every image: its owner, or itself where that is a person, whose pictures are no film."""
    return [image if owner.startswith(PERSON) else owner for image, owner in zip(images, owners_of(images, own))]


def make_timeline(images: list[str], videos: list[str] | None = None) -> Timeline:
    """Place images in time by the number their names end with; `videos` None: those of `video_names`.

    Frames of s-Aff-Wild2 are sparse, so that neighbours in the file may be seconds apart: the number is the time. Where
    a name of a video ends without one, or two of its images have the same, the order of its images is taken for it.
    Rows of one image have one place.
    """
    numbers: dict[str, int] = {}
    names = video_names(images) if videos is None else videos
    names = [image if name.startswith(PERSON) else name for image, name in zip(images, names)]  # pictures are no film
    video = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    matches = [_FRAME.search(image.rpartition("/")[2]) for image in images]
    frame = np.array([int(match[1]) if match else -1 for match in matches], np.int64)
    is_unnumbered = np.zeros(len(numbers), bool)
    is_unnumbered[video[frame < 0]] = True
    taken: dict[tuple[int, int], str] = {}
    for row, place in enumerate(zip(video.tolist(), frame.tolist())):
        if taken.setdefault(place, images[row]) != images[row]:  # no number of frames: of faces, or of a part
            is_unnumbered[place[0]] = True
    places: dict[int, dict[str, int]] = {}
    for row in np.flatnonzero(is_unnumbered[video]):
        seen = places.setdefault(int(video[row]), {})
        frame[row] = seen.setdefault(images[row], len(seen))
    first = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(first, video, frame)
    return Timeline(video, frame - first[video])
