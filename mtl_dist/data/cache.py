"""The node's cache of shards: fetched once by whichever process needs a shard first, shared by all of them.

A file's name is a hash of its URI and checksum, so neither equal base names nor a set written anew can collide. A file
is downloaded under a lock to a temporary name, checked against the index, then renamed: what has its name is whole.
The lock is a file of its own, which its holder removes: who waited for it begins anew.
Readers hold a shared lock on what they have open, and eviction removes only what nobody holds. So jobs with different
bounds can share a directory; the smallest bound holds for files that nobody has open. Open files can exceed it. A file
whose name is none that the cache gives belongs to somebody else, and stays.
Every user has files of their own: in another user's directory each has a subdirectory. Files that somebody else made or
can replace prove nothing, and may be unreadable.

Where a disk fills up before the bound is reached, everything that nobody holds is removed; if that is not enough, the
run ends with an `InputError`. A download that fails does so for all who wait for it, so their waits do not add up. A
store that falls silent ends a run within 10 minutes: 5 for fetching ahead and 5 for fetching when the shard is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

from mtl_dist import storage
from mtl_dist.data.index import repair_hint
from mtl_dist.errors import InputError, StorageError

GIB = 1 << 30
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_NOTE_BYTES = 2000
NAME_DIGITS = 40  # of a hash, in hexadecimal
OWN_NAME = re.compile(rf"[0-9a-f]{{{NAME_DIGITS}}}(\.part|\.lock)?")  # of everything that a cache makes


class Cache:
    """Files of a store on this node, bounded to `max_bytes`."""

    def __init__(self, directory: Path | None = None, *, max_bytes: int = 50 * GIB):
        default = os.environ.get("MTL_CACHE_DIR") or "~/.cache/mtl_dist/shards"
        given = Path(directory or default).expanduser()
        self.directory = given if _is_ours(given) else given / f"user-{os.geteuid()}"
        self._is_in_anothers = self.directory != given
        self.max_bytes = max_bytes

    def open(self, uri: str, *, sha256: str, size: int) -> BinaryIO:
        """Open a stored object's verified local copy; a local path is opened in place.

        Raises `InputError` naming the object if it is gone, if what the store sends is not what the index says, or if
        this node has no room for it; `StorageError` if the store does not answer.
        """
        if not storage.is_s3(uri):
            return _open_in_place(uri, size)
        path = self.path(uri, sha256)
        try:
            self._make_directory()
            try:
                return self._open_cached(uri, path, sha256=sha256, size=size)
            except OSError as error:
                if error.errno not in FULL:
                    raise
            self._evict(room_for=size, max_bytes=0)
            return self._open_cached(uri, path, sha256=sha256, size=size)
        except StorageError:
            raise
        except OSError as error:
            need = f"; {uri} needs {size} bytes, and all that is cached is in use" if error.errno in FULL else ""
            raise InputError(
                f"cache directory {self.directory} cannot be used: {error.strerror}{need}; make room there, or set "
                "data.cache_dir to a directory you may write to"
            ) from None

    def path(self, uri: str, sha256: str) -> Path:
        """Where the copy of an object lies, or would lie. The name depends on its URI and content."""
        return self.directory / hashlib.sha256(f"{uri}\n{sha256}".encode()).hexdigest()[:NAME_DIGITS]

    def forget(self, uri: str, sha256: str) -> None:
        """Remove a copy that turned out to be damaged on this disk."""
        self.path(uri, sha256).unlink(missing_ok=True)

    def _make_directory(self) -> None:
        if not self._is_in_anothers:
            self.directory.mkdir(parents=True, exist_ok=True)
            return
        with contextlib.suppress(FileExistsError):
            self.directory.mkdir(mode=0o700)
        if (owner := self.directory.lstat().st_uid) != os.geteuid():
            raise InputError(
                f"cache directory {self.directory} is of user {owner}, who could put anything there; expected one of "
                f"user {os.geteuid()}, who runs this; set data.cache_dir to a directory of your own, or have that one "
                "removed"
            )

    def _open_cached(self, uri: str, path: Path, *, sha256: str, size: int) -> BinaryIO:
        while True:
            try:
                file = _open_locked(path)
            except FileNotFoundError:
                file = self._fetch(uri, path, sha256=sha256, size=size)
            if file is None:
                continue
            about = os.fstat(file.fileno())
            # Else cut short when the machine went down, or put there by somebody who may write here too.
            is_good = about.st_size == size and about.st_uid == os.geteuid()
            if is_good and about.st_nlink:  # 0 links: evicted between opening and locking
                os.utime(file.fileno())  # eviction goes by it; most mounts do not keep it by themselves
                return file
            file.close()
            if not is_good:
                path.unlink(missing_ok=True)

    def _fetch(self, uri: str, path: Path, *, sha256: str, size: int) -> BinaryIO | None:
        """Download, check and open an object; None where another process has done so meanwhile."""
        lock_path = path.with_suffix(".lock")
        with lock_path.open("a+b", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one download a node; released by the kernel when a process dies
            if not _is_at(lock, lock_path):  # its holder is done, well or not
                lock.seek(0)
                if not path.exists() and (note := lock.read()):
                    raise StorageError(note.decode(errors="replace"))
                return None
            try:
                if path.exists():
                    return None
                lock.truncate(0)  # a killed process's note
                self._evict(room_for=size, max_bytes=self.max_bytes)
                return _download(uri, path, sha256=sha256, size=size)
            except StorageError as error:
                with contextlib.suppress(OSError):
                    lock.write(str(error).encode()[:MAX_NOTE_BYTES])
                raise
            finally:
                lock_path.unlink(missing_ok=True)

    def _evict(self, *, room_for: int, max_bytes: int) -> None:
        """Remove the files used longest ago until `room_for` more bytes fit; what a process holds open stays."""
        copies, total = [], 0
        for path in filter(lambda path: OWN_NAME.fullmatch(path.name), self.directory.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".part", ".lock"):
                    if not _remove_leftovers(path) and path.suffix == ".part":  # a download under way
                        total += sum(file.stat().st_size for file in path.iterdir())
                elif path.is_file():
                    copies.append((path.stat().st_atime_ns, path.stat().st_size, path))
        total += sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total + room_for <= max_bytes:
                return
            with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                total -= size


def _is_ours(directory: Path) -> bool:
    try:
        return directory.stat().st_uid == os.geteuid()
    except OSError:  # not there yet, or not to be looked at: said where it is used
        return True


def _open_locked(path: Path) -> BinaryIO:
    """Open a file and hold it against eviction as long as it, or a mapping of it, is open."""
    file = path.open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _download(uri: str, path: Path, *, sha256: str, size: int) -> BinaryIO:
    scratch = path.with_suffix(".part")  # ours alone under the lock
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
                file = _open_locked(part)  # before it has its name: nobody can evict it
                part.replace(path)
                return file
        raise InputError(f"{uri} is not what the index says (its sha256 or size differs, fetched twice); {_hint(uri)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftovers(path: Path) -> bool:
    """Remove the lock, and what was downloaded, of a process that was killed; False where a living one has them."""
    lock_path = path.with_suffix(".lock")
    try:
        with lock_path.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(lock, lock_path):
                return False
            shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
            lock_path.unlink()
    except (BlockingIOError, PermissionError):
        return False
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
