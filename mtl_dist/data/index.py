"""index.json of a set: what is in it, in which order, with checksums. Written last; read and checked first.

A set holds pictures (`Index`), or what an extractor makes of the pictures of whole videos (`FeatureIndex`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from mtl_dist import storage
from mtl_dist.data.part import Part
from mtl_dist.errors import Damaged, InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.parsing import parse_json
from mtl_dist.settings import explain_validation
from mtl_dist.tasks import AUS, EXPRESSIONS

FORMAT = "mtl_dist-shards-1"
FEATURES = "mtl_dist-features-1"
INDEX_NAME = "index.json"
# Bounds of what a reader takes: a foreign index must not make it ask for more than a machine has.
MAX_INDEX_BYTES = 32 << 20  # about 90,000 shards; parsed it takes some 20 times that
MAX_ROWS = 10**9
MAX_TAR_BYTES = 1 << 40
MAX_SIDECAR_BYTES = 512 << 20
MAX_MESSAGE = 1000  # characters; an index can have a fault a shard
LEAST_TAR_BYTES = 2048  # of a row: two headers, two blocks
MAX_WIDTH = 1 << 16  # numbers of a feature
FEATURE_BYTES = 2  # of a number: float16
NO_SET = "none"  # of a run without a validation set, in the place of that set's checksum


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
    def origin(self) -> str:
        """What the set is one view of: sets of one origin stand side by side, each with numbers of its own of a row."""
        return self.sha256

    @property
    def least_bytes(self) -> int:
        """The fewest bytes that a row has in a tar."""
        return LEAST_TAR_BYTES

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


class FeatureShard(ShardEntry):
    """One tar of the features of whole videos, and its sidecar."""

    videos: list[int] = Field(min_length=1)  # rows of every video, in their order


class Extractor(_Strict):
    """What made features of pictures."""

    name: str = Field(min_length=1, max_length=1000)  # of its backbone, with what tells it from others of that name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of its weights, or of those of all folds
    input_size: int = Field(gt=0)  # pixels a side
    pool: str  # how the cells of a picture become one row
    width: int = Field(gt=0, le=MAX_WIDTH)  # numbers of a row: D
    folds: int = 1  # extractors that were fitted without the videos they describe; 1: one for all

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for numbers to mean the same; the name is for people."""
        return self.model_dump(exclude={"name"})


class FeatureIndex(Index):
    """Features of the pictures of a set, grouped by video. `source_sha256` is that of the pictures' own index."""

    shards: list[FeatureShard]
    extractor: Extractor
    source_index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the set of pictures that they are of
    mean: list[float]  # (D,) of the training rows, in a set for validation too
    std: list[float]  # (D,)

    @property
    def origin(self) -> str:
        return self.source_index_sha256

    @property
    def least_bytes(self) -> int:
        return FEATURE_BYTES * self.extractor.width

    @property
    def video_rows(self) -> np.ndarray:
        """(V,) int64 rows of every video."""
        return np.concatenate([shard.videos for shard in self.shards])


KINDS: dict[str, type[Index]] = {FORMAT: Index, FEATURES: FeatureIndex}
CONTENTS = {FORMAT: "pictures", FEATURES: "features"}


def dump_index(index: Index) -> bytes:
    """Serialise with a checksum of itself, so that a flipped bit is found on reading."""
    return json.dumps({**index.model_dump(exclude_unset=True), "sha256": index.sha256}, indent=1).encode() + b"\n"


def read_index(uri: str, *, formats: Sequence[str] = (FORMAT,)) -> Index:
    """Read and check `uri`/index.json (`uri` may name the file itself): of pictures, or of one of `formats`.

    Raises `InputError` that says what is wrong.
    """
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
    kind = raw.get("format") if isinstance(raw, dict) else None
    try:
        index = KINDS.get(kind if isinstance(kind, str) else "", Index).model_validate(raw)
    except pydantic.ValidationError as error:
        expected = kind if kind in KINDS else FORMAT
        raise InputError(
            f"{where} is not an index of format {expected}: {explain_validation(error)[:MAX_MESSAGE]}"
        ) from None
    if index.format not in KINDS:
        raise InputError(f"{where} has format '{index.format}'; this version reads {', '.join(map(repr, KINDS))}")
    if index.format not in formats:
        given, wanted = CONTENTS[index.format], " or ".join(CONTENTS[name] for name in formats)
        hint = "; python -m mtl_dist.features reads it" if index.format == FEATURES else ""
        raise InputError(f"{index_dir(uri)} is a set of {given}; expected one of {wanted}{hint}")
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
    if small := [shard.name for shard in index.shards if shard.tar_bytes < index.least_bytes * shard.rows]:
        return f"{small[0]}.tar has fewer bytes than its rows need"
    if labels.rows != rows or min(counts) < 0 or max(counts) > rows:
        return f"its labels count {labels.rows} rows and {min(counts)} to {max(counts)} of a kind; expected {rows} rows"
    if sum(labels.expr_classes) != labels.expr or any(on > of for on, of in zip(labels.au_positives, labels.au)):
        return "its labels do not add up"
    return _find_contradiction_of_features(index) if isinstance(index, FeatureIndex) else None


