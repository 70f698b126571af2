"""Predictions of frames as a table, Parquet or CSV: what the ensemble and `predict` write and the report reads.

A row a frame: row, image, valence, arousal, expression, p_<class> and p_AU<number>; of video files also the frame's
seconds; of a validation set in Parquet also the image's video and the labels it was scored against (label_valence, ...,
null where missing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist import storage
from mtl_dist.errors import Damaged, InputError
from mtl_dist.objective.affect import PredictedRows, finite_rows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.objective.smoothing import last_known
from mtl_dist.tasks import AUS, EXPRESSIONS
from mtl_dist.timeline import make_timeline, video_names

_VA = ("valence", "arousal")
_KEY, _SEAL = b"mtl_dist", b"mtl_dist.sha256"  # in the schema's metadata
_AU_NAMES = tuple(f"AU{number}" for number in AUS)


class PredictionTable(NamedTuple):
    """What a Parquet file of predictions holds."""

    predicted: PredictedRows
    images: list[str]
    videos: list[str]


def check_finite(predictions: Predictions, images: list[str], *, source: str) -> None:
    """Raise `InputError` naming `source` and an image where a prediction is not finite: no score would show it."""
    is_finite = finite_rows(predictions)
    if not is_finite.all():
        raise InputError(
            f"{source} gives values that are not finite for {np.sum(~is_finite)} of {len(images)} images, such as "
            f"{images[int(np.argmin(is_finite))]}: its weights overflow; train it again, or leave it out"
        )


class Filled(NamedTuple):
    """Values of every frame of a list, also of those without a picture."""

    values: tuple[np.ndarray, ...]  # each (n, ...)
    note: str  # how many were filled, and how; empty where none were


def fill_missing(names: Sequence[str], rows: np.ndarray, values: Sequence[np.ndarray]) -> Filled:
    """Return values (m, ...) of `rows` (m,) as values of all `names` (n), as the challenge wants them.

    A frame without a picture has the values of the last frame before it in its video, else zeros: Neutral, no action
    unit.
    """
    names = list(names)
    is_known = np.zeros(len(names), bool)
    is_known[rows] = True
    if is_known.all():
        return Filled(tuple(values), "")
    source = last_known(make_timeline(names), is_known)
    place = np.zeros(len(names), np.int64)
    place[rows] = np.arange(len(rows))
    filled = [np.zeros((len(names), *array.shape[1:]), array.dtype) for array in values]
    for array, known in zip(filled, values):
        array[source >= 0] = known[place[source[source >= 0]]]
    num_missing, num_zero = int((~is_known).sum()), int((source < 0).sum())
    return Filled(
        tuple(filled),
        f"{num_missing} of {len(names)} frames have no picture, such as {names[int(np.argmin(is_known))]}: "
        f"{num_missing - num_zero} have the values of the last frame before in their video, {num_zero} have none "
        "before and zeros (Neutral, no action unit)",
    )


def prediction_table(
    predicted: PredictedRows,
    images: list[str],
    *,
    labels: bool,
    videos: list[str] | None = None,
    seconds: np.ndarray | None = None,
) -> pa.Table:
    """Return predictions as a table of float32 columns; with `labels`, the targets too, with others, these.

    `seconds` (n,) that are NaN are null.
    """
    predictions, targets = predicted.predictions, predicted.targets
    columns = {"row": pa.array(predicted.rows), "image": pa.array(images, pa.string())}
    if videos is not None:
        columns["video"] = pa.array(videos, pa.string())
    if seconds is not None:
        columns["seconds"] = pa.array(seconds, pa.float64(), mask=np.isnan(seconds))
    columns |= predicted_columns(predictions)
    if labels:
        va_missing = np.repeat(~targets.va_mask.astype(bool)[:, None], 2, axis=1)
        columns |= _floats([f"label_{name}" for name in _VA], targets.va, va_missing)
        columns["label_expression"] = pa.array(targets.expr, pa.int8(), mask=~targets.expr_mask.astype(bool))
        columns |= _floats([f"label_{name}" for name in _AU_NAMES], targets.au, ~targets.au_mask.astype(bool))
    return pa.table(columns)


def predicted_columns(predictions: Predictions) -> dict[str, pa.Array]:
    """Return what is predicted of n frames as columns of a table."""
    columns = _floats(_VA, predictions.va.clip(-1, 1))
    columns["expression"] = pa.array([EXPRESSIONS[number] for number in predictions.expr.argmax(-1)], pa.string())
    columns |= _floats([f"p_{name}" for name in EXPRESSIONS], predictions.expr)
    return columns | _floats([f"p_{name}" for name in _AU_NAMES], predictions.au)


def write_parquet(uri: str, table: pa.Table, *, key: str = "") -> None:
    """Write a table as Parquet to a local path or s3:// URI, whole or not at all; `key` says what it was made of.

    Its content's sha256 is in it too: the checksums of Parquet's pages leave out what is between them.
    """
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(({_KEY: key} if key else {}) | {_SEAL: _digest(table)})
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_key(uri: str) -> str | None:
    """Return the key that a table was written with; None where there is no table, or a damaged one."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        return (_parse(data).schema.metadata or {}).get(_KEY, b"").decode(errors="replace")
    except Damaged:
        return None


