"""Requests to an S3 server: every retry, the renewal of credentials, every error in words. The only importer of boto3.

A request is tried again, with waits of 1, 2, 4, 8, 16, 16, ... s between, when the server says that it is busy or
broken, when nothing answers, and when the connection breaks or stalls, also in the middle of a body. A try waits 10 s
to connect and 30 s (`MTL_S3_TIMEOUT_S`) for the next byte. No try begins later than 3 minutes after the first. So a
request ends within 5 minutes, whatever the server does. Two kinds end sooner: where nothing has ever listened, after 6
tries, about 25 s; where `AWS_MAX_ATTEMPTS` is set, after so many tries. A read gives the whole object or is tried
again: it asks for parts of 8 MiB, and every answer names the object's size, so an answer that was cut short is noticed.
Only an upload over 8 MiB can take twice as long: boto3 tries its parts by itself, and then takes them back.

Credentials that the server refuses are asked for anew from boto3's own chain, once a request: they may have expired
before their time. What a user can mend is an `InputError`, the rest a `StorageError`; both name the URI.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import botocore.exceptions as boto
import urllib3.exceptions
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config as BotoConfig
from botocore.parsers import ResponseParserError

from mtl_dist.errors import InputError, StorageError
from mtl_dist.threads import DaemonThreads

UNHEARD_ATTEMPTS = 6  # where nothing has ever listened: the endpoint is mistyped, probably
PART_ATTEMPTS = 6  # of boto3 for a part of an upload
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30  # without a byte
LAST_TRY_S = 180  # after the first: no try begins later
SLOWEST_S = 240  # for a part, all its tries together: a body that trickles in slower (35 kB/s) is given up
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 16.0
CHUNK_BYTES = 64 << 10  # between two looks at the clock
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 8

# The server has answered, and will not be pleased by trying again. 400 is what HEAD, without a body, says of a token.
REFUSALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "400"}
AGAIN = {"SlowDown", "RequestTimeout", "NoSuchUpload"}  # the last: an upload in parts that the server forgot
UPLOAD_KEY = "mtl-upload"  # metadata: tells an upload from others of the same file
NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.MetadataRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
)
UNREACHABLE = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
TRANSIENT = (
    *UNREACHABLE,
    boto.HTTPClientError,  # closed, timed out, broken in the middle
    boto.IncompleteReadError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
)

_lock = threading.Lock()
_clients: dict[tuple[int, int], Any] = {}  # by process, because a client does not survive a fork, and attempts
_answered: set[str] = set()  # endpoints that have answered this process: one that falls silent is away, not mistyped


class _Part(NamedTuple):
    data: bytes
    total: int  # bytes of the object
    etag: str | None


def exists(uri: str) -> bool:
    """Whether an object of exactly this key is there."""
    try:
        _request(uri, lambda client, **where: client.head_object(**where))
    except FileNotFoundError:
        return False
    return True


def read_bytes(uri: str, *, max_bytes: int) -> bytes:
    """Read a whole object. Raises `InputError` before reading where it is larger than `max_bytes`."""
    parts: dict[int, bytes] = {}

    def keep(begin: int, data: bytes) -> None:
        if not begin:  # of another version, perhaps
            parts.clear()
        parts[begin] = data

    _read_parts(uri, keep, max_bytes=max_bytes)
    return b"".join(parts[begin] for begin in sorted(parts))


def download(uri: str, path: Path) -> None:
    """Copy an object to `path`, all bytes from one version of it."""

    def write(begin: int, data: bytes) -> None:
        with path.open("r+b" if begin else "wb") as file:
            file.seek(begin)
            file.write(data)

    _read_parts(uri, write)


def write_bytes(uri: str, data: bytes) -> None:
    """Store an object in one request. One of the same key is replaced."""
    _request(uri, lambda client, **where: client.put_object(**where, Body=data))


def upload(path: Path, uri: str) -> None:
    """Copy a file to an object; one over 8 MiB in parts that boto3 sends side by side and tries again by itself."""
    name = secrets.token_hex(8)

    def send(client, **where: str) -> None:
        try:
            client.upload_file(str(path), *where.values(), ExtraArgs={"Metadata": {UPLOAD_KEY: name}})
        except S3UploadFailedError as error:
            # The answer to the completion was lost, boto3 asked again, and some servers forget an upload at once.
            is_lost = isinstance(error.__context__, boto.ClientError) and _code(error.__context__) == "NoSuchUpload"
            if not is_lost or _upload_key(client, **where) != name:
                raise

    _request(uri, send, boto_attempts=min(_max_attempts(), PART_ATTEMPTS))


def list_objects(uri: str, prefix: str) -> list[tuple[str, int, str]]:
    """Return key, size and ETag, which changes with the content, of every object whose key starts with `prefix`."""

    def list_pages(client, Bucket: str, Key: str) -> list[tuple[str, int, str]]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=Bucket, Prefix=prefix)
        return [(item["Key"], item["Size"], item["ETag"]) for page in pages for item in page.get("Contents", ())]

    return _request(uri, list_pages)


def written_at(uri: str) -> float:
    """Return when an object was written, by the server's clock, in whole seconds since 1970."""
    return _request(uri, lambda client, **where: client.head_object(**where)["LastModified"].timestamp())


