"""index.json of a shard set: what is in it, in which order, with checksums. Written last; read and checked first."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from mtl_dist import storage
from mtl_dist.errors import Damaged, InputError
from mtl_dist.parsing import parse_json
from mtl_dist.settings import explain_validation
from mtl_dist.tasks import AUS, EXPRESSIONS, LabelCounts

FORMAT = "mtl_dist-shards-1"
INDEX_NAME = "index.json"
# Bounds of what a reader takes: a foreign index must not make it ask for more than a machine has.
MAX_INDEX_BYTES = 32 << 20  # about 90,000 shards; parsed it takes some 20 times that
MAX_ROWS = 10**9
MAX_TAR_BYTES = 1 << 40
MAX_SIDECAR_BYTES = 512 << 20
MAX_MESSAGE = 1000  # characters; an index can have a fault a shard
LEAST_TAR_BYTES = 2048  # of a row: two headers, two blocks


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Strict):
    """One tar and its sidecar."""

    name: str = Field(pattern=r"^shard-[0-9]{6}$")  # <name>.tar and <name>.safetensors
    rows: int = Field(gt=0, le=MAX_ROWS)
    tar_bytes: int = Field(gt=0, le=MAX_TAR_BYTES)
    tar_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    sidecar_bytes: int = Field(gt=0, le=MAX_SIDECAR_BYTES)
    sidecar_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Index(_Strict):
    """A shard set. `shards` in order; the global number of a sample is its place in their concatenation."""

    format: str
    view: str
    split: str
    rows: int = Field(gt=0)
    frames_per_shard: int | None  # the limits that shards were cut at
    shard_bytes: int | None
    seed: int  # of the shuffle at writing
    source_sha256: str  # of the annotation file or table, and of what was chosen of it
    expressions: list[str]
    aus: list[int]
    labels: LabelCounts
    shards: list[ShardEntry]

    @property
    def shard_rows(self) -> np.ndarray:
        """(S,) int64 rows of every shard."""
        return np.array([shard.rows for shard in self.shards], np.int64)

    @property
    def sha256(self) -> str:
        """Identity of the set's content: checkpoints carry it. It is of what index.json holds, as it was read.

        A field that a later version adds, with a default, changes the identity of no set that was made before.
        """
        return hashlib.sha256(_canonical(self.model_dump(exclude_unset=True))).hexdigest()


def dump_index(index: Index) -> bytes:
    """Serialise with a checksum of itself, so that a flipped bit is found on reading."""
    return json.dumps({**index.model_dump(exclude_unset=True), "sha256": index.sha256}, indent=1).encode() + b"\n"


def read_index(uri: str) -> Index:
    """Read and check `uri`/index.json (`uri` may name the file itself). Raises `InputError` that says what is wrong."""
    uri = index_dir(uri)
    where = storage.join(uri, INDEX_NAME)
    try:
        raw = parse_json(storage.read_bytes(where, max_bytes=MAX_INDEX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"no shard set at '{uri}': {INDEX_NAME} does not exist; make one with `python -m "
            "mtl_dist.shards create`, or correct the address"
        ) from None
    except Damaged as error:
        raise InputError(f"{where} is damaged: {error}; make the set again, or restore it") from None
    claimed = raw.pop("sha256", None) if isinstance(raw, dict) else None
    try:
        index = Index.model_validate(raw)
    except pydantic.ValidationError as error:
        raise InputError(
            f"{where} is not an index of format {FORMAT}: {explain_validation(error)[:MAX_MESSAGE]}"
        ) from None
    if index.format != FORMAT:
        raise InputError(f"{where} has format '{index.format}'; this version reads '{FORMAT}'")
    if index.sha256 != claimed:
        raise InputError(
            f"{where} is damaged: its checksum does not match its content; make the set again, or restore it"
        )
    if index.expressions != list(EXPRESSIONS) or index.aus != list(AUS):
        raise InputError(
            f"{where} has other classes: {index.expressions}, AU {index.aus}; expected {list(EXPRESSIONS)}, "
            f"AU {list(AUS)}"
        )
    if fault := _find_contradiction(index):
        raise InputError(f"{where} contradicts itself: {fault}; make the set again")
    return index


def _find_contradiction(index: Index) -> str | None:
    """Return what cannot be true of any set: readers count on these sums, and losses are weighted by the labels."""
    names, labels, rows = [shard.name for shard in index.shards], index.labels, index.rows
    counts = [labels.va, labels.expr, *labels.au, *labels.expr_classes, *labels.au_positives, labels.unlabelled]
    if sorted(set(names)) != names:
        return "its shards are not in the order of their names, each once"
    if (total := sum(shard.rows for shard in index.shards)) != rows:
        return f"its shards have {total} rows; it says {rows}"
    if small := [shard.name for shard in index.shards if shard.tar_bytes < LEAST_TAR_BYTES * shard.rows]:
        return f"{small[0]}.tar has fewer bytes than its rows need"
    if labels.rows != rows or min(counts) < 0 or max(counts) > rows:
        return f"its labels count {labels.rows} rows and {min(counts)} to {max(counts)} of a kind; expected {rows} rows"
    if sum(labels.expr_classes) != labels.expr or any(on > of for on, of in zip(labels.au_positives, labels.au)):
        return "its labels do not add up"
    return None


@dataclass(frozen=True)
class Sets:
    """One or several shard sets of a view and a split as one: their shards one behind the other."""

    uris: tuple[str, ...]
    indexes: tuple[Index, ...]

    def __str__(self) -> str:
        return " and ".join(self.uris)

    def pairs(self) -> list[tuple[str, Index]]:
        """Return each set's URI with its index."""
        return list(zip(self.uris, self.indexes))

    @property
    def view(self) -> str:
        """The view, which all sets share."""
        return self.indexes[0].view

    @property
    def split(self) -> str:
        """The split, which all sets share."""
        return self.indexes[0].split

    @property
    def rows(self) -> int:
        """Number of rows of all sets."""
        return sum(index.rows for index in self.indexes)

    @property
    def labels(self) -> LabelCounts:
        """Label counts, summed over the sets."""
        return functools.reduce(LabelCounts.plus, (index.labels for index in self.indexes))

    @property
    def shards(self) -> list[ShardEntry]:
        """The shards of all sets, in the order of the sets."""
        return [shard for index in self.indexes for shard in index.shards]

    @property
    def shard_rows(self) -> np.ndarray:
        """(S,) int64 rows of every shard."""
        return np.concatenate([index.shard_rows for index in self.indexes])

    @property
    def sha256(self) -> str:
        """Identity of the content: of one set its own, of several that of all in their order."""
        return _identity([index.sha256 for index in self.indexes])

    @property
    def source_sha256(self) -> str:
        """Identity of what the sets were made of."""
        return _identity([index.source_sha256 for index in self.indexes])