def read_predictions(uri: str) -> PredictionTable:
    """Read a Parquet file of predictions with labels. Raises `InputError` for a foreign or damaged file."""
    try:
        table = _parse(storage.read_bytes(uri))
        va, missing_va = _matrix(table, [f"label_{name}" for name in _VA])
        au, missing_au = _matrix(table, [f"label_{name}" for name in _AU_NAMES])
        expr, missing_expr = _matrix(table, ["label_expression"])
        predictions = Predictions(
            *(
                _matrix(table, names)[0]
                for names in (_VA, [f"p_{name}" for name in EXPRESSIONS], [f"p_{name}" for name in _AU_NAMES])
            )
        )
        rows, images = table["row"].to_numpy().astype(np.int64), table["image"].to_pylist()
        videos = table["video"].to_pylist() if "video" in table.column_names else video_names(images)
    except FileNotFoundError:
        raise InputError(f"{uri} does not exist; it is what mtl_dist.ensemble writes") from None
    except InputError:
        raise  # of the store
    except (Damaged, pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{uri} is not a table of predictions with labels ({error})") from None
    check_finite(predictions, images, source=uri)
    targets = Targets(va, expr[:, 0].astype(np.int64), au, ~missing_va[:, 0], ~missing_expr[:, 0], ~missing_au)
    return PredictionTable(PredictedRows(rows, predictions, targets), images, videos)


def _parse(data: bytes) -> pa.Table:
    """Read Parquet, checksums checked. Raises `Damaged` for what is none or is damaged."""
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        claimed = (table.schema.metadata or {}).get(_SEAL)
        is_whole = claimed is None or claimed.decode() == _digest(table)  # None: of before there was one
    except (pa.ArrowException, OSError, ValueError) as error:  # Arrow calls a damaged page an OSError
        raise Damaged(str(error)) from None
    if not is_whole:
        raise Damaged("its checksum does not match its content")
    return table


def _digest(table: pa.Table) -> str:
    sha256 = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns):
        sha256.update(f"{name}\0{column.type}\0".encode())
        sha256.update(np.packbits(column.is_null().to_numpy()).tobytes())
        if pa.types.is_string(column.type):
            sha256.update("\0".join(column.fill_null("").to_pylist()).encode())
        else:
            zero = False if pa.types.is_boolean(column.type) else 0  # decisions of action units
            sha256.update(np.ascontiguousarray(column.fill_null(zero).to_numpy()).tobytes())
    return sha256.hexdigest()


def _floats(names, values: np.ndarray, missing: np.ndarray | None = None) -> dict[str, pa.Array]:
    values = np.asarray(values, np.float32)
    return {
        name: pa.array(values[:, i], mask=None if missing is None else missing[:, i]) for i, name in enumerate(names)
    }


def _matrix(table: pa.Table, names) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, len(names)) float32 with 0 for null, and where it was null."""
    columns = [table[name] for name in names]
    missing = np.column_stack([column.is_null().to_numpy() for column in columns])
    values = np.column_stack([column.fill_null(0).to_numpy() for column in columns]).astype(np.float32)
    return values, missing
