"""The node's cache of shards: fetched once by whichever process needs a shard first, shared by all of them.

A file's name is a hash of its URI and checksum, so neither equal base names nor a set written anew can collide. A file
is downloaded under a lock to a temporary name, checked against the index, then renamed: what has its name is whole.
Readers hold a shared lock on what they have open, and eviction takes only what nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from mtl_dist import storage
from mtl_dist.data.index import repair_hint
from mtl_dist.errors import InputError

GIB = 1 << 30


class Cache:
    """Files of a store on this node, bounded to `max_bytes`."""

    def __init__(self, directory: Path | None = None, *, max_bytes: int = 50 * GIB):
        default = os.environ.get("MTL_CACHE_DIR") or "~/.cache/mtl_dist/shards"
        self.directory = Path(directory or default).expanduser()
        self.max_bytes = max_bytes

    def open(self, uri: str, *, sha256: str, size: int) -> BinaryIO:
        """Open a stored object's verified local copy; a local path is opened in place.

        Raises `InputError` naming the object if it is gone, or if what the store sends is not what the index says.
        """
        if not storage.is_s3(uri):
            return _open_in_place(uri, size)
        path = self.path(uri, sha256)
        while True:
            try:
                file = path.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH)
                found = os.fstat(file.fileno())
                if found.st_nlink and found.st_size == size:  # 0 links: evicted between opening and locking
                    with contextlib.suppress(PermissionError):  # another user's
                        os.utime(file.fileno())  # eviction goes by it; most mounts do not keep it by themselves
                    return file
                file.close()
                if found.st_size != size:
                    path.unlink(missing_ok=True)  # cut short when the machine went down
            except FileNotFoundError:
                pass
            except OSError as error:
                raise self._unusable(error) from None
            self._fetch(uri, path, sha256=sha256, size=size)

    def path(self, uri: str, sha256: str) -> Path:
        return self.directory / hashlib.sha256(f"{uri}\n{sha256}".encode()).hexdigest()[:40]

    def forget(self, uri: str, sha256: str) -> None:
        """Remove a copy that turned out to be damaged on this disk."""
        self.path(uri, sha256).unlink(missing_ok=True)

    def _fetch(self, uri: str, path: Path, *, sha256: str, size: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / f"{path.name}.lock").open("w")
        except OSError as error:
            raise self._unusable(error) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one download a node; released by the kernel when a process dies
            if path.exists():
                return
            self._evict(room_for=size)
            # Ours alone under the lock. A directory, because boto3 has temporary names of its own.
            scratch = path.with_suffix(".part")
            try:
                for _ in range(2):
                    shutil.rmtree(scratch, ignore_errors=True)  # a dead process's leftover, too
                    scratch.mkdir()
                    part = scratch / "object"
                    try:
                        storage.download(uri, part)
                    except FileNotFoundError:
                        raise InputError(f"{uri} is gone, but the index lists it; {_hint(uri)}") from None
                    if part.stat().st_size == size and storage.sha256_of(part) == sha256:
                        part.replace(path)
                        return
                raise InputError(
                    f"{uri} is not what the index says (its sha256 or size differs, fetched twice); {_hint(uri)}"
                )
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _unusable(self, error: OSError) -> InputError:
        return InputError(
            f"cache directory {self.directory} cannot be used: {error.strerror}; set data.cache_dir to one you may "
            "write to"
        )

    def _evict(self, *, room_for: int) -> None:
        """Remove the files used longest ago until `room_for` more bytes fit; what a process holds open stays."""
        found, total = [], 0
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".part" and not _remove_leftover(path):  # a download under way
                    total += sum(file.stat().st_size for file in path.iterdir())
                elif not path.suffix:
                    found.append((path.stat().st_atime_ns, path.stat().st_size, path))
        total += sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + room_for <= self.max_bytes:
                return
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                total -= size


def _remove_leftover(scratch: Path) -> bool:
    """Remove what a killed process had downloaded; False where a living one still does."""
    with scratch.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _open_in_place(uri: str, size: int) -> BinaryIO:
    path = storage.local_path(uri)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{uri} is gone, but the index lists it; {_hint(uri)}") from None
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise InputError(f"{uri} has {found} bytes; the index says {size}; {_hint(uri)}")
    return file


def _hint(uri: str) -> str:
    return repair_hint(uri.rpartition("/")[0])
