"""One URI, a local path or s3://bucket/key: read, write, list, delete.

Writes are atomic: a temporary name and a rename; S3 puts are atomic by themselves. What is written is on the disk when
the call returns. So where a file vouches for others and is written after them, no power cut keeps it and loses them.

What a user can mend (credentials, bucket, server, path) is an `InputError` with the URI. A store that does not answer
is a `StorageError`; `s3.py`, which the first s3:// URI imports, says how often and how long it is asked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mtl_dist.errors import InputError

# Of a directory in the system's place for temporary ones; then the host's name, what for, and random letters.
SCRATCH_PREFIX = "mtl_dist-scratch-"
MAX_BYTES = 1 << 30  # of what is read at once, unless its reader says otherwise
PART_PREFIX = ".part-"  # of a file that is being written; then the host's name and random letters
ABANDONED_S = 24 * 3600  # of another host: nothing is written for a day
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)  # a file system that does not know how, of directories above all
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the environment of what `ray job submit` starts
RAY_COPIES = "runtime_resources/working_dir_files"  # in the path of its working directory
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # deleted meanwhile, or a link that leads nowhere


class StoredObject(NamedTuple):
    """A file or object that was listed."""

    name: str  # relative to the listed prefix, with '/' between parts
    size: int  # bytes


def is_s3(uri: str) -> bool:
    """Whether a URI is in object storage; all others are local paths."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Append parts to a URI, with one slash before each."""
    return "/".join([uri.rstrip("/"), *parts])


def local_path(uri: str) -> Path:
    """Return a local URI as a path. Other schemes than s3:// and file:// are refused by name."""
    if "://" in uri and not uri.startswith("file://"):
        raise InputError(f"'{uri}' has the scheme '{uri.split('://')[0]}'; expected a local path or s3://bucket/prefix")
    if uri == "s3:" or uri.startswith("s3:/"):  # s3:// with its slashes taken off, or mistyped
        raise InputError(f"'{uri}' names no bucket; expected s3://bucket/prefix")
    return Path(uri.removeprefix("file://")).expanduser()


def absolute(uri: str) -> str:
    """Return a local URI as an absolute path; s3:// and the empty string as they are."""
    return str(local_path(uri).absolute()) if uri and not is_s3(uri) else uri


def exists(uri: str) -> bool:
    """Whether this object or file exists."""
    if is_s3(uri):
        return _s3().exists(uri)
    with _local_read_errors(uri):
        return local_path(uri).is_file()


def read_bytes(uri: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole object.

    Raises FileNotFoundError where there is none, and `InputError` where this user may not read it, where it is a device
    or a pipe, and before reading where it is larger than `max_bytes`.
    """
    if is_s3(uri):
        return _s3().read_bytes(uri, max_bytes=max_bytes)
    path = local_path(uri)
    with _local_read_errors(uri):
        check_ends(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise InputError(f"{uri} has {size} bytes; at most {max_bytes} are read")
            return file.read()  # told how much, it would ask for the memory at once


def check_ends(path: Path) -> None:
    """Raise `InputError` for a device or a pipe, which may be read for ever; what else is wrong, reading will tell."""
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is a device or a pipe; expected a file")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object atomically."""
    if is_s3(uri):
        _s3().write_bytes(uri, data)
        return
    path = local_path(uri)
    with _local_write_errors(path), atomic_path(path, durable=True) as part:
        part.write_bytes(data)


def upload(path: Path, uri: str) -> None:
    """Copy a local file to a URI, atomically."""
    if is_s3(uri):
        _s3().upload(path, uri)
        return
    target = local_path(uri)
    with _local_write_errors(target), atomic_path(target, durable=True) as part:
        shutil.copyfile(path, part)


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """Give a local path to write to; when the block ends well, the file is at `uri`, atomically."""
    if not is_s3(uri):
        target = local_path(uri)
        with _local_write_errors(target), atomic_path(target, durable=True) as part:
            yield part
        return
    with scratch_directory("upload") as scratch:
        path = scratch / "object"
        yield path
        upload(path, uri)


def download(uri: str, path: Path) -> None:
    """Copy an object to a local file, atomically.

    Raises FileNotFoundError where there is none, and any other OSError where `path` cannot be written.
    """
    with atomic_path(path) as part:
        if is_s3(uri):
            _s3().download(uri, part)
        else:
            check_ends(local_path(uri))
            shutil.copyfile(local_path(uri), part)


def list_objects(uri: str, *, follow_links: bool = False) -> list[StoredObject]:
    """List every object below a prefix, sorted by name; empty where there is nothing.

    Links to directories are followed on request only: what is listed may be deleted. Raises `InputError` naming a
    directory that this user may not list.
    """
    if not is_s3(uri):
        return sorted(_walk(local_path(uri), follow_links=follow_links))
    return sorted(StoredObject(name, size) for name, (size, _) in list_versions(uri).items())


def list_directories(uri: str) -> list[str]:
    """Name the directories directly below a prefix, sorted. On S3 each holds something; a local one may be empty, or
    hold only what a killed process was writing."""
    names = {name.partition("/")[0] for name, _ in list_objects(uri) if "/" in name}
    if not is_s3(uri) and (path := local_path(uri)).is_dir():
        names |= {entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)}
    return sorted(names)


