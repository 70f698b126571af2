"""The rows of frames.parquet: one a face, and one for a frame or photograph without any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from pyarrow import parquet

ROWS = 4096  # that are in memory
ABOUT = b"mtl_dist"  # the key of a part's own words in its file

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # file of the frame
        pa.field("video", pa.string(), nullable=False),  # directory of the first person's pictures
        pa.field("person", pa.int32()),  # of the video, or of the photograph, from 1
        pa.field("frame", pa.int64()),  # of a video, from 1
        pa.field("seconds", pa.float64()),  # of a video, from where its container starts
        pa.field("image", pa.string()),  # name of the picture in both views; null where it was left out
        pa.field("box", pa.list_(pa.float32(), 4)),  # left, top, right, bottom in pixels of the picture as shown
        pa.field("points", pa.list_(pa.float32(), 10)),  # x, y of the eyes, nose, corners of the mouth; left one first
        pa.field("confidence", pa.float32()),  # of the detector
        pa.field("sharpness", pa.float32()),  # variance of the Laplacian of the aligned picture
        pa.field("yaw", pa.float32()),  # degrees to the right of the picture, estimated
        pa.field("track", pa.int32()),  # of a video; a person may have several
        pa.field("why", pa.string()),  # it was left out
    ]
)

NO_FACE, TOO_SMALL, BLURRED = "no face", "too small", "too blurred"
TOO_SHORT, NOT_LARGEST, BAD = "person too short", "not the largest", "cannot be read"


class RowWriter:
    """Writes rows to a file, a few thousand at a time."""

    def __init__(self, path: Path):
        self._writer = parquet.ParquetWriter(path, SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS:
            self._flush()

    def tell(self, about: dict[str, Any]) -> None:
        """Say of the file what `read_about` returns."""
        self._writer.add_key_value_metadata({ABOUT: json.dumps(about, sort_keys=True).encode()})

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        if kind is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, a few thousand of which are in memory."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS):
            yield from batch.to_pylist()


def read_about(path: Path) -> dict[str, Any] | None:
    """Return what a part's file says of itself; None where it is no whole one."""
    try:
        told = (parquet.read_metadata(path).metadata or {}).get(ABOUT)
        return None if told is None else json.loads(told)
    except (OSError, ValueError, pa.ArrowException):
        return None
