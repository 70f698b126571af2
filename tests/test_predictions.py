"""Predictions as a table: what is written is read back, and foreign files are refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mtl_dist.errors import InputError
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.runtime.evaluate import Predicted
from mtl_dist.runtime.predictions import prediction_table, read_key, read_predictions, write_parquet


def make_predicted(num_rows: int, seed: int = 0) -> Predicted:
    rng = np.random.default_rng(seed)
    predictions = Predictions(
        rng.uniform(-1, 1, (num_rows, 2)).astype(np.float32),
        rng.dirichlet(np.ones(8), num_rows).astype(np.float32),
        rng.random((num_rows, 12)).astype(np.float32),
    )
    va_mask, expr_mask, au_mask = (
        rng.random(num_rows) < 0.6,
        rng.random(num_rows) < 0.6,
        rng.random((num_rows, 12)) < 0.6,
    )
    targets = Targets(
        (rng.uniform(-1, 1, (num_rows, 2)) * va_mask[:, None]).astype(np.float32),
        rng.integers(0, 8, num_rows) * expr_mask,
        (rng.integers(0, 2, (num_rows, 12)) * au_mask).astype(np.float32),
        va_mask,
        expr_mask,
        au_mask,
    )
    return Predicted(np.arange(num_rows) * 3, predictions, targets)


def test_a_table_of_predictions_comes_back_as_it_was(tmp_path):
    predicted = make_predicted(50)
    images = [f"video/{number:05d}.jpg" for number in range(50)]
    write_parquet(f"{tmp_path}/predictions.parquet", prediction_table(predicted, images, labels=True))
    found = read_predictions(f"{tmp_path}/predictions.parquet")
    assert (found.images, found.videos) == (images, ["video"] * 50)
    table = prediction_table(predicted, images, labels=True, videos=[f"v{number // 9}" for number in range(50)])
    write_parquet(f"{tmp_path}/named.parquet", table)
    assert read_predictions(f"{tmp_path}/named.parquet").videos == table["video"].to_pylist()
    for mine, read in zip(
        (predicted.rows, *predicted.predictions, *predicted.targets),
        (found.predicted.rows, *found.predicted.predictions, *found.predicted.targets),
    ):
        np.testing.assert_array_equal(mine, read)


def test_the_key_of_a_table_is_read_back_only_where_the_table_is_whole(tmp_path):
    path = tmp_path / "keyed.parquet"
    assert read_key(str(path)) is None
    write_parquet(str(path), prediction_table(make_predicted(50), ["v/1.jpg"] * 50, labels=True), key="of this model")
    assert read_key(str(path)) == "of this model"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 1  # in a column
    for data in (whole[:-100], bytes(damaged), b""):
        path.write_bytes(data)
        assert read_key(str(path)) is None
        with pytest.raises(InputError, match="not a table of predictions"):
            read_predictions(str(path))


def test_a_foreign_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(f"{tmp_path}/none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="not a table of predictions"):
        read_predictions(f"{tmp_path}/text.parquet")
    write_parquet(f"{tmp_path}/other.parquet", pa.table({"row": [1]}))
    with pytest.raises(InputError, match="not a table of predictions"):
        read_predictions(f"{tmp_path}/other.parquet")