def list_versions(uri: str) -> dict[str, tuple[int, str]]:
    """Return {name: (size, ETag)} of every object below an s3:// prefix: what changes when an object is replaced."""
    key = _s3().split(uri)[1]
    prefix = f"{key.rstrip('/')}/" if key else ""
    found = _s3().list_objects(uri, prefix)
    return {name.removeprefix(prefix): (size, etag) for name, size, etag in found if name != prefix}


def written_at(uri: str) -> float:
    """Return when this object was written, by the store's clock, in seconds since 1970; on S3 they are whole ones.

    Raises FileNotFoundError where there is none.
    """
    return _s3().written_at(uri) if is_s3(uri) else local_path(uri).stat().st_mtime


def delete(uri: str) -> None:
    """Delete one object; nothing happens where there is none."""
    if is_s3(uri):
        _s3().delete(uri)
    else:
        path = local_path(uri)
        with _local_write_errors(path, "deleted"):
            path.unlink(missing_ok=True)


def delete_all(uri: str, *, first: str | None = None) -> None:
    """Delete everything below a prefix, the object named `first` before all others: a marker must not outlive them."""
    names = [found.name for found in list_objects(uri)]
    for name in sorted(names, key=lambda name: name != first):
        delete(join(uri, name))
    if not is_s3(uri):
        shutil.rmtree(local_path(uri), ignore_errors=True)


def check_writable(uri: str, *, flag: str = "") -> None:
    """Raise an `InputError` unless objects can be written below this prefix. Nothing of the probe is left.

    `flag` is the option that names it.
    """
    check_lasting(uri, flag=flag)
    if not uri:  # of a variable of the shell that is not set, perhaps: files would lie in /
        raise InputError(f"{flag or 'the place to write to'} is empty; expected a directory or s3://bucket/prefix")
    if is_s3(uri):
        probe = join(uri, f".probe-{os.getpid()}")
        write_bytes(probe, b"")
        delete(probe)
        return
    if exists(uri):
        what = f"{flag} is {uri}, which is a file" if flag else f"{uri} cannot be written to: it is a file"
        raise InputError(f"{what}; expected a directory, which may be there already or not")
    path = local_path(uri)
    with _local_write_errors(path):
        nearest = next(directory for directory in (path.absolute(), *path.absolute().parents) if directory.exists())
        with tempfile.TemporaryFile(dir=nearest):  # what starts may fail yet: no directory is made for it
            pass


def check_lasting(uri: str, *, flag: str = "") -> None:
    """Raise an `InputError` for a place that goes with a Ray job: relative inside one, or in its copy of our files.

    `ray job submit --working-dir` runs a command in such a copy. Every change of a file makes another one, so that a
    run would begin anew, and all go with the cluster.
    """
    if is_s3(uri) or not uri:
        return
    path = local_path(uri)
    if RAY_COPIES in "/".join(path.absolute().parts[1:]) or (not path.is_absolute() and RAY_JOB in os.environ):
        raise InputError(
            f"{flag or 'the place to write to'} is {uri}, inside the working directory of a Ray job, a throw-away "
            "copy: it goes with the next change of a file, and with the cluster; give s3://bucket/prefix, or the "
            "absolute path of a disk that stays"
        )


