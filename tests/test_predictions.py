"""Predictions as a table: what is written is read back, and foreign files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from mtl_dist.errors import InputError, NonFiniteLoss
from mtl_dist.objective.affect import PredictedRows, finite_rows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.evaluate import check_predictions
from mtl_dist.predicting.predictions import prediction_table, read_key, read_predictions, write_parquet
from mtl_dist.ranks import on_rank_0
from tests.ranks import start_ranks


def make_predicted(num_rows: int, seed: int = 0) -> PredictedRows:
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
    return PredictedRows(np.arange(num_rows) * 3, predictions, targets)


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
    damaged[100] ^= 1  # in a column
    for data in (whole[:-100], bytes(damaged), b""):
        path.write_bytes(data)
        assert read_key(str(path)) is None
        with pytest.raises(InputError, match="not a table of predictions"):
            read_predictions(str(path))


def test_a_table_whose_content_is_not_what_its_checksum_says_is_damaged(tmp_path):
    """Bits between the pages that Parquet checks, such as where a page begins, change values in silence."""
    path = tmp_path / "sealed.parquet"
    write_parquet(str(path), prediction_table(make_predicted(9), ["v/1.jpg"] * 9, labels=True), key="of this model")
    table = pq.read_table(path)
    place = table.column_names.index("label_AU1")
    other = table.set_column(place, "label_AU1", pa.array([None] * 9, pa.float32()))
    pq.write_table(other, path)
    assert read_key(str(path)) is None
    with pytest.raises(InputError, match="its checksum does not match its content"):
        read_predictions(str(path))
    pq.write_table(other.replace_schema_metadata(), path)  # as tables of before were
    assert not read_predictions(str(path)).predicted.targets.au_mask[:, 0].any()


def test_a_foreign_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(f"{tmp_path}/none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="not a table of predictions"):
        read_predictions(f"{tmp_path}/text.parquet")
    write_parquet(f"{tmp_path}/other.parquet", pa.table({"row": [1]}))
    with pytest.raises(InputError, match="not a table of predictions"):
        read_predictions(f"{tmp_path}/other.parquet")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_with_a_prediction_that_is_not_finite_is_refused_by_its_image(value, tmp_path):
    predicted = make_predicted(50)
    predicted.predictions.au[7, 3] = value
    images = [f"video/{number:05d}.jpg" for number in range(50)]
    write_parquet(f"{tmp_path}/predictions.parquet", prediction_table(predicted, images, labels=True))
    with pytest.raises(InputError, match=r"predictions\.parquet .* not finite for 1 of 50 images, such as .*/00007"):
        read_predictions(f"{tmp_path}/predictions.parquet")


def rank_main(rank: int, store: str, out: str) -> None:
    """One of two ranks, of which the second alone predicts what is not finite, and the first fails unforeseen."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    predicted = make_predicted(10)
    check_predictions([], 4)
    if rank:
        predicted.predictions.va[3] = np.nan
        predicted.predictions.expr[[1, 3]] = np.inf
    try:
        check_predictions(predicted.rows[~finite_rows(predicted.predictions)].tolist(), 5)
    except NonFiniteLoss as error:
        Path(f"{out}/{rank}").write_text(str(error))
    try:
        on_rank_0(lambda: {}["step"])
    except RuntimeError as error:
        Path(f"{out}/alone-{rank}").write_text(f"{error}, of {type(error.__cause__).__name__}")
    dist.destroy_process_group()


@pytest.mark.whole
def test_all_ranks_end_alike_where_one_predicts_what_is_not_finite_or_rank_0_fails_in_any_way(tmp_path):
    start_ranks(rank_main, (str(tmp_path / "store"), str(tmp_path)), 2)
    said = [(tmp_path / name).read_text() for name in "01"]
    assert said == ["evaluation after step 5: predictions of 2 row(s) are not finite: 3, 9"] * 2
    said = [(tmp_path / f"alone-{rank}").read_text() for rank in (0, 1)]
    assert said == [f"rank 0 failed: KeyError: 'step', of {cause}" for cause in ("KeyError", "NoneType")]


def test_decisions_of_action_units_are_sealed_with_their_table(tmp_path):
    table = prediction_table(make_predicted(5), [f"{n}.jpg" for n in range(5)], labels=True)
    decided = [True, False, None, True, False]
    write_parquet(f"{tmp_path}/decided.parquet", table.append_column("AU1", pa.array(decided)), key="of this model")
    assert read_key(f"{tmp_path}/decided.parquet") == "of this model"
