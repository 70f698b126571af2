"""The shards of a set on this node: fetched, checked and mapped, the ones used last kept open.

A tar that is cut short while it is mapped (a local set that is copied over in place) ends the process with SIGBUS, of
which a command says the line here alone (faulthandler). A look at its size before every batch would take 0.4 us a
shard, 0.3 to 0.5% of the decoding, and miss what happens within the batch. Replacing a file by a rename, as everything
here does, is harmless.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import FEATURES, Index, ShardEntry, index_dir, repair_hint
from mtl_dist.errors import Damaged, InputError
from mtl_dist.threads import DaemonThreads

OPEN_SHARDS = 512  # kept, or as many as are needed at a time; each holds a file descriptor
SIDECAR_THREADS = 8  # mostly waiting for the store

Opened = TypeVar("Opened")


class MappedShards(Generic[Opened]):
    """The shards of one set by number. Safe to share between threads. What a shard is opened as, a subclass says."""

    def __init__(self, uri: str, index: Index, cache: Cache):
        self.uri, self.index, self.cache = index_dir(uri), index, cache
        self.max_open = min(OPEN_SHARDS, len(index.shards))
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def _hint(self) -> str:
        return repair_hint(self.uri, features=self.index.format == FEATURES)

    def parse(self, data: bytes, entry: ShardEntry) -> Any:
        """Parse and check a sidecar. Raises `Damaged`."""
        raise NotImplementedError

    def opened(self, tar: memoryview, sidecar: Any, entry: ShardEntry) -> Opened:
        """Return what is read of a shard."""
        raise NotImplementedError

    def keep_open(self, count: int) -> None:
        """Keep `count` shards open at least, where there are as many: opening one again reads its sidecar again."""
        self.max_open = max(self.max_open, min(count, len(self.index.shards)))

    def warm(self, shards: Iterable[int]) -> None:
        """Fetch shards into the cache and open them, ahead of need."""
        for shard in shards:
            self.shard(int(shard))

    def shard(self, number: int) -> Opened:
        """Return a shard, open."""
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

    def sidecars(self, progress: Callable[[int], None] = lambda count: None) -> Iterator[Any]:
        """Yield the sidecars of all shards in their order; `progress` is told of shards."""
        with DaemonThreads(SIDECAR_THREADS, "sidecar") as pool:
            for sidecar in pool.map(self._read_sidecar, self.index.shards):
                progress(1)
                yield sidecar

    def _read_sidecar(self, entry: ShardEntry) -> Any:
        sidecar_uri = storage.join(self.uri, f"{entry.name}.safetensors")
        with self.cache.open(sidecar_uri, sha256=entry.sidecar_sha256, size=entry.sidecar_bytes) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
            raise self.damage(sidecar_uri, entry.sidecar_sha256, "its bytes do not match their checksum")
        try:
            return self.parse(data, entry)
        except Damaged as error:
            raise InputError(f"{sidecar_uri}: {error}; {self._hint}") from None

    def _open_shard(self, entry: ShardEntry) -> Opened:
        sidecar = self._read_sidecar(entry)
        tar_uri = storage.join(self.uri, f"{entry.name}.tar")
        file = self.cache.open(tar_uri, sha256=entry.tar_sha256, size=entry.tar_bytes)
        with file:  # the mapping keeps the file, and with it the shared lock, open
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self.opened(mapped, sidecar, entry)

    def damage_of(self, entry: ShardEntry, where: str, what: str) -> InputError:
        """Say what is wrong with the tar of a shard, and where in it."""
        return self.damage(storage.join(self.uri, f"{entry.name}.tar"), entry.tar_sha256, what, where=f", {where}")

    def damage(self, uri: str, sha256: str, what: str, *, where: str = "") -> InputError:
        """Say what is wrong with a file, and what to do; a copy of it is removed."""
        if storage.is_s3(uri):  # the copy was whole when it arrived: the next run fetches it anew
            self.cache.forget(uri, sha256)
            return InputError(
                f"{uri}{where}: {what} in this node's cache (the disk or memory changed it); the copy "
                "is removed: start again"
            )
        return InputError(f"{uri}{where}: {what}; {self._hint}")