def sha256_of(path: Path) -> str:
    """Return the checksum of a local file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed onto it when the block ends well and removed when it does not.

    With `durable` the file and its name, and those of the directories made for it, are on the disk by then. A process
    that is killed in the block leaves a file; the next that writes into this directory removes it.
    """
    new = list(itertools.takewhile(lambda directory: not directory.exists(), path.parents))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent, os.getpid())
    handle, part = _open_part(path.parent)
    try:
        yield part
        if durable:
            _sync(part)
        part.replace(path)
        if durable:
            for directory in (path.parent, *(directory.parent for directory in new)):
                _sync(directory)
    finally:
        part.unlink(missing_ok=True)
        os.close(handle)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """Give a temporary directory on this machine's disk, removed when the block ends.

    A process that is killed in the block leaves it; the next that makes one removes it.
    """
    place = Path(tempfile.gettempdir())
    _remove_abandoned_scratch(place, os.getpid())
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{socket.gethostname()}-{purpose}-", dir=place))
        try:
            handle = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # removed by another process before it was opened
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if scratch.exists():  # else removed by another process before it was locked
            break
        os.close(handle)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


@functools.lru_cache
def _remove_abandoned_scratch(place: Path, pid: int) -> None:
    """Remove this user's scratch directories that no process holds; once a process. Places may be shared by hosts."""
    for scratch in place.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, removed meanwhile, or in use
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                is_ours = scratch.name.rsplit("-", 2)[0] == f"{SCRATCH_PREFIX}{socket.gethostname()}"
                if os.fstat(handle).st_uid == os.geteuid() and _may_be_abandoned(scratch, is_ours=is_ours):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(handle)


def _may_be_abandoned(path: Path, *, is_ours: bool) -> bool:
    """Whether a lock tells if this is in use: of another host's it may not be seen, so a day is waited."""
    return is_ours or time.time() - path.stat().st_mtime > ABANDONED_S


def _open_part(directory: Path) -> tuple[int, Path]:
    """Create a file that is locked as long as its handle is open: who gets the lock may remove it."""
    while True:
        path = directory / f"{PART_PREFIX}{socket.gethostname()}-{secrets.token_hex(6)}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # less what the user's umask takes away
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # 0: removed by another process before it was locked
            return handle, path
        os.close(handle)


@functools.lru_cache
def _remove_abandoned(directory: Path, pid: int) -> None:
    """Remove what killed processes were writing here; once a directory and process, because listing costs."""
    for part in directory.glob(f"{PART_PREFIX}*"):
        with contextlib.suppress(OSError), part.open("r+b") as file:  # removed by another, or locked: being written
            is_ours = part.name.rpartition("-")[0] == f"{PART_PREFIX}{socket.gethostname()}"
            if _may_be_abandoned(part, is_ours=is_ours):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _walk(root: Path, *, follow_links: bool) -> Iterator[StoredObject]:
    """Yield the files below a directory, named from there."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]  # and what each is in
    while pending:
        prefix, above = pending.pop()
        directory = root / prefix
        try:
            about = directory.stat()
            here = above | {(about.st_dev, about.st_ino)}
            if len(here) == len(above):  # by a link back to a directory that it is in
                continue
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    try:
                        if entry.is_dir(follow_symlinks=follow_links):
                            pending.append((f"{name}/", here))
                        elif entry.is_file() and not entry.name.startswith(PART_PREFIX):
                            yield StoredObject(name, entry.stat().st_size)
                    except OSError as error:
                        if error.errno not in ABSENT:
                            raise _unlisted(root / name, error) from None
        except OSError as error:
            if error.errno not in ABSENT:
                raise _unlisted(directory, error) from None


def _unlisted(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be listed: {error.strerror}; change its permissions, or move it elsewhere")


@contextlib.contextmanager
def _local_read_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise InputError(
            f"{uri} may not be read by this user; change its permissions, or those of the directories it is in"
        ) from None


@contextlib.contextmanager
def _local_write_errors(path: Path, done: str = "written") -> Iterator[None]:
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{path} cannot be {done}: {error.strerror}; choose a directory you may write to") from None
    except OSError as error:
        raise InputError(f"{path} cannot be {done}: {error.strerror}") from None


def _s3():
    from mtl_dist import s3  # boto3 takes 0.3 s to import, and local paths do without

    return s3
