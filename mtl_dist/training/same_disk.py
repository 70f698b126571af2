"""Whether a local path is the same disk on every host of a cluster: found out, since no path tells."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

from mtl_dist import storage
from mtl_dist.errors import InputError


@contextlib.contextmanager
def seen_by_all(note: str) -> Iterator[None]:
    """Leave a file on a local disk that every rank must see: a path of each host's own would be as many runs."""
    sign = _sign_of(note)
    if sign:
        storage.write_bytes(sign, json.dumps({"host": socket.gethostname()}).encode())
    try:
        yield
    finally:
        if sign:
            storage.delete(sign)


def _sign_of(note: str) -> str | None:
    where, _, name = note.rpartition("/")
    return None if storage.is_s3(note) else storage.join(where, name.replace("failed-", "driver-"))


def check_seen(note: str) -> None:
    """Raise an `InputError` on a host that does not see that file."""
    sign = _sign_of(note)
    if sign and not storage.exists(sign):
        raise InputError(
            f"host {socket.gethostname()} does not see {note.rpartition('/')[0]} of the host that started the run: "
            "--run.storage is a local path that is not the same disk on every host; give s3://bucket/prefix, or a "
            "directory that all of them mount"
        )
