"""Pictures that are in train and in val: a score would count what was learnt by heart.

`create` sees names before it writes, and what it has written. Training sees the two sets' sidecars: pictures of the
same bytes have the same length and CRC-32, whatever they are called and wherever they come from.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load

from mtl_dist import storage
from mtl_dist.data.index import Sets, ShardEntry, index_dir, repair_hint
from mtl_dist.errors import InputError

MAX_LISTED = 5  # names in one message
MAX_READ_BYTES = 64 << 20  # of a set's sidecars: 700,000 rows; behind s3:// some seconds
READ_THREADS = 16
NEARLY_ALL = 0.9  # of the validation pictures: no chance repeats of a black frame, but one set given twice


class Shared(NamedTuple):
    """How many validation pictures are training pictures too, byte for byte."""

    count: int
    of: int  # validation pictures looked at
    looked_at: float  # share of the training pictures that were compared with; the first shards are a random sample

    @property
    def share(self) -> float:
        """Estimated share of the validation pictures that are in the whole training set."""
        return self.count / (self.of * self.looked_at) if self.count else 0.0

    def note(self) -> str:
        """Say it in a line; empty where there is none."""
        if not self.count:
            return ""
        least = "at least " if self.looked_at < 1 else ""
        return (
            f"{least}{self.count:,} of {self.of:,} validation pictures are training pictures too, byte for byte: what "
            "is learnt by heart counts in the score"
        )


def find_shared(train: Sets, val: Sets, *, max_bytes: int = MAX_READ_BYTES) -> Shared:
    """Count validation pictures that are in the training set too, from at most `max_bytes` of the sidecars of each.

    Raises `InputError` for a sidecar that is gone or damaged.
    """
    seen, keys = (
        np.concatenate([_read_keys(own, max_bytes // len(sets.uris)) for own in sets.each()]) for sets in (train, val)
    )
    return Shared(int(np.isin(keys, seen).sum()), len(keys), len(seen) / train.rows)


def check_shared(shared: Shared, train: Sets, val: Sets) -> None:
    """Raise an `InputError` where the validation set is, nearly or wholly, made of training pictures."""
    if shared.share >= NEARLY_ALL:
        raise InputError(
            f"{val} has the pictures of {train}: {shared.note()}; expected other pictures, best of other "
            "people; make the sets again, from lists that are apart or with --val-fraction"
        )


def names_in_both(train: pa.Array, val: pa.Array) -> list[str]:
    """Return the names that both have, each once, in their order in `val`."""
    names = val.unique()
    return names.filter(pc.is_in(names, value_set=train.unique())).drop_null().to_pylist()


def listed(names: list[str]) -> str:
    """Join names for a message. After the first `MAX_LISTED` only their number is told."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _read_keys(sets: Sets, max_bytes: int) -> np.ndarray:
    """Return a number for the bytes of every picture, (n,) uint64, of the first shards.

    Sets that stand side by side are of the same pictures: the first is read.
    """
    (uri, index), *_ = sets.pairs()
    entries, read = [], 0
    for entry in index.shards:
        read += entry.sidecar_bytes
        if entries and read > max_bytes:
            break
        entries.append(entry)
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sidecar") as pool:
        keys = np.concatenate(list(pool.map(lambda entry: _read_shard_keys(index_dir(uri), entry), entries)))
    return keys[sets.part.kept[0].rows[: len(keys)]] if sets.part else keys


def _read_shard_keys(uri: str, entry: ShardEntry) -> np.ndarray:
    where = storage.join(uri, f"{entry.name}.safetensors")
    try:
        data = storage.read_bytes(where, max_bytes=entry.sidecar_bytes)
    except FileNotFoundError:
        raise InputError(f"{where} is gone, but the index lists it; {repair_hint(uri)}") from None
    if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
        raise InputError(f"{where}: its bytes do not match their checksum; {repair_hint(uri)}")
    arrays = load(data)
    return arrays["length"].astype(np.uint64) << np.uint64(32) | arrays["crc32"].astype(np.uint64)
