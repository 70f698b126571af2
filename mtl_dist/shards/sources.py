"""Read what `create` makes shards of: a directory in the s-Aff-Wild2 layout, or a table; its parts train and val."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtl_dist import storage
from mtl_dist.data.names import find_bad_name
from mtl_dist.errors import InputError
from mtl_dist.shards.annotations import FILES, Annotations, read_annotations
from mtl_dist.shards.columns import NO_OPTIONS, TableOptions
from mtl_dist.shards.overlap import listed, names_in_both
from mtl_dist.shards.splits import check_apart, split_by_video, video_of
from mtl_dist.shards.tables import SUFFIXES, Table, read_table

NO_DIRECTORY = (
    "is not a directory; expected one with the annotation files and a directory a view, a .csv or .parquet table, or "
    "the tars of a WebDataset, such as 'faces-{000..099}.tar'"
)


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNLABELLED_VAL = 0.1  # share of pictures without labels that goes to val


class Source(NamedTuple):
    """What is to be written, and what of the source is not."""

    splits: dict[str, Annotations]  # train, val
    num_videos: dict[str, int]  # of each split
    left_out: dict[str, int]  # rows that are in neither split, by why
    unlabelled: dict[str, int]  # rows whose expression is there and is none of our classes, by why
    notes: list[str]  # what a user should know before it is written


class _Rows(NamedTuple):
    """Rows with what parts them."""

    annotations: Annotations
    videos: pa.Array  # (N,)
    persons: pa.Array | None  # (N,)


def read_source(path: Path, options: TableOptions, *, val_fraction: float | None, seed: int) -> Source:
    """Read a source and part it into train and val. Raises `InputError` naming file, row, value and what to do."""
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise InputError(f"--val-fraction is {val_fraction:g}; expected more than 0 and less than 1, such as 0.1")
    if options.unlabelled:
        return _read_pictures(path, options, UNLABELLED_VAL if val_fraction is None else val_fraction, seed)
    if _is_table(path):
        return _read_table_source(path, options, val_fraction, seed)
    if options != NO_OPTIONS:
        given = next(name for name, value in options if value != getattr(NO_OPTIONS, name))
        raise InputError(
            f"--{given.replace('_', '-')} describes a table, and {path} is a directory in the s-Aff-Wild2 layout; give "
            "a .csv or .parquet file as the source, or leave the option out"
        )
    train, val_path = read_annotations(path / FILES["train"]), path / FILES["val"]
    if val_path.exists() and val_fraction is not None:
        raise InputError(f"--val-fraction is given, but {val_path} exists; leave the option out, or take the file away")
    if not val_path.exists() and val_fraction is None:
        raise InputError(
            f"{val_path} does not exist; restore it, or part the training rows by video with --val-fraction 0.1"
        )
    rows, notes = {"train": _rows_of_text(train)}, []
    if val_fraction is None:
        rows["val"] = _rows_of_text(read_annotations(val_path))
        _check_other(path / FILES["train"], train, val_path, rows["val"].annotations)
        if both := names_in_both(rows["train"].videos, rows["val"].videos):
            notes.append(
                f"note: {len(both)} videos are in train and in val: {listed(both)}; frames of one video are much "
                "alike, so a score counts what was learnt by heart"
            )
    else:
        rows = _split(rows["train"], val_fraction, seed)
    return _source(rows, {}, {}, notes, where=str(path))


def find_images(path: Path, views: tuple[str, ...], options: TableOptions) -> dict[str, Path]:
    """Return the directory of images of each view. Raises `InputError` for a source that is none, or does not fit."""
    if len(set(views)) < len(views) or not views:
        raise InputError(f"--views is {' '.join(views) or 'empty'}; expected every view once")
    if options.unlabelled:
        check_one_view(str(path), views)
        return {views[0]: path}
    if not _is_table(path):
        if not path.is_dir():
            raise InputError(f"source {path} {NO_DIRECTORY}")
        return {view: path / view for view in views}
    check_one_view(str(path), views)
    images_dir = options.images or path.parent
    if not images_dir.is_dir():
        raise InputError(f"--images {images_dir} is not a directory; expected where the table's image paths start")
    return {views[0]: images_dir}


def check_one_view(source: str, views: tuple[str, ...]) -> None:
    """Raise unless one view is named for what is of one view: a table, or tars."""
    if len(views) > 1:
        raise InputError(
            f"{source} is of one view: say which with --views {views[0]} or --views {views[1]}; the other can be "
            "written to the same place by a second run, with other pictures"
        )


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def with_choice(annotations: Annotations, **choice: Any) -> Annotations:
    """Return annotations whose identity says that a choice was made: other shards than the source alone would give."""
    identity = json.dumps({"source": annotations.sha256, **choice}, sort_keys=True)
    return annotations._replace(sha256=hashlib.sha256(identity.encode()).hexdigest())


def _read_table_source(path: Path, options: TableOptions, val_fraction: float | None, seed: int) -> Source:
    table = read_table(path, options)
    if options.val_table is not None:
        if val_fraction is not None:
            raise InputError("--val-table and --val-fraction are given; expected one of them")
        return _join_tables(path, table, options)
    is_val, column = table.is_val, table.columns.split
    if is_val is not None and is_val.all():
        found = ", ".join(table.left_out) or "val alone"
        raise InputError(f"{path}: column '{column}' has no rows of train (it has {found}); expected train and val")
    has_val = is_val is not None and is_val.any()
    if has_val and val_fraction is not None:
        raise InputError(
            f"--val-fraction is given, but column '{column}' of {path} has rows of val; leave the option out, or take "
            "no notice of the column with --columns.split ''"
        )
    if not has_val and val_fraction is None:
        found = f" (column '{column}' has train and {', '.join(table.left_out)})" if table.left_out else ""
        raise InputError(
            f"{path} has no validation part{found}; write val in a column of splits, name a column that holds train "
            "and val with --columns.split, a second table with --val-table, or part the rows by video with "
            "--val-fraction 0.1"
        )
    rows = _rows_of(table)
    notes = [table.about_columns]
    if has_val:
        _check_apart(table, is_val, str(path))
        parts = {"train": _take(rows, np.flatnonzero(~is_val)), "val": _take(rows, np.flatnonzero(is_val))}
        notes += _note_directories(table, parts["train"], parts["val"], options)
    else:
        parts = _split(rows, val_fraction, seed)
    return _source(parts, table.left_out, table.unlabelled, notes, where=str(path))


def _join_tables(path: Path, train: Table, options: TableOptions) -> Source:
    val_path = storage.local_path(options.val_table)
    val = read_table(val_path, options)
    _check_other(path, train.annotations, val_path, val.annotations)
    for where, table in ((path, train), (val_path, val)):
        if table.is_val is not None:
            raise InputError(
                f"--val-table is given, but {where} has a column of splits, '{table.columns.split}'; give one of them "
                "(--columns.split '' takes no notice of the column)"
            )
    persons = None if train.persons is None or val.persons is None else pa.concat_arrays([train.persons, val.persons])
    both = train._replace(videos=pa.concat_arrays([train.videos, val.videos]), persons=persons)
    is_val = np.repeat([False, True], [len(train.videos), len(val.videos)])
    _check_apart(both, is_val, f"{path} and {val_path}")
    unlabelled = dict(Counter(train.unlabelled) + Counter(val.unlabelled))
    parts = {"train": _rows_of(train), "val": _rows_of(val)}
    notes = list(dict.fromkeys(table.about_columns for table in (train, val)))
    notes += _note_directories(train, parts["train"], parts["val"], options)
    return _source(parts, {}, unlabelled, notes, where=f"{path} and {val_path}")


def _check_other(train_path: Path, train: Annotations, val_path: Path, val: Annotations) -> None:
    """Raise if one file was given as both parts."""
    if train.sha256 == val.sha256:
        same = "the same file" if train_path.samefile(val_path) else "equal, byte for byte"
        raise InputError(
            f"{train_path}, of the training rows, and {val_path}, of the validation rows, are {same}; expected other "
            "rows for validation; part one file by video with --val-fraction 0.1"
        )


def _note_directories(table: Table, train: _Rows, val: _Rows, options: TableOptions) -> list[str]:
    """Say which directories are on both sides, where they may be videos: nobody named a column of these."""
    if table.columns.video or options.table_format != "plain":
        return []
    videos = [video_of(pa.array(part.annotations.images, pa.large_string())) for part in (train, val)]
    both = names_in_both(*videos)
    if not both or len(pa.concat_arrays(videos).unique()) == 1:
        return []
    return [
        f"note: {len(both)} directories have images of train and of val: {listed(both)}; if a directory is a video, "
        "its frames are on both sides, and a score counts what was learnt by heart (--val-fraction keeps videos whole)"
    ]


def _check_apart(table: Table, is_val: np.ndarray, where: str) -> None:
    """Raise if a person or video of a column is on both sides. Directories are no videos that someone named."""
    if table.persons is not None:
        check_apart("person", table.persons, is_val, where)
    if table.columns.video:
        check_apart("video", table.videos, is_val, where)


def _read_pictures(path: Path, options: TableOptions, val_fraction: float, seed: int) -> Source:
    """Read a directory of pictures without labels; a directory's stay together."""
    if not path.is_dir():
        raise InputError(f"source {path} is not a directory; expected one of pictures (--unlabelled)")
    if (given := options.model_copy(update={"unlabelled": False})) != NO_OPTIONS:
        name = next(name for name, value in given if value != getattr(NO_OPTIONS, name))
        raise InputError(f"--{name.replace('_', '-')} describes labels, and --unlabelled says that there are none")
    names = sorted(list_pictures(path))
    if not names:
        raise InputError(f"{path} holds no pictures (of {', '.join(PICTURES)}); expected some, at any depth")
    bad = find_bad_name(pa.array(names, pa.large_string()))
    if bad is not None:
        raise InputError(f"picture {names[bad]!r} of {path} has a name that is not printable or too long; rename it")
    count = len(names)
    nothing, nowhere = np.zeros((count, 12)), np.zeros(count, bool)
    rows = _rows_of_text(
        Annotations(
            row=np.arange(count),
            images=names,
            va=nothing[:, :2].astype(np.float32),
            expr=nowhere.astype(np.uint8),
            au=nothing.astype(np.uint8),
            va_mask=nowhere,
            expr_mask=nowhere,
            au_mask=nothing > 0,
            sha256=hashlib.sha256("\n".join(names).encode()).hexdigest(),
        )
    )
    alone = pc.equal(rows.videos, "")
    rows = rows._replace(videos=pc.if_else(alone, pa.array(names, pa.large_string()), rows.videos))
    return _source(_split(rows, val_fraction, seed), {}, {}, [], where=str(path))


