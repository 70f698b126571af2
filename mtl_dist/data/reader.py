"""Random access to the samples of a shard set by number: memory-mapped tars, read by offset, checksums checked.

A tar that is cut short while it is mapped (a local set that is copied over in place) ends the process with SIGBUS, of
which a command says the line here alone (faulthandler). A look at its size before every batch would take 0.4 us a
shard, 0.3 to 0.5% of the decoding, and miss what happens within the batch. Replacing a file by a rename, as everything
here does, is harmless.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, at a fifth of its time

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import DecodeError, decode_into
from mtl_dist.data.index import Index, ShardEntry, index_dir, repair_hint
from mtl_dist.data.sidecar import Sidecar, check_places, parse_sidecar
from mtl_dist.errors import Damaged, InputError
from mtl_dist.tasks import NUM_AUS, TASKS, Batch, Labels
from mtl_dist.threads import DaemonThreads

OPEN_SHARDS = 512  # kept, or as many as are needed at a time; each holds a file descriptor
SIDECAR_THREADS = 8  # mostly waiting for the store
MAX_BUFFERS = 16  # of one size, that are free
CACHE_LINE = 64  # bytes


# A sample's row number and labels side by side, as float64, which holds every row number that occurs exactly: a batch
# picks them with one copy a sample, and converts them all at once.
_WIDTHS = {"row": 1, "va": 2, "expr": 1, "au": NUM_AUS, "va_mask": 1, "expr_mask": 1, "au_mask": NUM_AUS}
_ROW, _VA, _EXPR, _AU, _VA_MASK, _EXPR_MASK, _AU_MASK = (
    slice(end - width, end) if width > 1 else end - 1
    for width, end in zip(_WIDTHS.values(), accumulate(_WIDTHS.values()))
)
_ROW_WIDTH = sum(_WIDTHS.values())
_ROW_BYTES = 8 * _ROW_WIDTH


class _OpenShard(NamedTuple):
    """A mapped shard. A Python list and bytes, not arrays: samples are picked one at a time."""

    tar: memoryview
    images: list[tuple[int, int, int]]  # where each begins and ends, and its CRC-32
    table: bytes  # (n, sum of _WIDTHS) float64
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


class ShardReader:
    """Reads samples of one set. Safe to share between threads."""

    def __init__(self, uri: str, index: Index, cache: Cache):
        self.uri, self.index, self.cache = index_dir(uri), index, cache
        self.max_open = min(OPEN_SHARDS, len(index.shards))
        self._starts = np.concatenate([[0], np.cumsum(index.shard_rows)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._buffers = _Buffers()

    def read_batch(self, samples: np.ndarray, size: int) -> Batch:
        """Decode samples (n,) by number into a `Batch` of n single images of `size` pixels a side."""
        pixels = self._buffers.take((len(samples), size, size, 3))
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        places = (samples - self._starts[shards]).tolist()
        opened = {shard: self._shard(shard) for shard in set(shards.tolist())}
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
            rows.append(shard.table[place * _ROW_BYTES : (place + 1) * _ROW_BYTES])
        return _collate(pixels, np.frombuffer(b"".join(rows)).reshape(-1, _ROW_WIDTH), samples)

    def give_back(self, batch: Batch) -> None:
        """Use the memory of a batch's pixels again. Nobody may read them any more."""
        self._buffers.give_back(batch.inputs.data_ptr())

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

    def sidecars(self, progress: Callable[[int], None] = lambda count: None) -> Iterator[Sidecar]:
        """Yield the sidecars of all shards in their order; `progress` is told of shards."""
        with DaemonThreads(SIDECAR_THREADS, "sidecar") as pool:
            for sidecar in pool.map(self._read_sidecar, self.index.shards):
                progress(1)
                yield sidecar

    def keep_open(self, count: int) -> None:
        """Keep `count` shards open at least, where there are as many: opening one again reads its sidecar again."""
        self.max_open = max(self.max_open, min(count, len(self.index.shards)))

    def warm(self, shards: Iterable[int]) -> None:
        """Fetch shards into the cache and open them, ahead of need."""
        for shard in shards:
            self._shard(int(shard))

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        opened = self._open_shard(self.index.shards[number])
        with self._lock:
            self._open[number] = opened
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)  # unmapped once no batch under way uses it
        return opened

    def _read_sidecar(self, entry: ShardEntry) -> Sidecar:
        sidecar_uri = storage.join(self.uri, f"{entry.name}.safetensors")
        with self.cache.open(sidecar_uri, sha256=entry.sidecar_sha256, size=entry.sidecar_bytes) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
            raise self._damage(sidecar_uri, entry.sidecar_sha256, "its bytes do not match their checksum")
        try:
            sidecar = parse_sidecar(data)
            check_places(sidecar, rows=entry.rows, tar_bytes=entry.tar_bytes)
        except Damaged as error:
            raise InputError(f"{sidecar_uri}: {error}; {repair_hint(self.uri)}") from None
        return sidecar

    def _open_shard(self, entry: ShardEntry) -> _OpenShard:
        sidecar = self._read_sidecar(entry)
        tar_uri = storage.join(self.uri, f"{entry.name}.tar")
        file = self.cache.open(tar_uri, sha256=entry.tar_sha256, size=entry.tar_bytes)
        with file:  # the mapping keeps the file, and with it the shared lock, open
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        ends = sidecar.offset + sidecar.length
        images = zip(sidecar.offset.tolist(), ends.tolist(), sidecar.crc32.tolist())
        table = np.column_stack([getattr(sidecar, name) for name in _WIDTHS]).astype(np.float64)
        return _OpenShard(mapped, list(images), table.tobytes(), sidecar)

    def _damaged_row(self, number: int, shard: _OpenShard, place: int, what: str) -> InputError:
        entry, where = self.index.shards[number], f", row {shard.sidecar.row[place]}"
        return self._damage(storage.join(self.uri, f"{entry.name}.tar"), entry.tar_sha256, what, where=where)

    def _damage(self, uri: str, sha256: str, what: str, *, where: str = "") -> InputError:
        if storage.is_s3(uri):  # the copy was whole when it arrived: the next run fetches it anew
            self.cache.forget(uri, sha256)
            return InputError(
                f"{uri}{where}: {what} in this node's cache (the disk or memory changed it); the copy "
                "is removed: start again"
            )
        return InputError(f"{uri}{where}: {what}; {repair_hint(self.uri)}")


