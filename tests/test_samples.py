"""Several sets read as one: their shards one behind the other; a single set is what it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_dist.config import build_config
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import Sets, check_pair, read_index, read_sets
from mtl_dist.data.loader import eval_batches, train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.samples import Mixture, open_samples
from mtl_dist.errors import InputError
from mtl_dist.predicting.evaluate import list_rows
from mtl_dist.presets import CommandConfig, config_of, parse_command, read_config_file
from mtl_dist.settings import dump_yaml
from mtl_dist.shards.__main__ import create
from mtl_dist.tasks import SET_BITS
from mtl_dist.training.plan import open_data
from mtl_dist.training.tracking import read_records
from tests.conftest import run_here, write_dataset

CONFIG = build_config({"data": {"image_size": 48}, "model": {"backbone": "vgg_small"}})


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another pair of sets, of other pictures and of the same names."""
    root = tmp_path_factory.mktemp("other")
    source = write_dataset(root / "source", num_train=24, num_val=16, seed=7)
    create(str(source), str(root / "shards"), views=("cropped",), frames_per_shard=5, jobs=1)
    return root / "shards"


@pytest.fixture(scope="module")
def both(shards, other) -> Sets:
    return read_sets([f"{root}/cropped/train" for root in (shards, other)])


def open_one(uri: str):
    return open_samples(read_sets([uri]), CONFIG, Cache())


def test_a_single_set_keeps_its_identity_and_its_order(shards):
    uri = f"{shards}/cropped/train"
    index, sets = read_index(uri), read_sets([uri])
    assert (sets.sha256, sets.source_sha256, sets.labels) == (index.sha256, index.source_sha256, index.labels)
    np.testing.assert_array_equal(open_one(uri).group_sizes, index.shard_rows)
    samples = open_one(f"{uri}/index.json")
    assert samples.sha256 == index.sha256
    assert samples.read(np.array([3])).samples.tolist() == [3]


def test_the_identity_of_several_sets_is_that_of_all_of_them_in_their_order(both):
    turned = dataclasses.replace(both, uris=both.uris[::-1], indexes=both.indexes[::-1])
    assert len({both.sha256, turned.sha256, *(index.sha256 for index in both.indexes)}) == 4
    counts = [index.labels for index in both.indexes]
    assert (both.rows, both.labels.rows) == (64, 64)
    assert both.labels.au == [one + other for one, other in zip(counts[0].au, counts[1].au)]


def test_a_mixture_holds_the_samples_of_its_sets_one_behind_the_other(both):
    mixture, parts = open_samples(both, CONFIG, Cache()), [open_one(uri) for uri in both.uris]
    assert isinstance(mixture, Mixture)
    wanted = np.array([41, 3, 63, 0, 40, 39, 41])
    batch = mixture.read(wanted)
    assert batch.samples.tolist() == wanted.tolist()
    for place, number in enumerate(wanted.tolist()):
        which, own = divmod(number, 40) if number < 40 else (1, number - 40)
        alone = parts[which].read(np.array([own]))
        assert torch.equal(batch.inputs[place], alone.inputs[0])
        assert batch.rows[place, 0] == alone.rows[0, 0] + (which << SET_BITS)
        assert all(torch.equal(mine[place], theirs[0]) for mine, theirs in zip(batch.labels, alone.labels))
    assert mixture.read(np.array([], np.int64)).inputs.shape == (0, 1, 3, 48, 48)


def test_labels_and_names_of_a_mixture_are_those_of_its_sets_told_apart(both):
    mixture, parts = open_samples(both, CONFIG, Cache()), [open_one(uri) for uri in both.uris]
    told: list[int] = []
    found, alone = mixture.labelled(told.append), [part.labelled() for part in parts]
    assert len(told) == len(both.shards)
    for task, samples in found.items():
        assert samples.tolist() == [*alone[0][task], *(40 + alone[1][task])]
    names, own = mixture.names(), [part.names() for part in parts]
    assert names.images == [f"{n}/{image}" for n, part in enumerate(own, 1) for image in part.images]
    assert len(set(own[0].images) & set(own[1].images)) > 0
    assert names.rows.tolist() == [*own[0].rows, *(own[1].rows + (1 << SET_BITS))]
    assert list_rows(names.rows[[40, 0]].tolist()) == f"{own[0].rows[0]}, {own[1].rows[0]} of set 2"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_an_epoch_over_several_sets_reads_every_sample_once_whatever_the_number_of_ranks(both, num_ranks):
    mixture = open_samples(both, CONFIG, Cache())
    order = Order(mixture.group_sizes, 8, 4, 2, seed=3)
    which = {"num_ranks": num_ranks, "workers": 1, "prefetch": 2}
    ranks = [train_batches(mixture, order, epoch=0, start_step=0, rank=rank, **which) for rank in range(num_ranks)]
    steps = [sorted(n for batch in step for n in batch.samples.tolist()) for step in zip(*ranks, strict=True)]
    assert sorted(n for step in steps for n in step) == list(range(64))
    assert steps == [sorted(order.plan(epoch=0, rank=0, num_ranks=1).samples(step).tolist()) for step in range(8)]
    found = [n for rank in range(num_ranks) for batch in eval_batches(mixture, batch=7, rank=rank, **which)
             for n in batch.samples.tolist()]  # fmt: skip
    assert found == list(range(64))


