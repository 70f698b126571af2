"""Read a CSV or Parquet table of labelled images, column by column: 3 million rows take seconds.

A row's number is its place in the table, from 0. What the columns mean is in `columns.py`.
"""

from __future__ import annotations

import csv as python_csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from mtl_dist import storage
from mtl_dist.data.names import MAX_NAME_BYTES, find_bad_name, plain_names, why_no_name
from mtl_dist.errors import InputError
from mtl_dist.shards.annotations import Annotations
from mtl_dist.shards.columns import FORMATS, ExpressionCodes, FoundColumns, TableOptions, describe_columns, find_columns
from mtl_dist.shards.splits import video_of
from mtl_dist.tasks import AUS, MISSING_AU, MISSING_EXPR, PERSON

SUFFIXES = (".csv", ".parquet")
MISSING_TEXT = ("", "nan", "NaN", "NA", "N/A", "null", "NULL")
SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1}
MAX_HEADER_CHARS = 1 << 20
MAX_LINE_CHARS = 200  # of a table's first line in one message
TEXT = pa.large_string()  # a column may hold more than 2 GiB


class Table(NamedTuple):
    """The rows of a table that are of train or val."""

    annotations: Annotations
    columns: FoundColumns
    is_val: np.ndarray | None  # (N,) bool; None where the table has no column of splits
    videos: pa.Array  # (N,) names: of the column, else the image's directory
    persons: pa.Array | None  # (N,) names, null where unknown
    left_out: dict[str, int]  # rows of other splits, by why
    unlabelled: dict[str, int]  # rows whose expression is there and is no label, by why
    about_columns: str  # which are read, and which are not


def read_table(path: Path, options: TableOptions) -> Table:
    """Read and check a table. Raises `InputError` naming file, row, value and what was expected."""
    header = _read_header(path, options)
    columns = find_columns(options, list(header.written), path)
    codes = ExpressionCodes(options)
    texts = _read_texts(path, header, columns.names())
    row = np.arange(len(texts[columns.image]))
    if not len(row):
        raise InputError(f"{path} holds a header and no rows; expected one row an image")
    texts[columns.image] = plain_names(texts[columns.image])
    is_val, left_out = None, {}
    if columns.split:
        is_used, is_val, left_out = _parse_splits(texts[columns.split])
        row, is_val = row[is_used], is_val[is_used]
        texts = {name: text.filter(pa.array(is_used)) for name, text in texts.items()}
    reader = _Reader(path, row, texts, columns.image, not header.layout)
    images = texts[columns.image]
    reader.check_images(columns.image)
    va, va_mask = reader.parse_va(columns, FORMATS[options.table_format].missing_va)
    expr, unlabelled = reader.parse_expressions(columns.expression, codes)
    au = np.column_stack([reader.parse_au(columns.aus.get(number), number) for number in AUS])
    videos, named = video_of(images), None
    if columns.video:
        reader.check_videos(columns.video)
        videos = pc.coalesce(texts[columns.video], videos)
        named = [video or image for video, image in zip(videos.to_pylist(), images.to_pylist())]
    annotations = Annotations(
        row=row,
        images=images.to_pylist(),
        va=va.astype(np.float32),
        expr=np.maximum(expr, 0).astype(np.uint8),
        au=np.maximum(au, 0).astype(np.uint8),
        va_mask=va_mask,
        expr_mask=expr != MISSING_EXPR,
        au_mask=au != MISSING_AU,
        sha256=_fingerprint(path, options, columns),
        videos=named,
    )
    persons = texts[columns.person] if columns.person else None
    if persons is not None and not columns.video:
        reader.check_videos(columns.person, room=MAX_NAME_BYTES - len(PERSON))
        annotations = annotations._replace(videos=_name_by_person(annotations.images, persons))
    about_columns = describe_columns(columns, options, list(header.written))
    return Table(annotations, columns, is_val, videos, persons, left_out, unlabelled, about_columns)


def _name_by_person(images: list[str], persons: pa.Array) -> list[str] | None:
    """Name what images belong together: their directory, or the person where that is no video; None: always that.

    A directory with pictures of several persons, or none at all, is no video: a picture of nobody known stands alone.
    """
    directories, people = video_of(pa.array(images, pa.large_string())).to_pylist(), persons.to_pylist()
    seen: dict[str, set[str]] = {}
    for directory, person in zip(directories, people):
        if person:
            seen.setdefault(directory, set()).add(person)
    is_video = [bool(directory) and len(seen.get(directory, ())) < 2 for directory in directories]
    if all(is_there or not person for is_there, person in zip(is_video, people)):
        return None
    return [
        directory if is_there else f"{PERSON}{person}" if person else image
        for image, directory, person, is_there in zip(images, directories, people, is_video)
    ]