class _Buffers:
    """Pixel arrays that are used again once they are given back: new memory faults in page by page, at 6% of the
    decoding. They begin at a cache line, which is worth 3%. One that nobody gives back is freed like any other."""

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = {}  # by their bytes
        self._lent: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # by address
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        with self._lock:
            num_bytes = math.prod(shape)
            free = self._free.get(num_bytes + CACHE_LINE)
            owner = free.pop() if free else np.empty(num_bytes + CACHE_LINE, np.uint8)
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
    # Converted and cut as arrays: a torch operation costs several of numpy's at this size.
    integers, floats, flags = (table[:, None].astype(dtype) for dtype in (np.int64, np.float32, bool))
    labels = Labels(
        va=torch.from_numpy(floats[..., _VA]),
        expr=torch.from_numpy(integers[..., _EXPR]),
        au=torch.from_numpy(floats[..., _AU]),
        va_mask=torch.from_numpy(flags[..., _VA_MASK]),
        expr_mask=torch.from_numpy(flags[..., _EXPR_MASK]),
        au_mask=torch.from_numpy(flags[..., _AU_MASK]),
    )
    return Batch(
        inputs=torch.from_numpy(pixels.transpose(0, 3, 1, 2)[:, None]),  # a channels_last view of the decoded rows
        valid=torch.from_numpy(np.ones((len(pixels), 1), bool)),
        labels=labels,
        rows=torch.from_numpy(integers[..., _ROW]),
        samples=torch.from_numpy(np.array(samples, np.int64)),
    )