def _find_contradiction_of_features(index: FeatureIndex) -> str | None:
    for shard in index.shards:
        if min(shard.videos) < 1 or sum(shard.videos) != shard.rows:
            return f"{shard.name} has {shard.rows} rows, and its videos {sum(shard.videos)}"
    if not len(index.mean) == len(index.std) == index.extractor.width:
        return f"it has statistics of {len(index.mean)} numbers a row; its rows have {index.extractor.width}"
    if not np.isfinite([index.mean, index.std]).all() or min(index.std) < 0:
        return "its statistics are not finite"
    return None


@dataclass(frozen=True)
class Sets:
    """One or several shard sets of a view as one, their shards one behind the other; or a part of their rows."""

    uris: tuple[str, ...]
    indexes: tuple[Index, ...]
    part: Part | None = None  # None: all rows

    def __str__(self) -> str:
        uris = " and ".join(self.uris)
        return f"{self.part.name} of {uris}" if self.part else uris

    @property
    def whole(self) -> Sets:
        """The sets with all their rows."""
        return replace(self, part=None)

    def pairs(self) -> list[tuple[str, Index]]:
        """Return each set's URI with its index."""
        return list(zip(self.uris, self.indexes))

    def parts(self) -> list[list[tuple[str, Index]]]:
        """Return the sets by what they are of: features of the same pictures stand side by side, and are one part."""
        parts: dict[str, list[tuple[str, Index]]] = {}
        for uri, index in self.pairs():
            parts.setdefault(index.origin, []).append((uri, index))
        return list(parts.values())

    def each(self) -> list[Sets]:
        """Return what the sets are of, one by one, as sets of their own."""
        kept = [Part(self.part.name, (own,)) for own in self.part.kept] if self.part else [None] * len(self.parts())
        return [Sets(*zip(*pairs), part=own) for pairs, own in zip(self.parts(), kept)]

    @property
    def firsts(self) -> list[Index]:
        """The first index of every part: those whose rows count."""
        return [part[0][1] for part in self.parts()]

    @property
    def view(self) -> str:
        """The view, which all sets share."""
        return self.indexes[0].view

    @property
    def extractors(self) -> list[Extractor]:
        """What made the features of a row, in their order; none: the sets hold pictures."""
        return [index.extractor for _, index in self.parts()[0] if isinstance(index, FeatureIndex)]

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation (D,) of the features of all training rows; None: the sets hold pictures."""
        if not self.extractors:
            return None
        rows = np.array([index.rows for index in self.firsts], np.float64) / self.whole.rows
        means, stds = (
            np.array([np.concatenate([getattr(index, name) for _, index in part]) for part in self.parts()])
            for name in ("mean", "std")
        )
        mean = rows @ means
        std = np.sqrt(np.maximum(rows @ (means**2 + stds**2) - mean**2, 0))
        return mean, np.where((stds == 0).all(0) & (means == means[0]).all(0), 0.0, std)  # constant is exactly that

    @property
    def label_counts(self) -> list[LabelCounts]:
        """Label counts of what each of the sets is of."""
        return [kept.labels for kept in self.part.kept] if self.part else [index.labels for index in self.firsts]

    @property
    def rows(self) -> int:
        """Number of rows of all sets."""
        return self.labels.rows

    @property
    def labels(self) -> LabelCounts:
        """Label counts, summed over the sets."""
        return functools.reduce(LabelCounts.plus, self.label_counts)

    @property
    def video_rows(self) -> np.ndarray:
        """(V,) int64 rows of every video of sets of features."""
        of_sets = [index.video_rows for index in self.firsts]
        if self.part:
            of_sets = [rows[kept.holds(rows)] for rows, kept in zip(of_sets, self.part.kept)]
        return np.concatenate(of_sets)

    @property
    def shards(self) -> list[ShardEntry]:
        """The shards of all sets, in the order of the sets."""
        return [shard for index in self.indexes for shard in index.shards]

    @property
    def sha256(self) -> str:
        """Identity of the content: of one set its own, of several that of all in their order, and of which part."""
        return _identity([index.sha256 for index in self.indexes] + ([self.part.sha256] if self.part else []))

    @property
    def origin(self) -> str:
        """Identity of the pictures: sets of them, and of features of them, have the same."""
        return _identity([index.origin for index in self.firsts] + ([self.part.name] if self.part else []))

    @property
    def source_sha256(self) -> str:
        """Identity of what the sets were made of."""
        return _identity([index.source_sha256 for index in self.firsts])


def read_sets(uris: Sequence[str]) -> Sets:
    """Read one or several indexes, as `read_index`, of pictures or features.

    Raises `InputError` unless they are of one view, and what stands side by side is of the same rows.
    """
    if not uris:
        raise InputError("no shard set is named; expected the directory or s3:// prefix of one at least")
    sets = Sets(tuple(map(index_dir, uris)), tuple(read_index(uri, formats=tuple(KINDS)) for uri in uris))
    first_uri, first = sets.pairs()[0]
    seen: dict[str, str] = {}
    for uri, index in sets.pairs():
        if index.view != first.view:
            raise InputError(
                f"{uri} has view '{index.view}', and {first_uri} '{first.view}'; sets that are read as one are of one "
                "view"
            )
        if index.sha256 in seen:
            raise InputError(f"{uri} is the set that {seen[index.sha256]} is, too: every row would be read twice")
        seen[index.sha256] = uri
    _check_features(sets)
    return sets


def _check_features(sets: Sets) -> None:
    """Raise unless all sets hold pictures, or all of them features of the same extractors of the same rows."""
    if len({index.format for index in sets.indexes}) > 1:
        raise InputError(f"{sets} are sets of pictures and of features; expected all of one kind")
    if not isinstance(sets.indexes[0], FeatureIndex):
        return
    parts = sets.parts()
    for part in parts:
        (uri, first), *others = part
        for other_uri, other in others:
            if other.video_rows.tolist() != first.video_rows.tolist():
                raise InputError(
                    f"{other_uri} and {uri} are of the same pictures, but have other rows: {other.rows} and "
                    f"{first.rows}; make one of them again"
                )
        made_by, as_first = ([index.extractor for _, index in each] for each in (part, parts[0]))
        if [extractor.identity for extractor in made_by] != [extractor.identity for extractor in as_first]:
            raise InputError(
                f"{' and '.join(uri for uri, _ in part)} have features of "
                f"{', '.join(extractor.name for extractor in made_by)}, and "
                f"{' and '.join(uri for uri, _ in parts[0])} of {', '.join(e.name for e in as_first)}; sets of several "
                "sources need the same extractors, in the same order"
            )


def _describe_extractors(extractors: Sequence[Extractor]) -> str:
    made_by = ", ".join(f"{e.name} ({e.pool}, sha256 {e.sha256[:8]})" for e in extractors)
    return f"features of {made_by}" if extractors else "pictures"


def _identity(of_sets: list[str]) -> str:
    return of_sets[0] if len(of_sets) == 1 else hashlib.sha256(_canonical(of_sets)).hexdigest()


def index_dir(uri: str) -> str:
    """Return the prefix of a set, whether it or its index.json was named."""
    return uri.removesuffix(f"/{INDEX_NAME}").rstrip("/")


def check_pair(train: Sets, val: Sets) -> None:
    """Raise unless these are of the splits train and val, of one view and of the same extractors."""
    if train.view != val.view:
        raise InputError(f"data.train has view '{train.view}' and data.val '{val.view}'; expected both of one view")
    for flag, sets, split in (("data.train", train, "train"), ("data.val", val, "val")):
        for uri, index in sets.pairs():
            if index.split != split:
                name = flag if len(sets.uris) == 1 else f"{flag}: {uri}"
                both = "; with data.fold, or without data.val, sets of both are trained on" * (sets is train)
                raise InputError(f"{name} is an index of split '{index.split}'; expected '{split}'{both}")
    mine, theirs = train.extractors, val.extractors
    if [extractor.identity for extractor in mine] != [extractor.identity for extractor in theirs]:
        raise InputError(
            f"data.train has {_describe_extractors(mine)}, and data.val {_describe_extractors(theirs)}; expected the "
            "same of both, in the same order"
        )


def check_stored(uri: str, index: Index) -> None:
    """Raise unless every shard of the index is in the store with the size the index says: one listing, no download."""
    sizes, hint = dict(storage.list_objects(index_dir(uri))), repair_hint(uri, features=index.format == FEATURES)
    for shard in index.shards:
        for name, size in ((f"{shard.name}.tar", shard.tar_bytes), (f"{shard.name}.safetensors", shard.sidecar_bytes)):
            what = f"{storage.join(index_dir(uri), name)}"
            if name not in sizes:
                raise InputError(f"{what} is gone, but the index lists it; {hint}")
            if sizes[name] != size:
                raise InputError(f"{what} has {sizes[name]} bytes; the index says {size}; {hint}")


def repair_hint(uri: str, *, features: bool = False) -> str:
    """Say how to find the damaged files of a set and write them again."""
    command = f"python -m mtl_dist.{'features' if features else 'shards'}"
    return (
        f"`{command} verify {index_dir(uri)}` lists all that is damaged; delete that, and `{command} create` with the "
        "original arguments writes it again"
    )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
