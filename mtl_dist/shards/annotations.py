"""Read the annotation text of s-Aff-Wild2: a header of 5 names, then 16 comma-separated values a row.

`video/00001.jpg,<valence>,<arousal>,<expression>,<12 action units>`; -5 is a missing valence or arousal, -1 a missing
expression or action unit. A row's number is its position below the header, from 0: it is the sample's key, because
one image can have several rows.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from mtl_dist import storage
from mtl_dist.data.names import MAX_NAME_BYTES, find_bad_name, is_image_name, plain_names, why_no_name
from mtl_dist.errors import InputError
from mtl_dist.tasks import AUS, EXPRESSIONS, MISSING_AU, MISSING_EXPR, MISSING_VA, NUM_AUS

HEADER = "image,valence,arousal,expression,aus"
FILES = {"train": "training_set_annotations.txt", "val": "validation_set_annotations.txt"}
NUM_VALUES = 4 + NUM_AUS


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

    images, values = _parse_columns(body.encode()) or _parse_rows(body, path)
    va_mask, expr_mask, au_mask = values[:, 0] != MISSING_VA, values[:, 2] != MISSING_EXPR, values[:, 3:] != MISSING_AU
    return Annotations(
        row=np.arange(len(images)),
        images=images,
        va=np.where(va_mask[:, None], values[:, :2], 0).astype(np.float32),
        expr=np.where(expr_mask, values[:, 2], 0).astype(np.uint8),
        au=np.where(au_mask, values[:, 3:], 0).astype(np.uint8),
        va_mask=va_mask,
        expr_mask=expr_mask,
        au_mask=au_mask,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _parse_columns(body: bytes) -> tuple[list[str], np.ndarray] | None:
    """Parse all rows at once: names, and (N, 15) values. None where anything is unusual: `_parse_rows` judges it."""
    columns = ["image", *map(str, range(1, NUM_VALUES))]
    types = {name: pa.float64() for name in columns} | {"image": pa.large_string()}
    try:
        table = csv.read_csv(
            pa.BufferReader(body),
            read_options=csv.ReadOptions(column_names=columns),
            parse_options=csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except pa.ArrowInvalid:
        return None
    names = plain_names(pc.utf8_trim_whitespace(table["image"]).combine_chunks())
    values = np.column_stack([table[name].to_numpy() for name in columns[1:]])
    va, expr, au = values[:, :2], values[:, 2], values[:, 3:]
    no_va = va == MISSING_VA
    is_good = (
        (no_va.all(1) | (~no_va.any(1) & (np.abs(va) <= 1).all(1)))
        & np.isin(expr, [MISSING_EXPR, *range(len(EXPRESSIONS))])
        & ((au == 0) | (au == 1) | (au == MISSING_AU)).all(1)
    )
    if not is_good.all() or find_bad_name(names, num_parts=2) is not None:
        return None
    return names.to_pylist(), values


def _parse_rows(body: str, path: Path) -> tuple[list[str], np.ndarray]:
    """The rule, row by row: slower, and it says what is wrong."""
    rows = [_parse_row(line, f"{path}:{number}") for number, line in enumerate(body.splitlines(), start=2)]
    return [image for image, _ in rows], np.array([values for _, values in rows], np.float64)


def _parse_row(line: str, where: str) -> tuple[str, list[float]]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != NUM_VALUES:
        raise InputError(
            f"{where}: {len(fields)} values; expected {NUM_VALUES}: image, valence, arousal, expression "
            f"and {NUM_AUS} action units"
        )
    image = re.sub(r"^(\./)+", "", fields[0])
    if not is_image_name(image, num_parts=2):
        why = why_no_name(image)
        raise InputError(f"{where}: image is {image!r}; expected 'video/frame.jpg'{why and f' ({why})'}")
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        wrong = next(field for field in fields[1:] if not _is_number(field))
        raise InputError(f"{where}: '{wrong}' is not a number") from None
    _check_va(values[0], values[1], where)
    if values[2] != MISSING_EXPR and values[2] not in range(len(EXPRESSIONS)):
        raise InputError(
            f"{where}: expression is {fields[3]}; expected 0 to {len(EXPRESSIONS) - 1}, or {MISSING_EXPR} "
            "where it is missing"
        )
    for number, value, field in zip(AUS, values[3:], fields[4:]):
        if value not in (0, 1, MISSING_AU):
            raise InputError(f"{where}: AU{number} is {field}; expected 0, 1, or {MISSING_AU} where it is missing")
    return image, values


def _check_va(valence: float, arousal: float, where: str) -> None:
    if (valence == MISSING_VA) != (arousal == MISSING_VA):
        raise InputError(
            f"{where}: valence is {valence} and arousal {arousal}; expected both or neither to be missing "
            f"({MISSING_VA:g})"
        )
    for name, value in (("valence", valence), ("arousal", arousal)):
        if value != MISSING_VA and not -1 <= value <= 1:
            raise InputError(f"{where}: {name} is {value:g}; expected -1 to 1, or {MISSING_VA:g} where it is missing")


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