def read_sets(uris: Sequence[str]) -> Sets:
    """Read one or several indexes, as `read_index`. Raises `InputError` unless they are of one view and split."""
    if not uris:
        raise InputError("no shard set is named; expected the directory or s3:// prefix of one at least")
    sets = Sets(tuple(map(index_dir, uris)), tuple(map(read_index, uris)))
    first_uri, first = sets.pairs()[0]
    seen: dict[str, str] = {}
    for uri, index in sets.pairs():
        if (index.view, index.split) != (first.view, first.split):
            raise InputError(
                f"{uri} has view '{index.view}' and split '{index.split}', and {first_uri} '{first.view}' and "
                f"'{first.split}'; sets that are read as one are of one view and split"
            )
        if index.sha256 in seen:
            raise InputError(f"{uri} is the set that {seen[index.sha256]} is, too: every row would be read twice")
        seen[index.sha256] = uri
    return sets


def _identity(of_sets: list[str]) -> str:
    return of_sets[0] if len(of_sets) == 1 else hashlib.sha256(_canonical(of_sets)).hexdigest()


def index_dir(uri: str) -> str:
    """Return the prefix of a set, whether it or its index.json was named."""
    return uri.removesuffix(f"/{INDEX_NAME}").rstrip("/")


def check_pair(train: Sets, val: Sets) -> None:
    """Raise unless these are of the splits train and val, of one view."""
    if train.view != val.view:
        raise InputError(f"data.train has view '{train.view}' and data.val '{val.view}'; expected both of one view")
    for flag, sets, split in (("data.train", train, "train"), ("data.val", val, "val")):
        if sets.split != split:
            raise InputError(f"{flag} is an index of split '{sets.split}'; expected '{split}'")


def check_stored(uri: str, index: Index) -> None:
    """Raise unless every shard of the index is in the store with the size the index says: one listing, no download."""
    sizes = dict(storage.list_objects(index_dir(uri)))
    for shard in index.shards:
        for name, size in ((f"{shard.name}.tar", shard.tar_bytes), (f"{shard.name}.safetensors", shard.sidecar_bytes)):
            what = f"{storage.join(index_dir(uri), name)}"
            if name not in sizes:
                raise InputError(f"{what} is gone, but the index lists it; {repair_hint(uri)}")
            if sizes[name] != size:
                raise InputError(f"{what} has {sizes[name]} bytes; the index says {size}; {repair_hint(uri)}")


def repair_hint(uri: str) -> str:
    """Say how to find the damaged files of a set and write them again."""
    return (
        f"`python -m mtl_dist.shards verify {index_dir(uri)}` lists all that is damaged; delete that, and `python -m "
        "mtl_dist.shards create` with the original arguments writes it again"
    )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