def delete(uri: str) -> None:
    """Delete an object. One that is not there is no error."""
    _request(uri, lambda client, **where: client.delete_object(**where))


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise InputError(f"'{uri}' names no bucket; expected s3://bucket/prefix")
    return bucket, key


def _upload_key(client, **where: str) -> str | None:
    """Return what tells the upload that is there from others; None where nothing is there."""
    try:
        return client.head_object(**where)["Metadata"].get(UPLOAD_KEY)
    except boto.ClientError as error:
        if _status(error) == 404:
            return None
        raise


def _read_parts(uri: str, store: Callable[[int, bytes], Any], *, max_bytes: int | None = None) -> None:
    """Call `store(begin, data)` of every part of an object, the first part first, all of one version of it."""
    for _ in range(2):
        first = _read(uri, begin=0)
        if max_bytes is not None and first.total > max_bytes:
            raise InputError(f"{uri} has {first.total} bytes; at most {max_bytes} are read")
        store(0, first.data)

        def copy(begin: int, first: _Part = first) -> bool:
            part = _read(uri, begin=begin)
            store(begin, part.data)
            return (part.etag, part.total) == (first.etag, first.total)

        begins = range(len(first.data), first.total, PART_BYTES)
        if not begins:
            return
        with DaemonThreads(min(PARTS_AT_ONCE, len(begins)), "s3-part") as pool:  # all are waited for: each stores
            if all(pool.map(copy, begins)):
                return
    raise InputError(f"{uri} is being replaced while it is read; start again when nobody writes it")


def _read(uri: str, *, begin: int) -> _Part:
    """Read PART_BYTES of an object from `begin` on (fewer at its end, none beyond it)."""
    give_up = time.monotonic() + SLOWEST_S

    def read(client, **where: str) -> _Part:
        try:
            response = client.get_object(**where, Range=f"bytes={begin}-{begin + PART_BYTES - 1}")
        except boto.ClientError as error:
            if _status(error) == 416:  # an empty object has no first byte
                return _Part(b"", 0, None)
            raise
        size = response["ContentLength"]
        total = int(response["ContentRange"].rpartition("/")[2]) if "ContentRange" in response else size
        with contextlib.closing(response["Body"]) as body:
            chunks = []
            for chunk in body.iter_chunks(CHUNK_BYTES):
                chunks.append(chunk)
                if time.monotonic() > give_up:
                    got = sum(map(len, chunks))
                    raise StorageError(f"{uri}: the store sent {got} of {size} bytes in {SLOWEST_S} s: given up")
        data = b"".join(chunks)
        expected = min(PART_BYTES, total - begin) if "ContentRange" in response else total
        if len(data) != expected:  # less than was asked for, honestly declared: a hole in the file
            raise boto.IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
        return _Part(data, total, response.get("ETag"))

    return _request(uri, read)


