"""Who makes a shard set at a place: two sets made there at once would be mixed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator

import numpy as np

from mtl_dist import storage
from mtl_dist.errors import InputError

CLAIM_PREFIX = ".being-made-"  # of an object beside the shards while they are made; then what they are made of


@contextlib.contextmanager
def claimed(dest: str, fingerprint: dict, sizes: np.ndarray) -> Iterator[None]:
    """Keep others from making another set at `dest` meanwhile; raise an `InputError` where one is being made.

    Each claims first and looks then, so that of two at once one at least sees the other. The same set may be made
    twice at once: its bytes are the same.
    """
    made_of = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode() + sizes.tobytes()).hexdigest()[:16]
    own = f"{CLAIM_PREFIX}{made_of}"
    who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
    storage.write_bytes(storage.join(dest, own), who.encode())
    try:
        for name in dict(storage.list_objects(dest)):
            if name.startswith(CLAIM_PREFIX) and name != own:
                claim = storage.join(dest, name)
                raise InputError(
                    f"another set is being made at {dest}, as {claim} says; choose another destination, wait for its "
                    "end, or delete that file if what made it is gone"
                )
        yield
    finally:
        storage.delete(storage.join(dest, own))
