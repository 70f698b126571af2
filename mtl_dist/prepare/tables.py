"""Write frames.parquet and the table of faces, of which `shards create` makes a set."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mtl_dist import storage
from mtl_dist.prepare.annotations import OURS, Annotations, row_of
from mtl_dist.prepare.part import PARTS, directory_of
from mtl_dist.prepare.rows import RowWriter, read_rows
from mtl_dist.prepare.sources import Part

FRAMES, FACES = "frames.parquet", "faces.csv"


def write_tables(
    dest: Path,
    parts: Sequence[Part],
    abouts: Sequence[dict[str, Any]],
    *,
    annotations: Annotations | None,
    within_s: float | None,
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Write both, each whole or not at all; `show` is called with the row of every face that was kept.

    Return how many of these have a label. The column `person` of faces.csv is the source of a picture: whoever is in
    it, all its pictures stay together when a set is parted. `video` is the directory of one person's frames; pictures
    of photographs have none, and those of a directory stay together by their paths.
    """
    num_labelled = 0
    labels = annotations.labels if annotations else []
    with (
        storage.staged(str(dest / FACES)) as faces_path,
        storage.staged(str(dest / FRAMES)) as frames_path,
        RowWriter(frames_path) as frames,
        faces_path.open("w", encoding="utf-8", newline="") as file,
    ):
        faces = csv.writer(file, lineterminator="\n")
        faces.writerow([*OURS, *labels])
        for part, about in zip(parts, abouts, strict=True):
            own_s = about["frame_s"] / 2 if within_s is None and about["frame_s"] else within_s
            for row, is_alone in _with_others(part, about, read_rows(dest / PARTS / part.name)):
                frames.add(row)
                if row["image"] is None:
                    continue
                show(row)
                found = annotations.find(row_of(row, is_alone), own_s) if annotations else []
                num_labelled += any(value for name, value in zip(labels, found) if name.lower() != "split")
                video = directory_of(part.video, row["person"]) if part.is_video else ""
                faces.writerow([row["image"], video, row["source"], *found])
    return num_labelled


def _with_others(
    part: Part, about: dict[str, Any], rows: Iterator[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield rows, and whether theirs is the only person of the video, or of the photograph."""
    if part.is_video:
        yield from ((row, len(about["faces"]) == 1) for row in rows)
        return
    for _, same in groupby(rows, lambda row: row["source"]):
        of_one = list(same)
        is_alone = sum(row["image"] is not None for row in of_one) == 1
        yield from ((row, is_alone) for row in of_one)
