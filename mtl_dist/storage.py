"""One URI, a local path or s3://bucket/key: read, write, list, delete. The only importer of boto3.

Writes are atomic (a temporary name and a rename; S3 puts are atomic by themselves). Faults of the network are retried
by botocore within `TIMEOUTS`; what a user can mend (credentials, bucket, server, path) is an `InputError` with the URI.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mtl_dist.errors import InputError, StorageError

# botocore: at most 6 tries (or AWS_MAX_ATTEMPTS) of 10 s to connect and 30 s between bytes, with back-off: under
# 5 minutes in all. Where nothing listens, 6 tries take about 16 s.
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
MAX_ATTEMPTS = 6


class StoredObject(NamedTuple):
    name: str  # relative to the listed prefix, with '/' between parts
    size: int  # bytes


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
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
    if not is_s3(uri):
        return local_path(uri).is_file()
    bucket, key = _split(uri)
    try:
        with _s3_errors(uri):
            _client().head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def read_bytes(uri: str) -> bytes:
    """Read a whole object. Raises FileNotFoundError where there is none."""
    if not is_s3(uri):
        return local_path(uri).read_bytes()
    bucket, key = _split(uri)
    with _s3_errors(uri):
        return _client().get_object(Bucket=bucket, Key=key)["Body"].read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object atomically."""
    if not is_s3(uri):
        path = local_path(uri)
        with _local_write_errors(path), atomic_path(path) as part:
            part.write_bytes(data)
        return
    bucket, key = _split(uri)
    with _s3_errors(uri):
        _client().put_object(Bucket=bucket, Key=key, Body=data)


def upload(path: Path, uri: str) -> None:
    """Copy a local file to a URI, atomically."""
    if not is_s3(uri):
        target = local_path(uri)
        with _local_write_errors(target), atomic_path(target) as part:
            shutil.copyfile(path, part)
        return
    bucket, key = _split(uri)
    with _s3_errors(uri):
        _client().upload_file(str(path), bucket, key)


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """Give a local path to write to; when the block ends well, the file is at `uri`, atomically."""
    if not is_s3(uri):
        target = local_path(uri)
        with _local_write_errors(target), atomic_path(target) as part:
            yield part
        return
    with tempfile.TemporaryDirectory(prefix="mtl_dist-") as scratch:
        path = Path(scratch) / "object"
        yield path
        upload(path, uri)


def download(uri: str, path: Path) -> None:
    """Copy an object to a local file, atomically. Raises FileNotFoundError where there is none."""
    with atomic_path(path) as part:
        if not is_s3(uri):
            shutil.copyfile(local_path(uri), part)
            return
        bucket, key = _split(uri)
        with _s3_errors(uri):
            _client().download_file(bucket, key, str(part))


def list_objects(uri: str) -> list[StoredObject]:
    """List every object below a prefix, sorted by name; empty where there is nothing."""
    if not is_s3(uri):
        root = local_path(uri)
        files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".part-")]
        return sorted(StoredObject(path.relative_to(root).as_posix(), path.stat().st_size) for path in files)
    bucket, key = _split(uri)
    prefix = f"{key.rstrip('/')}/" if key else ""
    with _s3_errors(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", ())]
    return sorted(StoredObject(name.removeprefix(prefix), size) for name, size in found if name != prefix)


def delete(uri: str) -> None:
    """Delete one object; nothing happens where there is none."""
    if not is_s3(uri):
        local_path(uri).unlink(missing_ok=True)
        return
    bucket, key = _split(uri)
    with _s3_errors(uri):
        _client().delete_object(Bucket=bucket, Key=key)


def delete_all(uri: str, *, first: str | None = None) -> None:
    """Delete everything below a prefix, the object named `first` before all others: a marker must not outlive them."""
    names = [found.name for found in list_objects(uri)]
    for name in sorted(names, key=lambda name: name != first):
        delete(join(uri, name))
    if not is_s3(uri):
        shutil.rmtree(local_path(uri), ignore_errors=True)


def check_writable(uri: str) -> None:
    """Raise an `InputError` unless objects can be written below this prefix (a probe is written and removed)."""
    probe = join(uri, f".probe-{os.getpid()}")
    write_bytes(probe, b"")
    delete(probe)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _local_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose a directory you may write to") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"'{uri}' names no bucket; expected s3://bucket/prefix")
    return bucket, key


@functools.cache
def _client_of(pid: int):
    import boto3
    from botocore.config import Config as BotoConfig

    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or MAX_ATTEMPTS)
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return boto3.client("s3", config=BotoConfig(max_pool_connections=32, retries=retries, **TIMEOUTS))


def _client():
    """Return this process's client: boto3's own chain finds credentials, region and AWS_ENDPOINT_URL."""
    return _client_of(os.getpid())  # a client does not survive a fork


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    import botocore.exceptions as boto
    from boto3.exceptions import S3UploadFailedError

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise InputError(
            f"{uri}: no S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a "
            "profile or role that boto3 finds"
        ) from None
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ConnectionClosedError) as error:
        raise InputError(
            f"{uri}: no S3 server answers at {endpoint} ({error}); check AWS_ENDPOINT_URL and the network"
        ) from None
    except (boto.ClientError, S3UploadFailedError) as error:
        text = str(error)
        code = error.response.get("Error", {}).get("Code", "") if isinstance(error, boto.ClientError) else text
        if isinstance(error, boto.ClientError) and code in ("404", "NoSuchKey"):
            raise FileNotFoundError(f"{uri} does not exist") from None
        if "NoSuchBucket" in code:
            raise InputError(
                f"{uri}: bucket '{_split(uri)[0]}' does not exist at {endpoint}; create it or correct the name"
            ) from None
        if any(
            word in code
            for word in (
                "403",
                "AccessDenied",
                "InvalidAccessKeyId",
                "SignatureDoesNotMatch",
                "InvalidToken",
                "ExpiredToken",
            )
        ):
            raise InputError(
                f"{uri}: the S3 server at {endpoint} refuses these credentials ({text}); check "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what the key may do"
            ) from None
        raise StorageError(f"{uri}: {text}") from error
    except boto.BotoCoreError as error:
        raise StorageError(f"{uri}: {error}") from error
