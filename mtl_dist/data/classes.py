"""Which classes the rows of a set have: what balanced sampling (data.balance) tells them apart by.

    expr    a row's expression
    au      the units that are on in a row, or that none is: as many classes as units are on, or one
    video   the video that a row is of; a picture of none is one of its own

A row without labels of expr or au has no class of it. Of a unit that is not labelled nobody knows that it is on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Literal, NamedTuple

import numpy as np

from mtl_dist.data.sidecar import Sidecar
from mtl_dist.tasks import AUS, EXPRESSIONS
from mtl_dist.timeline import name_videos

By = Literal["expr", "au", "video"]
NAMES = {"expr": EXPRESSIONS, "au": (*(f"AU{number}" for number in AUS), "no unit")}


class Classes(NamedTuple):
    """The classes of the samples of a set, as pairs of a sample and a class of it."""

    samples: np.ndarray  # (m,) int64 ascending sample numbers
    classes: np.ndarray  # (m,) int64, 0 to num - 1
    num: int

    @property
    def counts(self) -> np.ndarray:
        """(num,) int64 samples that have each class."""
        return np.bincount(self.classes, minlength=self.num)

    def of(self, chosen: np.ndarray) -> Classes:
        """Return those of some of the samples, (n,) ascending numbers, numbered anew."""
        kept = np.isin(self.samples, chosen)
        return Classes(np.searchsorted(chosen, self.samples[kept]), self.classes[kept], self.num)


def read_classes(by: By, sidecars: Iterable[Sidecar]) -> Classes:
    """Return the classes of the samples of sidecars, which are numbered through all of them."""
    samples, classes, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    videos: dict[str, int] = {}
    for sidecar in sidecars:
        match by:
            case "expr":
                places = np.flatnonzero(sidecar.expr_mask)
                found = sidecar.expr[places].astype(np.int64)
            case "au":
                places, found = _find_units(sidecar)
            case "video":
                names = name_videos(sidecar.image_names(), sidecar.video_names() or repeat(None))
                places = np.arange(len(names))
                found = np.array([videos.setdefault(name, len(videos)) for name in names], np.int64)
        samples.append(start + places)
        classes.append(found)
        start += len(sidecar.row)
    num = len(videos) if by == "video" else len(NAMES[by])
    return Classes(np.concatenate(samples), np.concatenate(classes), num)


def _find_units(sidecar: Sidecar) -> tuple[np.ndarray, np.ndarray]:
    """Return (m,) places and (m,) units that are on there, or the number after the last unit: labelled, and none is."""
    labelled = sidecar.au_mask.astype(bool)
    on = labelled & sidecar.au.astype(bool)
    return np.nonzero(np.column_stack([on, labelled.any(1) & ~on.any(1)]))


def join_classes(by: By, parts: Sequence[Classes], starts: Sequence[int]) -> Classes:
    """Put the classes of several sets behind one another; `starts` are their first samples. A video is of one set."""
    firsts = np.cumsum([0, *(part.num for part in parts)]) if by == "video" else [0] * len(parts)
    return Classes(
        np.concatenate([start + part.samples for start, part in zip(starts, parts)]),
        np.concatenate([first + part.classes for first, part in zip(firsts, parts)]),
        sum(part.num for part in parts) if by == "video" else parts[0].num,
    )