class _Reader(NamedTuple):
    """The columns that are read, as trimmed text with nulls, and the row numbers of what is left of them."""

    path: Path
    row: np.ndarray  # (N,) int64
    texts: dict[str, pa.Array]  # (N,) each
    image: str  # the column of these that names the picture
    has_header: bool

    def check_images(self, name: str) -> None:
        images = self.texts[name]
        place = pc.index(pc.is_null(images), True).as_py() if images.null_count else find_bad_name(images)
        if place not in (None, -1):
            why = why_no_name(images[place].as_py() or "")
            expected = f"a relative path with '/', no '..', printable, at most {MAX_NAME_BYTES} bytes"
            raise self.fault(place, name, expected + (why and f" ({why})"))

    def check_videos(self, name: str, room: int = MAX_NAME_BYTES) -> None:
        for place, video in enumerate(self.texts[name].to_pylist()):
            if video and not (video.isprintable() and len(video.encode()) <= room):
                raise self.fault(place, name, f"printable text of at most {room} bytes")

    def parse_va(self, columns: FoundColumns, missing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return (N, 2) float64, 0 where missing, and (N,) bool."""
        if columns.valence is None:
            return np.zeros((len(self.row), 2)), np.zeros(len(self.row), bool)
        names = (columns.valence, columns.arousal)
        va = np.column_stack([self.parse_numbers(name) for name in names])
        is_missing = np.isnan(va)
        for code in missing:  # AffectNet's is "about -2" in some releases
            is_missing |= np.abs(va - code) < 1e-2
        code = f"{missing[0]:g} or nothing where it is missing"
        for name, bad in zip(names, (~is_missing & ~(np.abs(va) <= 1)).T):
            if bad.any():
                raise self.fault(int(np.argmax(bad)), name, f"-1 to 1, or {code}")
        one_only = is_missing[:, 0] != is_missing[:, 1]
        if one_only.any():
            place = int(np.argmax(one_only))
            has = names[int(is_missing[place, 0])]
            raise self.fault(place, has, f"both or neither of '{names[0]}' and '{names[1]}'")
        return np.where(is_missing, 0, va), ~is_missing[:, 0]

    def parse_numbers(self, name: str) -> np.ndarray:
        """Return (N,) float64, NaN where there is nothing."""
        try:
            return pc.cast(self.texts[name], pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            return self.parse_values(name, float, missing=np.nan, expected="a number")

    def parse_expressions(self, name: str | None, codes: ExpressionCodes) -> tuple[np.ndarray, dict[str, int]]:
        """Return (N,) classes, -1 where there is none, and how many values are no label by why."""
        if name is None:
            return np.full(len(self.row), MISSING_EXPR), {}
        expr = self.parse_values(name, lambda text: codes.parse(text)[0], missing=MISSING_EXPR)
        unlabelled: dict[str, int] = {}
        for entry in pc.value_counts(self.texts[name].drop_null()).to_pylist():
            why = codes.parse(entry["values"])[1]
            if why:
                unlabelled[why] = unlabelled.get(why, 0) + entry["counts"]
        return expr, unlabelled

    def parse_au(self, name: str | None, number: int) -> np.ndarray:
        """Return (N,) of 0, 1, or -1 where it is missing."""
        if name is None:
            return np.full(len(self.row), MISSING_AU)
        expected = f"0, 1, or {MISSING_AU} or nothing where AU{number} is missing"
        return self.parse_values(name, _parse_au, missing=MISSING_AU, expected=expected)

    def parse_values(self, name: str, parse: Callable, *, missing: float, expected: str | None = None) -> np.ndarray:
        """Apply `parse` to every distinct value; nulls are `missing`. A value it raises ValueError for is named."""
        coded = self.texts[name].dictionary_encode()
        values = []
        for value in coded.dictionary.to_pylist():
            try:
                values.append(parse(value))
            except ValueError as error:
                place = pc.index(self.texts[name], pa.scalar(value, TEXT)).as_py()
                raise self.fault(place, name, expected or str(error)) from None
        return np.array([*values, missing])[
            pc.fill_null(coded.indices, len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
        ]

    def fault(self, place: int, name: str, expected: str) -> InputError:
        value = self.texts[name][place].as_py()
        what = "empty" if value is None else repr(value)
        row = int(self.row[place])
        image = "" if name == self.image else f" (of {self.texts[self.image][place].as_py()!r})"
        place_in = f"{self.path}, row {row} (from 0){self._line(row)}"
        return InputError(f"{place_in}: {name} is {what}{image}; expected {expected}")

    def _line(self, row: int) -> str:
        """Say in which line of a CSV a row begins: empty lines and line breaks in cells count."""
        if self.path.suffix.lower() != ".csv":
            return ""
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader, end, record = python_csv.reader(file), 0, -1 if self.has_header else 0
            for cells in reader:
                if cells and record == row:
                    return f", line {end + 1}"
                record += bool(cells)
                end = reader.line_num
        return ""


class _Header(NamedTuple):
    written: dict[str, str]  # column names without spaces around them, and as they are written
    layout: tuple[str, ...]  # the names where no line holds them: the first one is a row; else nothing


def _read_header(path: Path, options: TableOptions) -> _Header:
    try:
        storage.check_ends(path)
        if path.suffix.lower() == ".parquet":
            names = parquet.read_schema(path).names
        else:
            # Not Arrow's: its stream would judge the first rows too, without a row's number.
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = iter(lambda: file.readline(MAX_HEADER_CHARS), "")
                names = next(python_csv.reader(line for line in lines if line.strip()), [])
    except OSError as error:
        raise InputError(f"table {path} cannot be read: {error.strerror or error}; expected a table") from None
    except (pa.ArrowInvalid, python_csv.Error, UnicodeDecodeError) as error:
        raise _not_a_table(path, error) from None
    if not names:
        raise InputError(f"table {path} is empty; expected a header and one row an image")
    layout = FORMATS[options.table_format].layout
    if path.suffix.lower() == ".csv" and layout:
        if FORMATS[options.table_format].is_row(names):
            return _Header({name: name for name in layout}, layout)
        _check_has_names(path, names, options)
    stripped = [name.strip() for name in names]
    twice = sorted({name for name in stripped if stripped.count(name) > 1})
    if twice:
        raise InputError(f"{path} has several columns '{twice[0]}'; expected a header with every name once")
    return _Header(dict(zip(stripped, names)), ())


def _check_has_names(path: Path, names: list[str], options: TableOptions) -> None:
    """Raise unless a first line that is no row holds one name at least that a header would."""
    layout = FORMATS[options.table_format].layout
    if {name.strip() for name in names} & {*layout, *options.columns.model_dump().values()}:
        return
    line = ",".join(names)
    line = line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]} ..."
    raise InputError(
        f"{path} begins with '{line}', {len(names)} cells: neither a header nor a row of {options.table_format}; "
        f"expected the names {','.join(layout)}, or no header and a row of these {len(layout)} with numbers in all but "
        f"{' and '.join(FORMATS[options.table_format].texts)}"
    )


def _read_texts(path: Path, header: _Header, names: list[str]) -> dict[str, pa.Array]:
    """Read columns as text, trimmed, null where there is nothing."""
    written = [header.written[name] for name in names]
    try:
        if path.suffix.lower() == ".parquet":
            table = parquet.read_table(path, columns=written)
        else:
            # One thread: its errors name the row.
            reading = csv.ReadOptions(use_threads=False, column_names=header.layout or None)
            options = csv.ConvertOptions(
                column_types=dict.fromkeys(written, TEXT), include_columns=written, strings_can_be_null=False
            )
            table = csv.read_csv(path, reading, convert_options=options)
        return {name: _trim(table[name_there]) for name, name_there in zip(names, written)}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise _not_a_table(path, error) from None


def _trim(column: pa.ChunkedArray) -> pa.Array:
    column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = pc.utf8_trim_whitespace(pc.cast(column, TEXT))
    return pc.if_else(pc.is_in(text, pa.array(MISSING_TEXT, TEXT)), pa.scalar(None, TEXT), text)


def _not_a_table(path: Path, error: Exception) -> InputError:
    kind = "a Parquet file" if path.suffix.lower() == ".parquet" else "comma-separated UTF-8 text with a header"
    reason = str(error).splitlines()[0].rstrip(".")
    return InputError(f"table {path} cannot be read: {reason}; expected {kind}")


def _parse_splits(texts: pa.Array) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return which rows are of train or val, (N,) bool; which are of val, (N,) bool; counts of the others, by why."""
    coded = texts.dictionary_encode()
    names = [*coded.dictionary.to_pylist(), None]
    index = pc.fill_null(coded.indices, len(names) - 1).to_numpy(zero_copy_only=False)
    code = np.array([-1 if name is None else SPLIT_NAMES.get(name.casefold(), -1) for name in names])
    counts = np.bincount(index, minlength=len(names))
    left_out = {
        "no split" if name is None else f"split '{name}'": int(count)
        for name, count, is_other in zip(names, counts, code < 0)
        if is_other and count
    }
    return code[index] >= 0, code[index] == 1, left_out


def _parse_au(text: str) -> int:
    number = {"true": 1.0, "false": 0.0}.get(text.casefold())  # boolean columns
    number = float(text) if number is None else number
    if number not in (0, 1, MISSING_AU):
        raise ValueError
    return int(number)


def _fingerprint(path: Path, options: TableOptions, columns: FoundColumns) -> str:
    """Identify what labels a table gives: its bytes, and all that decides how they are read."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    chosen = {
        "table": sha256,
        "format": options.table_format,
        "columns": columns._asdict(),
        "expressions": sorted(options.expressions),
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
