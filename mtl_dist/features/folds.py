"""Folds of videos: which of several extractors, each trained without a fold, describes which video.

`write_folds` deals the videos of a training set and writes, beside the table of folds, a table of rows for every fold:
what `shards create` makes a training set without that fold of.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist import storage
from mtl_dist.data.sidecar import unpack_names
from mtl_dist.data.video_rows import VideoRows
from mtl_dist.errors import InputError
from mtl_dist.shards.folds import deal_folds
from mtl_dist.tasks import AUS, EXPRESSIONS

FOLDS_NAME = "folds.csv"
HEADER = ["video", "fold"]
MAX_LISTED = 5  # videos in one message


def find_folds(rows: VideoRows, num_folds: int, table: Path | None, *, source: str) -> np.ndarray:
    """Return the fold of every video, (v,) int64: of `table`, or as they are dealt. Raises `InputError`."""
    if table is None:
        return deal_folds(rows.owners, rows.num_rows, num_folds, source=source)
    fold_of = _read_folds(table, num_folds)
    if missing := [video for video in rows.videos if video not in fold_of]:
        raise InputError(
            f"{table} names no fold of {len(missing)} video(s) of {source}: {', '.join(missing[:MAX_LISTED])}; "
            "expected every video once"
        )
    return np.array([fold_of[video] for video in rows.videos], np.int64)


def _read_folds(table: Path, num_folds: int) -> dict[str, int]:
    try:
        lines = list(csv.reader(io.StringIO(storage.read_bytes(str(table)).decode("utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--folds-by {table} cannot be read: {error}; expected what `features folds` wrote") from None
    if not lines or lines[0] != HEADER:
        raise InputError(f"--folds-by {table} begins with {','.join(lines[0]) if lines else 'nothing'!r}; expected "
                         f"'{','.join(HEADER)}'")  # fmt: skip
    fold_of: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != 2 or not line[1].isdecimal() or int(line[1]) >= num_folds or line[0] in fold_of:
            raise InputError(
                f"--folds-by {table}, line {number}: '{','.join(line)}'; expected a video, each once, and its fold "
                f"from 0 to {num_folds - 1}"
            )
        fold_of[line[0]] = int(line[1])
    return fold_of


def write_folds(rows: VideoRows, num_folds: int, out: str, *, source: str) -> list[str]:
    """Write <out>/folds.csv, and <out>/fold-<k>.csv for each; return the latter.

    A fold's table has every row with its labels: those of its videos are of split val, all others of train.
    """
    folds = find_folds(rows, num_folds, None, source=source)
    storage.write_bytes(storage.join(out, FOLDS_NAME), _as_csv([HEADER, *zip(rows.videos, folds.tolist())]))
    lines, of_row, written = list(_label_lines(rows)), np.repeat(folds, rows.num_rows), []
    by_row = np.argsort(rows.kept["row"])
    header = ["image", "video", "split", "valence", "arousal", "expression", *(f"AU{number}" for number in AUS)]
    for fold in range(num_folds):
        written.append(storage.join(out, f"fold-{fold}.csv"))
        split = np.where(of_row == fold, "val", "train").tolist()
        table = ([*lines[place][:2], split[place], *lines[place][2:]] for place in by_row.tolist())
        storage.write_bytes(written[-1], _as_csv([header, *table]))
    return written


def _label_lines(rows: VideoRows) -> Iterator[list[Any]]:
    """Yield image, video, and labels of every row, nothing where there is none."""
    kept, videos = rows.kept, np.repeat(np.arange(len(rows.videos)), rows.num_rows)
    # float32 as its shortest decimal: read again it is the same number.
    columns = (unpack_names(kept["image"]), videos, kept["va"], *(kept[name] for name in ("expr", "au")),
               *(kept[f"{task}_mask"] for task in ("va", "expr", "au")))  # fmt: skip
    for image, video, va, expr, au, has_va, has_expr, has_au in zip(*columns):
        yield [
            image,
            rows.videos[video],
            *((str(value) for value in va) if has_va else ("", "")),
            EXPRESSIONS[expr] if has_expr else "",
            *(int(value) if known else "" for value, known in zip(au, has_au)),
        ]


def _as_csv(lines: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
