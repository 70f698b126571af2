"""Labels by frame or by second, and the faces that they are of.

A table has a row a label: `video` and `frame` (from 1), `seconds`, or `start` and `end` (in seconds, before the end);
or `image`, the path of a photograph or of a face's picture. `person` tells which one of several. All other columns are
the labels, which are passed on as they are written: `shards create` reads them.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from mtl_dist import storage
from mtl_dist.errors import InputError, nearest

TEXT = pa.large_string()
PLACES = ("image", "video", "frame", "seconds", "start", "end", "person")
OURS = ("image", "video", "person")  # columns of the table of faces


class Wanted(NamedTuple):
    """A face that may have a label."""

    source: str
    video: str
    image: str
    person: int
    is_alone: bool  # nobody else is in the video, or in the photograph
    frame: int | None
    seconds: float | None


class Annotations:
    """The labels of a table, found by where a face is."""

    def __init__(self, path: Path):
        self.path = path
        self._columns = _read(path)
        self.labels = [name for name in self._columns if name not in PLACES]
        self._check_columns()
        self.count = len(next(iter(self._columns.values())))
        self._used = bytearray(self.count)
        self.num_of_nobody = 0  # faces whose label names no person, among several
        self._rows: dict[str, dict[str | None, list[tuple[float, float, int]]]] = {}
        self._index()

    def find(self, wanted: Wanted, within_s: float | None) -> Sequence[str]:
        """Return the labels of a face, '' where there is none. By seconds: of the row nearest, at most so far away."""
        names = (wanted.image if self.how == "image" else wanted.video, wanted.source, _stem(wanted.source))
        name = next((name for name in names if name in self._rows), None)
        nothing = [""] * len(self.labels)
        if name is None:
            return nothing
        by_person = self._rows[name]
        row = self._find(by_person.get(str(wanted.person), []), wanted, within_s)
        if row is None:
            row = self._find(by_person.get(None, []), wanted, within_s)
            # The picture of a photograph's first person has the name that the photograph may have.
            is_picture = name == wanted.image and (wanted.frame is not None or wanted.person > 1)
            if row is not None and not wanted.is_alone and not is_picture:
                self.num_of_nobody += 1
                return nothing
        if row is None:
            return nothing
        self._used[row] = 1
        return [self._columns[name][row] or "" for name in self.labels]

    @property
    def num_used(self) -> int:
        """The number of rows that a face has."""
        return sum(self._used)

    def check_sources(self, known: Sequence[str]) -> list[str]:
        """Return the names of videos or photographs that are not among the `known`. Raises where that is every one."""
        names = {form for name in known for form in (name, _stem(name))}
        others = sorted(name for name in self._rows if not {name, re.sub(r"(_\d+)?/[^/]*$", "", name)} & names)
        if len(others) == len(self._rows):
            raise InputError(
                f"--annotations {self.path} is of {others[0]!r} and {len(others) - 1} more, none of which is there; "
                f"{nearest(others[0], [_stem(name) for name in known])}"
            )
        return others

    def _find(self, rows: list[tuple[float, float, int]], wanted: Wanted, within_s: float | None) -> int | None:
        if not rows:
            return None
        if self.how == "image":
            return rows[0][2]
        if self.how == "frame":
            place = bisect.bisect_left(rows, (wanted.frame or 0, 0.0, 0))
            return rows[place][2] if place < len(rows) and rows[place][0] == wanted.frame else None
        if wanted.seconds is None:
            return None
        place = bisect.bisect_right(rows, (wanted.seconds, float("inf"), 0))
        if self.how == "start":
            return rows[place - 1][2] if place and wanted.seconds < rows[place - 1][1] else None
        near = min(rows[max(place - 1, 0) : place + 1], key=lambda row: abs(row[0] - wanted.seconds))
        return near[2] if within_s is not None and abs(near[0] - wanted.seconds) <= within_s + 1e-6 else None

    def _check_columns(self) -> None:
        has = set(self._columns)
        ways = [way for way in ("frame", "seconds", "start") if way in has]
        if "image" in has and "video" not in has and not ways:
            self.how = "image"
        elif "video" in has and len(ways) == 1 and ("end" in has) == (ways == ["start"]):
            (self.how,) = ways
        else:
            raise InputError(
                f"--annotations {self.path} has the columns {', '.join(self._columns)}; expected video and one of "
                "frame, seconds, or start and end; or image; and the labels"
            )
        if not self.labels:
            raise InputError(f"--annotations {self.path} has no labels: no column beside {', '.join(self._columns)}")

    def _index(self) -> None:
        key = "image" if self.how == "image" else "video"
        persons = self._columns.get("person", [None] * self.count)
        for row, (name, person) in enumerate(zip(self._columns[key], persons)):
            if not name:
                raise self._fault(row, key, "a name")
            if person is not None:
                person = str(int(self._number(row, "person", least=1, whole=True)))
            begin, end = 0.0, 0.0
            if self.how != "image":
                is_frame = self.how == "frame"
                begin = self._number(row, self.how, least=1 if is_frame else None, whole=is_frame)
            if self.how == "start":
                end = self._number(row, "end", least=begin)
            self._rows.setdefault(name.removeprefix("./"), {}).setdefault(person, []).append((begin, end, row))
        for name, by_person in self._rows.items():
            for rows in by_person.values():
                rows.sort()
                self._check_apart(name, rows)

    def _check_apart(self, name: str, rows: list[tuple[float, float, int]]) -> None:
        for (begin, end, one), (after, _, other) in pairwise(rows):
            if begin == after or after < end:
                place = "" if self.how == "image" else f" at {self.how} {after:g}"
                raise InputError(
                    f"--annotations {self.path} has two rows for {name}{place}: rows {min(one, other)} and "
                    f"{max(one, other)} (from 0); expected one"
                )

    def _number(self, row: int, name: str, *, least: float | None = None, whole: bool = False) -> float:
        text = self._columns[name][row]
        try:
            number = float(text or "")
        except ValueError:
            number = float("nan")
        if abs(number) < 1e12 and (least is None or number >= least) and (not whole or number == int(number)):
            return number
        above = "" if least is None else f" of {least:g} or more"
        raise self._fault(row, name, f"a {'whole ' if whole else ''}number{above}")

    def _fault(self, row: int, name: str, expected: str) -> InputError:
        value = self._columns[name][row]
        what = "empty" if value is None else repr(value)
        return InputError(f"--annotations {self.path}, row {row} (from 0): {name} is {what}; expected {expected}")


def _read(path: Path) -> dict[str, list[str | None]]:
    """Read a table as text, None where there is nothing; names of columns without spaces, the known ones in small."""
    try:
        storage.check_ends(path)
        if path.suffix.lower() == ".parquet":
            table = parquet.read_table(path)
        else:
            names = csv.open_csv(path).schema.names
            options = csv.ConvertOptions(column_types=dict.fromkeys(names, TEXT), strings_can_be_null=False)
            table = csv.read_csv(path, convert_options=options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--annotations {path} cannot be read: {reason}; expected a table with a header") from None
    if not table.num_rows:
        raise InputError(f"--annotations {path} holds no rows; expected one a label")
    columns: dict[str, list[str | None]] = {}
    for name, column in zip(table.column_names, table.columns):
        plain = name.strip().lower() if name.strip().lower() in PLACES else name.strip()
        if plain in columns:
            raise InputError(f"--annotations {path} has several columns '{plain}'; expected each name once")
        try:
            text = pc.utf8_trim_whitespace(pc.cast(column, TEXT))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(
                f"--annotations {path}: column '{name}' is of {column.type}; expected text or numbers"
            ) from None
        columns[plain] = [value or None for value in text.to_pylist()]
    return columns


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if "." in name.rpartition("/")[2] else name


def row_of(row: dict[str, Any], is_alone: bool) -> Wanted:
    """Return what is looked for by a row of frames.parquet."""
    return Wanted(row["source"], row["video"], row["image"], row["person"], is_alone, row["frame"], row["seconds"])
