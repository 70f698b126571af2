"""Random access to the samples of a shard set by number: read by offset, checksums checked, decoded."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time

from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import DecodeError, decode_into
from mtl_dist.data.index import Index, ShardEntry
from mtl_dist.data.labels import TABLE_WIDTH, make_table, split_table
from mtl_dist.data.mapped import MappedShards
from mtl_dist.data.sidecar import Sidecar, check_places, parse_sidecar
from mtl_dist.errors import InputError
from mtl_dist.tasks import TASKS, Batch
from mtl_dist.transfer import CPU, new_bytes

ROW_BYTES = 8 * TABLE_WIDTH
MAX_BUFFERS = 16  # of one size, that are free
CACHE_LINE = 64  # bytes


class _OpenShard(NamedTuple):
    """A mapped shard. A Python list and bytes, not arrays: samples are picked one at a time."""

    tar: memoryview
    images: list[tuple[int, int, int]]  # where each begins and ends, and its CRC-32
    table: bytes  # (n, TABLE_WIDTH) float64
    sidecar: Sidecar


class Names(NamedTuple):
    """What n samples are called."""

    rows: np.ndarray  # (n,) int64, their row numbers
    images: list[str]
    videos: list[str | None]  # None where the source has no name for it: an image's directory is its video


def names_of(sidecars: list[Sidecar]) -> Names:
    """Return what the samples of sidecars are called, one sidecar's after another's."""
    images = [name for s in sidecars for name in s.image_names()]
    videos = [name for s in sidecars for name in s.video_names() or repeat(None, len(s.row))]
    return Names(np.concatenate([s.row for s in sidecars]), images, videos)


class ShardReader(MappedShards[_OpenShard]):
    """Reads samples of one set. Safe to share between threads."""

    def __init__(self, uri: str, index: Index, cache: Cache):
        super().__init__(uri, index, cache)
        self._starts = np.concatenate([[0], np.cumsum(index.shard_rows)])
        self._buffers = _Buffers()

    def read_batch(self, samples: np.ndarray, size: int) -> Batch:
        """Decode samples (n,) by number into a `Batch` of n single images of `size` pixels a side."""
        pixels = self._buffers.take((len(samples), size, size, 3))
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        places = (samples - self._starts[shards]).tolist()
        opened = {shard: self.shard(shard) for shard in set(shards.tolist())}
        rows = []
        for number, place, out in zip(shards.tolist(), places, pixels):
            shard = opened[number]
            begin, end, checksum = shard.images[place]
            image = shard.tar[begin:end]
            if crc32(image) != checksum:
                raise self._damaged_row(number, shard, place, "its bytes do not match their checksum")
            try:
                decode_into(image, out)
            except DecodeError as error:
                raise self._damaged_row(number, shard, place, str(error)) from None
            rows.append(shard.table[place * ROW_BYTES : (place + 1) * ROW_BYTES])
        return _collate(pixels, np.frombuffer(b"".join(rows)).reshape(-1, TABLE_WIDTH), samples)

    def give_back(self, batch: Batch) -> None:
        """Use the memory of a batch's pixels again. Nobody may read them any more."""
        self._buffers.give_back(batch.inputs.data_ptr())

    def decode_for(self, device: torch.device) -> None:
        """Decode into memory that a device copies from by itself, where it has such."""
        self._buffers.device = device

    def names(self) -> Names:
        """Return the names of every sample of the set, in its order."""
        return names_of(list(self.sidecars()))

    def labelled_samples(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, np.ndarray]:
        """Return {task: (n,) int64 ascending numbers of the samples that carry a label of it}; every task is there.

        Reads all sidecars and no tar; `progress` is told of shards.
        """
        numbers = {task: [np.zeros(0, np.int64)] for task in TASKS}
        for start, sidecar in zip(self._starts.tolist(), self.sidecars(progress)):
            for task, mask in zip(TASKS, (sidecar.va_mask, sidecar.expr_mask, sidecar.au_mask.any(1))):
                numbers[task].append(start + np.flatnonzero(mask))
        return {task: np.concatenate(parts) for task, parts in numbers.items()}

    def parse(self, data: bytes, entry: ShardEntry) -> Sidecar:
        sidecar = parse_sidecar(data)
        check_places(sidecar, rows=entry.rows, tar_bytes=entry.tar_bytes)
        return sidecar

    def opened(self, tar: memoryview, sidecar: Sidecar, entry: ShardEntry) -> _OpenShard:
        ends = sidecar.offset + sidecar.length
        images = zip(sidecar.offset.tolist(), ends.tolist(), sidecar.crc32.tolist())
        return _OpenShard(tar, list(images), make_table(sidecar._asdict()).tobytes(), sidecar)

    def _damaged_row(self, number: int, shard: _OpenShard, place: int, what: str) -> InputError:
        return self.damage_of(self.index.shards[number], f"row {shard.sidecar.row[place]}", what)


class _Buffers:
    """Pixel arrays that are used again once they are given back: new memory faults in page by page, at 6% of the
    decoding. They begin at a cache line, which is worth 3%. One that nobody gives back is freed like any other."""

    def __init__(self):
        self.device = CPU  # that copies from them
        self._free: dict[int, list[np.ndarray]] = {}  # by their bytes
        self._lent: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # by address
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        with self._lock:
            num_bytes = math.prod(shape)
            free = self._free.get(num_bytes + CACHE_LINE)
            owner = free.pop() if free else new_bytes(num_bytes + CACHE_LINE, self.device)
            begin = -owner.ctypes.data % CACHE_LINE
            pixels = owner[begin : begin + num_bytes].reshape(shape)
            self._lent[pixels.ctypes.data] = owner  # which every view of it keeps alive
            return pixels

    def give_back(self, address: int) -> None:
        """Take an array back by where its pixels begin; what is not lent is none of ours."""
        with self._lock:
            owner = self._lent.pop(address, None)
            if owner is not None and len(free := self._free.setdefault(owner.nbytes, [])) < MAX_BUFFERS:
                free.append(owner)


def _collate(pixels: np.ndarray, table: np.ndarray, samples: np.ndarray) -> Batch:
    labels, rows = split_table(table[:, None])
    return Batch(
        inputs=torch.from_numpy(pixels.transpose(0, 3, 1, 2)[:, None]),  # a channels_last view of the decoded rows
        valid=torch.from_numpy(np.ones((len(pixels), 1), bool)),
        labels=labels,
        rows=rows,
        samples=torch.from_numpy(np.array(samples, np.int64)),
    )
