"""Random access to the samples of a shard set by number: memory-mapped tars, read by offset, checksums checked."""

from __future__ import annotations

import hashlib
import mmap
import sys
import threading
import zlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import DecodeError, decode_into
from mtl_dist.data.index import Index, ShardEntry, index_dir, repair_hint
from mtl_dist.data.sidecar import Sidecar, check_places, parse_sidecar
from mtl_dist.errors import InputError
from mtl_dist.tasks import Batch, Labels

MAX_OPEN_SHARDS = 512  # each holds one file descriptor
MAX_BUFFERS = 16  # of one shape


# A sample's row number and labels side by side, so that a batch picks them with one copy a sample.
_RECORD = np.dtype(
    [("row", "i8"), ("va", "f4", 2), ("expr", "u1"), ("au", "u1", 12), ("va_mask", "?"), ("expr_mask", "?"),
     ("au_mask", "?", 12)]
)  # fmt: skip


class _OpenShard(NamedTuple):
    """A mapped shard. Python lists, not arrays: samples are picked one at a time."""

    tar: memoryview
    offset: list[int]
    length: list[int]
    crc32: list[int]
    records: np.ndarray  # (n,) of _RECORD
    sidecar: Sidecar


class ShardReader:
    """Reads samples of one set. Safe to share between threads."""

    def __init__(self, uri: str, index: Index, cache: Cache):
        self.uri, self.index, self.cache = index_dir(uri), index, cache
        self._starts = np.concatenate([[0], np.cumsum(index.shard_rows)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._buffers = _Buffers()

    def read_batch(self, samples: np.ndarray, size: int) -> Batch:
        """Decode samples (n,) by number into a `Batch` of n single images of `size` pixels a side."""
        pixels = self._buffers.take((len(samples), size, size, 3))
        records = np.empty(len(samples), _RECORD)
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        places = samples - self._starts[shards]
        opened = {shard: self._shard(shard) for shard in set(shards.tolist())}
        for i, (shard, place) in enumerate(zip(shards.tolist(), places.tolist())):
            self._decode(shard, opened[shard], place, pixels[i])
            records[i] = opened[shard].records[place]
        return _collate(pixels, records)

    def rows_and_names(self) -> tuple[np.ndarray, list[str]]:
        """Return the row number (n,) and the image name of every sample of the set, in its order."""
        sidecars = [self._shard(number).sidecar for number in range(len(self.index.shards))]
        return np.concatenate([s.row for s in sidecars]), [name for s in sidecars for name in s.image_names()]

    def warm(self, shards: np.ndarray) -> None:
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
            while len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)  # unmapped once no batch under way uses it
        return opened

    def _open_shard(self, entry: ShardEntry) -> _OpenShard:
        sidecar_uri = storage.join(self.uri, f"{entry.name}.safetensors")
        with self.cache.open(sidecar_uri, sha256=entry.sidecar_sha256, size=entry.sidecar_bytes) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
            raise self._damage(sidecar_uri, entry.sidecar_sha256, "its bytes do not match their checksum")
        try:
            sidecar = parse_sidecar(data)
            check_places(sidecar, rows=entry.rows, tar_bytes=entry.tar_bytes)
        except ValueError as error:
            raise InputError(f"{sidecar_uri}: {error}; {repair_hint(self.uri)}") from None
        tar_uri = storage.join(self.uri, f"{entry.name}.tar")
        file = self.cache.open(tar_uri, sha256=entry.tar_sha256, size=entry.tar_bytes)
        with file:  # the mapping keeps the file, and with it the shared lock, open
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        records = np.empty(len(sidecar.row), _RECORD)
        for name in _RECORD.names:
            records[name] = getattr(sidecar, name)
        lists = (column.tolist() for column in (sidecar.offset, sidecar.length, sidecar.crc32))
        return _OpenShard(mapped, *lists, records, sidecar)

    def _decode(self, shard: int, opened: _OpenShard, place: int, out: np.ndarray) -> None:
        begin = opened.offset[place]
        image = opened.tar[begin : begin + opened.length[place]]
        if zlib.crc32(image) != opened.crc32[place]:
            raise self._damaged_row(shard, int(opened.sidecar.row[place]), "its bytes do not match their checksum")
        try:
            decode_into(image, out)
        except DecodeError as error:
            raise self._damaged_row(shard, int(opened.sidecar.row[place]), str(error)) from None

    def _damaged_row(self, shard: int, row: int, what: str) -> InputError:
        entry = self.index.shards[shard]
        return self._damage(storage.join(self.uri, f"{entry.name}.tar"), entry.tar_sha256, what, where=f", row {row}")

    def _damage(self, uri: str, sha256: str, what: str, *, where: str = "") -> InputError:
        if storage.is_s3(uri):  # the copy was whole when it arrived: the next run fetches it anew
            self.cache.forget(uri, sha256)
            return InputError(
                f"{uri}{where}: {what} in this node's cache (the disk or memory changed it); the copy "
                "is removed: start again"
            )
        return InputError(f"{uri}{where}: {what}; {repair_hint(self.uri)}")


class _Buffers:
    """Pixel arrays that are used again once nobody holds their batch: new memory faults in page by page, at 6% of the
    decoding."""

    def __init__(self):
        self._arrays: dict[tuple[int, ...], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        with self._lock:
            arrays = self._arrays.setdefault(shape, [])
            for array in arrays:
                # Ours, the loop's and the call's: no tensor, and no view of one, refers to it any more.
                if sys.getrefcount(array) == 3:
                    return array
            array = np.empty(shape, np.uint8)
            if len(arrays) < MAX_BUFFERS:  # someone who keeps every batch gets arrays of their own
                arrays.append(array)
            return array


def _collate(pixels: np.ndarray, records: np.ndarray) -> Batch:
    def column(name: str, dtype) -> torch.Tensor:
        return torch.from_numpy(records[name].astype(dtype))[:, None]

    labels = Labels(
        va=column("va", np.float32),
        expr=column("expr", np.int64),
        au=column("au", np.float32),
        va_mask=column("va_mask", bool),
        expr_mask=column("expr_mask", bool),
        au_mask=column("au_mask", bool),
    )
    return Batch(
        inputs=torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None],  # a channels_last view of the decoded rows
        num_frames=torch.ones(len(pixels), dtype=torch.int64),
        labels=labels,
        rows=column("row", np.int64),
    )