def test_sets_that_do_not_fit_together_are_refused(shards, other):
    train, val = (f"{other}/cropped/{split}" for split in ("train", "val"))
    with pytest.raises(InputError, match=r"view 'cropped_aligned', and .* 'cropped'; sets that are read as one"):
        read_sets([train, f"{shards}/cropped_aligned/train"])
    assert read_sets([train, val]).rows == 40, "TRAIN and VAL are trained on as one where nothing else is scored"
    with pytest.raises(
        InputError, match=r"data\.train: .*cropped/val is an index of split 'val'; expected 'train'; wi"
    ):
        check_pair(read_sets([train, val]), read_sets([val]))
    with pytest.raises(InputError, match="every row would be read twice"):
        read_sets([train, f"{shards}/cropped/train", f"{train}/index.json"])


def test_one_set_or_several_are_given_by_flag_and_in_yaml(tmp_path):
    def parsed(*args: str):
        command = parse_command(CommandConfig, ["--preset", "small", *args], prog="test", description="")
        return config_of(command)

    several = parsed("--data.train", "/a", "/b", "--data.val", "/c")
    assert (several.data.train, several.data.val) == (("/a", "/b"), ("/c",))
    text = dump_yaml(several)
    assert "val: /c\n" in text, "one set is written as before"
    (tmp_path / "config.yaml").write_text(text)
    assert build_config(read_config_file(str(tmp_path / "config.yaml"))) == several
    assert parsed("--config", str(tmp_path / "config.yaml"), "--data.train", "/d").data.train == ("/d",)
    (tmp_path / "one.yaml").write_text("data: {train: /e}")
    assert parsed("--config", str(tmp_path / "one.yaml")).data.train == ("/e",)
    for nothing in ("--data.train=", "--data.val=/c"):
        with pytest.raises(InputError, match=r"--data\.train is not given"):
            open_data(parsed(nothing))


@pytest.mark.whole
def test_a_run_on_several_sets_is_trained_continued_predicted_and_ensembled(shards, other, tmp_path):
    sets = {split: [f"{root}/cropped/{split}" for root in (shards, other)] for split in ("train", "val")}
    command = ["mtl_dist.train", "--local", "--preset", "small", "--run.storage", str(tmp_path), "--run.name", "run"]
    command += ["--data.image-size", "80", "--train.global-batch", "8", "--engine.device", "cpu"]
    data = ["--data.train", *sets["train"], "--data.val", *sets["val"]]
    done = run_here(*command, *data, "--train.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert f"{' and '.join(sets['train'])}: 64 rows of cropped" in done.stdout
    (scored,) = [record["scores"] for record in read_records(f"{tmp_path}/run") if record["kind"] == "eval"]
    expected = read_sets(sets["val"]).labels
    assert (scored["frames"]["va"], scored["frames"]["expr"]) == (expected.va, expected.expr)
    data[1:3] = data[2:0:-1]
    turned = run_here(*command, *data, "--train.epochs", "1")
    assert (turned.returncode, "trained on another training set" in turned.stderr) == (2, True), turned.stderr
    out = tmp_path / "ensemble"
    done = run_here("mtl_dist.ensemble", "--runs", f"{tmp_path}/run", "--out", str(out), "--local", "--folds", "2")
    assert done.returncode == 0, done.stderr
    score = json.loads((out / "score.json").read_text())
    assert score["p"] == pytest.approx(scored["p"], abs=1e-5)
    done = run_here("mtl_dist.report", f"{tmp_path}/run", "--out", str(tmp_path / "report"), "--draws", "5")
    assert done.returncode == 0, done.stderr
