"""Validation pictures by row, from a run's shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.samples import Samples, open_pictures
from mtl_dist.predicting.members import Member
from mtl_dist.tasks import Batch


class Pictures:
    """Reads a run's validation pictures by row number."""

    def __init__(self, member: Member, cache_dir: Path | None):
        self._val, self._config = member.val, member.weights.config
        self._cache = Cache(cache_dir, max_bytes=int(self._config.data.cache_gib * GIB))
        self._sample = {
            int(row): place for place, row in enumerate(self._open(self._config.data.image_size).names().rows)
        }

    def read(self, rows: np.ndarray, side: int) -> Batch:
        """Read rows (n,) as a batch of n pictures of `side` pixels, in their order."""
        return self._open(side).read(np.array([self._sample[int(row)] for row in rows]))

    def _open(self, side: int) -> Samples:
        return open_pictures(self._val, side, self._cache)

    def pixels(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(n, side, side, 3) uint8."""
        return self.read(rows, side).inputs[:, 0].permute(0, 2, 3, 1).numpy()


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def choose_apart(order: np.ndarray, images: list[str], video: np.ndarray, *, count: int) -> list[int]:
    """The first `count` places of `order`, of different videos as long as there are any, each image once."""
    chosen: list[int] = []
    most = 1
    while len(chosen) < count:
        seen, per_video = {images[place] for place in chosen}, {}
        for place in chosen:
            per_video[video[place]] = per_video.get(video[place], 0) + 1
        before = len(chosen)
        for place in order:
            if len(chosen) == count:
                break
            if images[place] not in seen and per_video.get(video[place], 0) < most:
                chosen.append(int(place))
                seen.add(images[place])
                per_video[video[place]] = per_video.get(video[place], 0) + 1
        most += 1
        if len(chosen) == before and most > len(order) + 1:
            break
    rank = {int(place): number for number, place in enumerate(order)}
    return sorted(chosen, key=rank.__getitem__)
