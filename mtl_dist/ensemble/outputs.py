"""The files of an ensemble: predictions of validation rows and of the test list, the challenge's file, the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mtl_dist import storage
from mtl_dist.ensemble.calibrated import Fitted
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.calibration import AU_NAMES, Calibration, apply, stack_members
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.predictions import PredictionTable, fill_missing, prediction_table, write_parquet
from mtl_dist.predicting.submission import submission_text
from mtl_dist.timeline import make_timeline
from mtl_dist.training.tracking import render_scores

# All but score.json that an ensemble may write, which one with other options leaves out.
WRITTEN = (
    "predictions.parquet", "calibrated.parquet", "table.txt", "test_predictions.parquet", "submission.txt"
)  # fmt: skip


def render_tables(
    ensemble: PredictedRows, first: PredictionTable, fitted: Fitted | None, results: dict, steps: dict, gains: str
) -> dict[str, pa.Table | bytes]:
    """Write the plain mean, the calibrated predictions where there are some, and the scores as tables, gains last."""
    names = {"images": first.images, "videos": first.videos, "labels": True}
    files: dict[str, Any] = {"predictions.parquet": prediction_table(ensemble, **names)}
    text = render_scores(results)
    if fitted:
        calibrated = ensemble._replace(predictions=fitted.crossfit.predictions)
        table = _with_decisions(prediction_table(calibrated, **names), fitted.crossfit.au_on)
        files["calibrated.parquet"] = table.append_column("fold", pa.array(fitted.folds))
        text += f"\nwhat each step adds, fitted on other videos\n{render_scores(steps, brief=True)}"
    text += f"\n{gains}" if gains else ""
    return files | {"table.txt": text.encode()}


def render_test(
    names: list[str], predicted: list[PredictedRows], final: Calibration | None
) -> tuple[dict[str, pa.Table | bytes], list[str]]:
    """Combine what members predicted of the test list, with the calibration that was fitted on all validation rows.

    Returns the files, and what is to be said of frames without a picture.
    """
    final = final or Calibration.plain_mean(len(predicted))
    rows, predictions, num_partial = _same_rows(predicted)
    images = [names[row] for row in rows]
    combined = apply(stack_members(predictions), final, make_timeline(images))
    au_on = combined.au > final.thresholds
    none = Targets(*(np.zeros(0) for _ in Targets._fields))
    table = prediction_table(PredictedRows(rows, combined, none), images, labels=False)
    filled = fill_missing(names, rows, (combined.va, combined.expr.argmax(-1), au_on))
    files = {
        "test_predictions.parquet": _with_decisions(table, au_on),
        "submission.txt": submission_text(names, *filled.values).encode(),
    }
    partial = f"{num_partial} of {len(names)} frames have a picture in one view alone, whose members decide"
    return files, [note for note in (partial if num_partial else "", filled.note) if note]


def _same_rows(members: list[PredictedRows]) -> tuple[np.ndarray, list[Predictions], int]:
    """Return the rows that any member has, and predictions of all: a member without a row has the others' mean.

    The last is the number of rows that not all members have.
    """
    rows = np.unique(np.concatenate([member.rows for member in members]))
    has = np.stack([np.isin(rows, member.rows) for member in members])  # (members, rows)
    columns = []
    for values in zip(*(member.predictions for member in members)):
        column = np.zeros((len(members), len(rows), values[0].shape[1]), values[0].dtype)
        for place, own in enumerate(values):
            column[place, has[place]] = own
        mean = column.sum(0) / has.sum(0)[:, None]
        columns.append(np.where(has[..., None], column, mean.astype(column.dtype)))
    return rows, [Predictions(*member) for member in zip(*columns)], int((~has.all(0)).sum())


def _with_decisions(table: pa.Table, au_on: np.ndarray) -> pa.Table:
    """Add the action units as decided, on or off."""
    for name, column in zip(AU_NAMES, au_on.T):
        table = table.append_column(name, pa.array(column))
    return table


def write_files(out: str, files: dict[str, pa.Table | bytes]) -> None:
    """Write everything, each file whole or not at all, score.json last.

    What an earlier ensemble wrote there goes first: its submission beside this one's scores would be sent in.
    """
    for name in ("score.json", *WRITTEN):
        storage.delete(storage.join(out, name))
    for name, content in files.items():
        if isinstance(content, bytes):
            storage.write_bytes(storage.join(out, name), content)
        else:
            write_parquet(storage.join(out, name), content)