def _request(uri: str, call: Callable[..., Any], *, boto_attempts: int = 1) -> Any:
    """Return `call(client, Bucket=, Key=)`, tried again as the module says; raise what is wrong in our words.

    Where boto3 itself tries again (`boto_attempts`), the 3 minutes begin when it first gave up: a large file takes
    its time.
    """
    bucket, key = split(uri)
    began, tries, refused = None if boto_attempts > 1 else time.monotonic(), 0, False
    most = _max_attempts()
    while True:
        client = _client(uri, boto_attempts)
        try:
            result = call(client, Bucket=bucket, Key=key)
            _answered.add(client.meta.endpoint_url)
            return result
        except (boto.BotoCoreError, boto.ClientError, S3UploadFailedError, *TRANSIENT) as raised:
            error = (isinstance(raised, S3UploadFailedError) and raised.__context__) or raised
        if isinstance(error, boto.ClientError):
            _answered.add(client.meta.endpoint_url)
        if _is_refused(error) and not refused:
            refused = True
            _forget(client)
            continue
        tries += 1
        began = time.monotonic() if began is None else began
        wait = min(FIRST_WAIT_S * 2 ** min(tries - 1, 10), LONGEST_WAIT_S) * random.uniform(0.75, 1)
        waited = time.monotonic() - began
        is_unheard = isinstance(error, UNREACHABLE) and client.meta.endpoint_url not in _answered
        is_last = tries >= (min(UNHEARD_ATTEMPTS, most) if is_unheard else most)
        if not _is_transient(error) or is_last or waited + wait > LAST_TRY_S:
            effort = f"{tries} {'try' if tries == 1 else 'tries'} in {waited:.0f} s"
            raise _in_words(uri, error, client.meta.endpoint_url, effort) from error
        time.sleep(wait)


def _is_refused(error: BaseException) -> bool:
    return isinstance(error, boto.ClientError) and (_status(error) in (401, 403) or _code(error) in REFUSALS)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, boto.ClientError):
        return (_status(error) or 0) >= 500 or _status(error) == 429 or _code(error) in AGAIN
    return isinstance(error, TRANSIENT)


def _status(error: boto.ClientError) -> int | None:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _code(error: boto.ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _in_words(uri: str, error: BaseException, endpoint: str, effort: str) -> Exception:
    if isinstance(error, NO_CREDENTIALS):
        return InputError(
            f"{uri}: no S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a "
            "profile or role that boto3 finds"
        )
    if isinstance(error, (*UNREACHABLE, boto.ConnectionClosedError, boto.SSLError)) and endpoint not in _answered:
        return InputError(
            f"{uri}: no S3 server answers at {endpoint} ({error}); check AWS_ENDPOINT_URL and the network"
        )
    if isinstance(error, boto.ClientError):
        if _code(error) in ("404", "NoSuchKey"):
            return FileNotFoundError(f"{uri} does not exist")
        if _code(error) == "NoSuchBucket":
            return InputError(
                f"{uri}: bucket '{split(uri)[0]}' does not exist at {endpoint}; create it or correct the name"
            )
        if _is_refused(error):
            return InputError(
                f"{uri}: the S3 server at {endpoint} refuses these credentials ({error}); check "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what the key may do"
            )
    if isinstance(error, boto.ParamValidationError):
        return InputError(f"{uri}: {error}; expected s3://bucket/prefix")
    text = "no byte came in time" if isinstance(error, boto.ReadTimeoutError) else str(error)
    return StorageError(f"{uri}: {text.replace(' (reached max retries: 0)', '')} ({effort} of {endpoint})")


def _client(uri: str, boto_attempts: int) -> Any:
    """Return this process's client: boto3's own chain finds credentials, region and AWS_ENDPOINT_URL."""
    slot = os.getpid(), boto_attempts
    with _lock:
        if slot not in _clients:
            read_timeout = _number("MTL_S3_TIMEOUT_S", READ_TIMEOUT_S)
            config = BotoConfig(
                connect_timeout=min(CONNECT_TIMEOUT_S, read_timeout),
                read_timeout=read_timeout,
                max_pool_connections=32,
                retries={"mode": "standard", "total_max_attempts": boto_attempts},
                # What matters has a sha256 of ours, and some servers send the checksum of the whole with a part.
                response_checksum_validation="when_required",
            )
            try:
                # A session of its own: the default one would keep the credentials that `_forget` is to forget.
                _clients[slot] = boto3.session.Session().client("s3", config=config)
            except NO_CREDENTIALS as error:
                raise _in_words(uri, error, "", "") from None
            except (boto.BotoCoreError, ValueError) as error:
                raise InputError(f"{uri}: no S3 client can be made: {error}; correct the AWS_ variables") from None
        return _clients[slot]


def _forget(client: Any) -> None:
    """Make the next request of this process ask the chain for credentials; the others finish with what they have."""
    with _lock:
        for slot in [slot for slot, known in _clients.items() if known is client]:
            del _clients[slot]


def _max_attempts() -> float:
    return max(1, int(_number("AWS_MAX_ATTEMPTS", 10**6)))


def _number(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise InputError(f"the environment's {name} is '{text}'; expected a number above 0")
    return value