def list_pictures(path: Path) -> Iterator[str]:
    """Yield the names of all pictures below a directory, by their endings; what is hidden is left out."""
    for directory, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        inside = Path(directory).relative_to(path)
        for name in files:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                yield (inside / name).as_posix()


def _split(rows: _Rows, fraction: float, seed: int) -> dict[str, _Rows]:
    is_val = split_by_video(rows.videos, rows.persons, fraction=fraction, seed=seed)
    rows = rows._replace(annotations=with_choice(rows.annotations, val_fraction=fraction, seed=seed))
    return {"train": _take(rows, np.flatnonzero(~is_val)), "val": _take(rows, np.flatnonzero(is_val))}


def _rows_of(table: Table) -> _Rows:
    return _Rows(table.annotations, table.videos, table.persons)


def _rows_of_text(annotations: Annotations) -> _Rows:
    return _Rows(annotations, video_of(pa.array(annotations.images, pa.large_string())), None)


def _take(rows: _Rows, places: np.ndarray) -> _Rows:
    index = pa.array(places)
    persons = None if rows.persons is None else rows.persons.take(index)
    return _Rows(rows.annotations.take(places), rows.videos.take(index), persons)


def _source(
    rows: dict[str, _Rows], left_out: dict[str, int], unlabelled: dict[str, int], notes: list[str], *, where: str
) -> Source:
    names = [pa.array(rows[split].annotations.images, pa.large_string()) for split in ("train", "val")]
    if both := names_in_both(*names):
        raise InputError(
            f"{where}: {len(both)} images are in train and in val: {listed(both)}; a score would count what was learnt "
            "by heart; take their rows out of one of the two"
        )
    return Source(
        splits={split: part.annotations for split, part in rows.items()},
        num_videos={split: len(part.videos.unique()) for split, part in rows.items()},
        left_out=left_out,
        unlabelled=unlabelled,
        notes=notes,
    )
