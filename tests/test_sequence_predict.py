"""From pictures to features to a model of sequences to a film: every frame predicted, with its time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.features import FeatureReader
from mtl_dist.data.index import FEATURES, read_index
from mtl_dist.data.reader import ShardReader
from mtl_dist.predict.sequences import Describing
from mtl_dist.report.pictures import encode_png
from tests.conftest import assert_one_message, run_here
from tests.starving import starving_networks

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory) -> Path:
    """Features of the pictures of a run, and a model of sequences on them."""
    root, shards = tmp_path_factory.mktemp("film"), runs / "shards" / "cropped"
    sets = [shards / "train", shards / "val"]
    made = run_here("mtl_dist.features", "create", root, "--data", *sets, "--runs", runs / "cropped", "--local")
    assert made.returncode == 0, made.stderr
    own = ["--data.train", root / "cropped" / "train", "--data.val", root / "cropped" / "val"]
    small = ["--model.sequence.window", "4", "--model.sequence.hidden", "8", "--train.global-batch", "4"]
    done = run_here(
        "mtl_dist.train", "--local", "--preset", "small-c", "--run.storage", root, "--run.name", "c",
        "--train.epochs", "2", "--checkpoint.keep-last", "2", *own, *small,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


def predict(*args: object):
    return run_here("mtl_dist.predict", *args)


def test_pictures_of_the_validation_set_are_predicted_as_training_scored_them(runs, trained, tmp_path):
    """Written out as files in a directory a video: the same pixels, the same features, the same predictions."""
    uri = f"{runs}/shards/cropped/val"
    index = read_index(uri)
    reader = ShardReader(uri, index, Cache(None))
    pixels = reader.read_batch(np.arange(index.rows), 80).inputs[:, 0].permute(0, 2, 3, 1).numpy()
    names = reader.names()
    for row, name in enumerate(names.images):
        path = (tmp_path / "pictures" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels[row]))
    out = tmp_path / "out.parquet"
    done = predict(
        "--runs", trained / "c", "--extractors", runs / "cropped", "--input", tmp_path / "pictures", "--out", out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = pq.read_table(out)
    scored = run_here("mtl_dist.ensemble", "--runs", trained / "c", "--out", tmp_path / "e", "--local")
    assert scored.returncode == 0, scored.stderr
    expected = pq.read_table(tmp_path / "e" / "predictions.parquet")
    images = expected["image"].to_pylist()
    place = {image.rpartition(".")[0]: number for number, image in enumerate(images)}
    # Rows of one picture are two rows of a set and one file: videos without such are compared.
    twice = {image.split("/")[0] for image in images if images.count(image) > 1}
    named = [name.rpartition(".")[0] for name in told["image"].to_pylist()]
    mine = [number for number, name in enumerate(named) if name.split("/")[0] not in twice]
    assert len(mine) > 3
    columns = [
        name
        for name in told.column_names
        if name in expected.column_names and name not in ("row", "image", "expression")
    ]
    assert len(columns) == 2 + 8 + 12
    for name in columns:
        ours, theirs = (table[name].to_numpy() for table in (told, expected))
        np.testing.assert_allclose(ours[mine], theirs[[place[named[number]] for number in mine]], atol=2e-3)


def test_a_film_is_predicted_frame_by_frame_with_its_times(runs, trained, tmp_path):
    av = pytest.importorskip("av")
    path, rng = tmp_path / "film.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for number in range(30):
            shade = rng.integers(0, 255, (96, 96, 3), np.uint8) // 4 + 4 * number
            for packet in stream.encode(av.VideoFrame.from_ndarray(shade.astype(np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    out = tmp_path / "film.csv"
    done = predict("--runs", trained / "c", "--extractors", runs / "cropped", "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    table = csv.read_csv(out)
    assert table.num_rows == 30
    np.testing.assert_allclose(table["seconds"].to_numpy(), np.arange(30) / 25, atol=1e-6)
    # A frame's prediction depends on its neighbours: of every third frame alone it is another.
    thinned = tmp_path / "thinned.csv"
    done = predict(
        "--runs", trained / "c", "--extractors", runs / "cropped", "--input", path, "--out", thinned,
        "--every-frames", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert csv.read_csv(thinned)["valence"].to_pylist() != table["valence"].to_pylist()[::3]


def test_several_networks_of_a_set_are_averaged_and_sets_keep_their_order():
    class Times(torch.nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.factor * images.mean((2, 3))

    of_size = SimpleNamespace(input_size=8)
    describing = Describing([[(of_size, Times(1.0)), (of_size, Times(4.0))], [(of_size, Times(10.0))]])
    pictures = torch.randint(0, 256, (5, 1, 3, 8, 8), dtype=torch.uint8)
    means = normalise(pictures, 8)[:, 0].mean((2, 3))
    first, second = describing(pictures, torch.ones(5, 1, dtype=torch.bool))
    torch.testing.assert_close(first, 2.5 * means)
    torch.testing.assert_close(second, 10 * means)


def test_what_runs_out_of_memory_is_described_in_smaller_batches(runs, trained, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(11):
        (tmp_path / f"{number:02}.png").write_bytes(encode_png(rng.integers(0, 255, (80, 80, 3), np.uint8)))
    what = ["--runs", trained / "c", "--extractors", runs / "cropped", "--input", tmp_path, "--batch", "8"]
    tables = []
    for most in (99, 3):
        with starving_networks(most) as passed:
            done = predict(*what, "--out", tmp_path / f"{most}.csv")
        assert done.returncode == 0, done.stderr
        tables.append(csv.read_csv(tmp_path / f"{most}.csv"))
    assert passed[-8:] == [8, 4, 2, 2, 2, 2, 2, 1]
    plain, starved = tables
    assert starved["image"] == plain["image"]
    for name in plain.column_names[plain.column_names.index("valence") :]:
        if name == "expression":
            continue
        np.testing.assert_allclose(starved[name].to_numpy(), plain[name].to_numpy(), atol=2e-3)


def test_pictures_without_a_directory_are_the_frames_of_one_video(runs, trained, tmp_path):
    for place in (tmp_path / "flat", tmp_path / "film" / "v"):
        place.mkdir(parents=True)
        for number in range(6):
            (place / f"{number:05d}.png").write_bytes(encode_png(np.full((80, 80, 3), 40 * number, np.uint8)))
    told = []
    for place in ("flat", "film"):
        out = tmp_path / f"{place}.parquet"
        done = predict(
            "--runs", trained / "c", "--extractors", runs / "cropped", "--input", tmp_path / place, "--out", out
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(pq.read_table(out)["valence"].to_pylist())
    assert told[0] == told[1]


def test_other_extractors_than_the_runs_are_one_message(runs, trained, tmp_path):
    film = tmp_path / "pictures"
    film.mkdir()
    (film / "1.png").write_bytes(encode_png(np.zeros((80, 80, 3), np.uint8)))
    out = ["--input", film, "--out", tmp_path / "out.csv"]
    assert_one_message(predict("--runs", trained / "c", *out), "--extractors names 0; expected 1", "small of run")
    wrong = predict("--runs", trained / "c", "--extractors", runs / "cropped_aligned", *out)
    assert_one_message(wrong, "was trained on features of", "give that one")
    assert_one_message(
        predict("--runs", runs / "cropped", "--extractors", runs / "cropped", *out),
        "--extractors is for models of features",
    )
    assert_one_message(
        predict("--runs", trained / "c", runs / "cropped", "--extractors", runs / "cropped", *out),
        "predict with each apart",
    )
    assert not (tmp_path / "out.csv").exists()


def test_a_tail_average_of_a_model_of_features_is_read_as_a_run_is(runs, trained, tmp_path):
    soup, val = tmp_path / "soup", trained / "cropped" / "val"
    made = run_here("mtl_dist.soup", trained / "c", "--last", "2", "--out", soup)
    assert made.returncode == 0, made.stderr
    card = (soup / "README.md").read_text()
    assert "It reads the rows of whole videos, of view `cropped`." in card
    assert "Features of every frame, made by `small of run cropped, step" in card
    assert "read_image" not in card
    film = tmp_path / "pictures"
    film.mkdir()
    for number in range(3):
        (film / f"{number}.png").write_bytes(encode_png(np.full((80, 80, 3), 80 * number, np.uint8)))
    out = ["--input", film, "--out", tmp_path / "out.csv"]
    assert_one_message(predict("--runs", soup, *out), "--extractors names 0; expected 1", "small of run")
    done = predict("--runs", soup, "--extractors", runs / "cropped", *out)
    assert done.returncode == 0, done.stderr
    scored = run_here("mtl_dist.ensemble", "--runs", soup, "--val", val, "--out", tmp_path / "e", "--local", "--steps")
    assert scored.returncode == 0, scored.stderr
    score = json.loads((tmp_path / "e" / "score.json").read_text())["p"]
    assert score == pytest.approx(json.loads((soup / "config.json").read_text())["scores"]["p"], abs=1e-6)


def test_a_shard_set_is_scored_by_way_of_its_features(runs, trained, tmp_path):
    done = predict(
        "--runs", trained / "c", "--extractors", runs / "cropped", "--input", runs / "shards" / "cropped" / "val",
        "--out", tmp_path / "out.csv",
    )  # fmt: skip
    assert_one_message(done, "mtl_dist.features create")


def test_features_carry_the_labels_of_their_pictures(runs, trained):
    pictures, features = f"{runs}/shards/cropped/train", f"{trained}/cropped/train"
    index = read_index(features, formats=(FEATURES,))
    assert index.labels == read_index(pictures).labels
    reader = FeatureReader(features, index, Cache(None))
    rows = [reader.table(video, 0, count)[:, 0] for video, count in enumerate(index.video_rows.tolist())]
    assert sorted(np.concatenate(rows).astype(int).tolist()) == list(range(index.rows))
