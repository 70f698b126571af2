"""Read the annotation text of s-Aff-Wild2: a header of 5 names, then 16 comma-separated values a row.

`video/00001.jpg,<valence>,<arousal>,<expression>,<12 action units>`; -5 is a missing valence or arousal, -1 a missing
expression or action unit. A row's number is its position below the header, from 0: it is the sample's key, because
one image can have several rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from mtl_dist import storage
from mtl_dist.data.names import MAX_NAME_BYTES, find_bad_name, plain_names, why_no_name
from mtl_dist.errors import InputError
from mtl_dist.tasks import AUS, EXPRESSIONS, MISSING_AU, MISSING_EXPR, MISSING_VA, NUM_AUS

HEADER = "image,valence,arousal,expression,aus"
FILES = {"train": "training_set_annotations.txt", "val": "validation_set_annotations.txt"}


class Annotations(NamedTuple):
    """The rows of one annotation file or table; label entries are 0 where their mask is False."""

    row: np.ndarray  # (N,) int64 row number: the place below the header, from 0
    images: list[str]  # (N) "video/frame.jpg"; of a table a relative path of any depth
    va: np.ndarray  # (N, 2) float32
    expr: np.ndarray  # (N,) uint8
    au: np.ndarray  # (N, 12) uint8
    va_mask: np.ndarray  # (N,) bool
    expr_mask: np.ndarray  # (N,) bool
    au_mask: np.ndarray  # (N, 12) bool
    sha256: (
        str  # of the file's bytes; where a part of it was chosen (a table, a split, skipped rows) of these choices too
    )
    videos: list[str] | None = None  # (N) where the source names them; None: an image's directory is its video

    def take(self, places: np.ndarray) -> Annotations:
        """Return the rows at `places`, in that order."""
        arrays = {key: value[places] for key, value in self._asdict().items() if isinstance(value, np.ndarray)}
        videos = self.videos and [self.videos[place] for place in places]
        return self._replace(images=[self.images[place] for place in places], videos=videos, **arrays)


def read_annotations(path: Path) -> Annotations:
    """Parse an annotation file. Raises `InputError` naming file, line, value and what was expected."""
    try:
        data = storage.read_bytes(str(path))
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"annotations {path} cannot be read: {error.strerror}; expected an s-Aff-Wild2 file") from None
    except UnicodeDecodeError:
        raise InputError(f"annotations {path} are not UTF-8 text; expected an s-Aff-Wild2 file") from None
    header, _, body = text.partition("\n")
    if header.strip() != HEADER:
        raise InputError(f"{path}:1: header is '{header.strip()[:MAX_NAME_BYTES]}'; expected '{HEADER}'")
    body = body.rstrip()
    if not body:
        raise InputError(f"{path} holds a header and no rows; expected one row a frame")

    columns = _read_columns(body.encode(), path)
    images, va = columns.parse_images(), columns.parse_va()
    classes = range(len(EXPRESSIONS))
    expr = columns.parse_numbers("expression", lambda number: number in classes, f"0 to {classes[-1]}", MISSING_EXPR)
    au = np.column_stack(
        [columns.parse_numbers(f"AU{au}", lambda number: number in (0, 1), "0, 1", MISSING_AU) for au in AUS]
    )
    va_mask, expr_mask, au_mask = va[:, 0] != MISSING_VA, expr != MISSING_EXPR, au != MISSING_AU
    return Annotations(
        row=np.arange(len(images)),
        images=images,
        va=np.where(va_mask[:, None], va, 0).astype(np.float32),
        expr=np.where(expr_mask, expr, 0).astype(np.uint8),
        au=np.where(au_mask, au, 0).astype(np.uint8),
        va_mask=va_mask,
        expr_mask=expr_mask,
        au_mask=au_mask,
        sha256=hashlib.sha256(data).hexdigest(),
    )


class _Columns(NamedTuple):
    """The columns of an annotation file as text; numbers by their distinct texts, of which there are few."""

    path: Path
    texts: dict[str, pa.Array]  # (N,) each

    def parse_images(self) -> list[str]:
        names = plain_names(pc.utf8_trim_whitespace(self.texts["image"]))
        if (place := find_bad_name(names, num_parts=2)) is not None:
            image = names[place].as_py()
            why = why_no_name(image)
            raise self.fault(place, f"image is {image!r}; expected 'video/frame.jpg'{why and f' ({why})'}")
        return names.to_pylist()

    def parse_va(self) -> np.ndarray:
        """Return (N, 2) float64."""
        names = ("valence", "arousal")
        va = np.column_stack(
            [self.parse_numbers(name, lambda number: -1 <= number <= 1, "-1 to 1", MISSING_VA) for name in names]
        )
        is_missing = va == MISSING_VA
        if (is_one := is_missing[:, 0] != is_missing[:, 1]).any():
            place = int(np.argmax(is_one))
            valence, arousal = va[place]
            both = f"both or neither to be missing ({MISSING_VA:g})"
            raise self.fault(place, f"valence is {valence} and arousal {arousal}; expected {both}")
        return va

    def parse_numbers(self, name: str, is_known: Callable[[float], bool], expected: str, missing: float) -> np.ndarray:
        """Return (N,) float64 of what is known or missing."""
        coded, numbers = self.texts[name], []
        for code, text in enumerate(coded.dictionary.to_pylist()):
            wrong = ""
            try:
                numbers.append(float(text))
                if numbers[-1] != missing and not is_known(numbers[-1]):
                    wrong = f"{name} is {text.strip()}; expected {expected}, or {missing:g} where it is missing"
            except ValueError:
                wrong = f"'{text.strip()}' is not a number"
            if wrong:
                raise self.fault(pc.index(coded.indices, code).as_py(), wrong)
        return np.array(numbers)[coded.indices.to_numpy()]

    def fault(self, place: int, what: str) -> InputError:
        return InputError(f"{self.path}:{place + 2}: {what}")


def _read_columns(body: bytes, path: Path) -> _Columns:
    names = ["image", "valence", "arousal", "expression", *(f"AU{number}" for number in AUS)]
    types = dict.fromkeys(names, pa.dictionary(pa.int32(), pa.string())) | {"image": pa.large_string()}
    try:
        table = csv.read_csv(
            pa.BufferReader(body),
            read_options=csv.ReadOptions(column_names=names),
            parse_options=csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(column_types=types),
        )
    except pa.ArrowInvalid as error:
        _check_widths(body, path, len(names))
        raise InputError(f"annotations {path} cannot be read: {error}; expected an s-Aff-Wild2 file") from None
    if pc.any(pc.equal(table["image"], "")).as_py():  # of an empty line, which Arrow fills up
        _check_widths(body, path, len(names))
    columns = table.unify_dictionaries().combine_chunks()
    return _Columns(path, {name: columns[name].chunk(0) for name in names})


def _check_widths(body: bytes, path: Path, expected: int) -> None:
    for number, line in enumerate(body.splitlines(), start=2):
        if (num_values := line.count(b",") + 1) != expected:
            raise InputError(
                f"{path}:{number}: {num_values} values; expected {expected}: image, valence, arousal, expression and "
                f"{NUM_AUS} action units"
            )
