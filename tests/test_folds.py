"""Folds of videos held out of training: who is in which, what a run reads and counts, and out-of-fold members."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import build_config
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import NO_SET, Sets, read_sets
from mtl_dist.data.loader import eval_batches, train_batches
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import Mixture, PartSamples, Samples, open_samples
from mtl_dist.data.video_rows import owners_of, read_rows
from mtl_dist.ensemble.folded import group_members, join_tables
from mtl_dist.errors import InputError
from mtl_dist.features.leaks import _training_videos
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.members import Member, open_member
from mtl_dist.predicting.predictions import PredictionTable, read_predictions
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.weights import Weights, open_weights
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.folds import deal_folds, part_by_fold
from mtl_dist.shards.overlap import find_shared
from mtl_dist.tasks import Batch
from mtl_dist.timeline import video_names
from mtl_dist.training.plan import build_order, open_data, plan_run
from mtl_dist.training.tracking import read_records
from tests.conftest import assert_one_message, run_here, write_dataset, write_features
from tests.test_recipes import config_of

fast = settings(max_examples=60, deadline=None, derandomize=True)
VIDEOS = st.dictionaries(st.text("ab_leftrigh/01", min_size=1, max_size=8), st.integers(1, 30), min_size=3, max_size=25)


def group_of(video: str) -> str:
    return next((video.removesuffix(end) for end in ("_left", "_right") if video.endswith(end)), video)


# ---------------------------------------------------------------------------------------------------------- the dealing


@fast
@given(VIDEOS, st.integers(2, 6), st.randoms(use_true_random=False))
def test_every_video_is_in_one_fold_with_its_other_half_and_folds_differ_by_the_largest_at_most(videos, count, random):
    groups: dict[str, int] = {}
    for video, rows in videos.items():
        groups[group_of(video)] = groups.get(group_of(video), 0) + rows
    names, rows = list(videos), np.array(list(videos.values()))
    if len(groups) < count:
        with pytest.raises(InputError, match=rf"SETS has {len(groups)} video\(s\), too few for {count} folds"):
            deal_folds(names, rows, count, source="SETS")
        return
    folds = deal_folds(names, rows, count, source="SETS")
    assert set(folds.tolist()) == set(range(count))
    fold_of = dict(zip(names, folds.tolist()))
    assert all(len({fold_of[v] for v in names if group_of(v) == group}) == 1 for group in groups)
    filled = np.bincount(folds, weights=rows, minlength=count)
    assert filled.max() - filled.min() <= max(groups.values())
    order = random.sample(range(len(names)), len(names))
    turned = deal_folds([names[place] for place in order], rows[order], count, source="SETS")
    assert turned.tolist() == folds[order].tolist(), "it depends on the order of videos"


def test_pictures_of_one_person_are_in_one_fold():
    images = ["a/1.jpg", "b/1.jpg", "c/1.jpg", "d/1.jpg"]
    owners = owners_of(images, ["person: X", None, "film", "person: X"])
    assert owners == ["person: X", "b", "film", "person: X"]
    folds = deal_folds(owners, np.ones(4, int), 3, source="")
    assert folds[0] == folds[3]
    assert len(set(folds.tolist())) == 3


# ------------------------------------------------------------------------------------------------------- parts of sets


@pytest.fixture(scope="module")
def sets(shards) -> Sets:
    """TRAIN and VAL of a view as one: 40 rows of 5 videos, and 20 of 3."""
    return read_sets([f"{shards}/cropped/{split}" for split in ("train", "val")])


def tiny(shards: Path, storage: Path, name: str, *layers: dict) -> dict:
    """Settings of a run on TRAIN and VAL, without a validation set."""
    joined = {"train": [f"{shards}/cropped/{split}" for split in ("train", "val")], "val": ""}
    return config_of(shards, storage, name, {"data": joined}, *layers)


def rows_of(samples: Samples) -> set[int]:
    return set(samples.names().rows.tolist())


def videos_of(samples: Samples) -> set[str]:
    _, images, videos = samples.names()
    return {own or directory for own, directory in zip(videos, video_names(images))}


def read_all(samples: Samples) -> list[Batch]:
    how = {"rank": 0, "num_ranks": 1, "workers": 0, "prefetch": 1}
    return list(eval_batches(samples, batch=7, **how))


def recount(batches: list[Batch]) -> tuple:
    """Count labels by reading every row."""
    total = {"rows": 0, "va": 0, "expr": np.zeros(8, int), "au": np.zeros(12, int), "on": np.zeros(12, int)}
    for batch in batches:
        labels = batch.labels
        total["rows"] += len(batch.valid_rows())
        total["va"] += int(labels.va_mask.sum())
        total["expr"] += np.bincount(labels.expr[labels.expr_mask].numpy(), minlength=8)
        total["au"] += labels.au_mask.sum((0, 1)).numpy()
        total["on"] += (labels.au * labels.au_mask).sum((0, 1)).int().numpy()
    return total["rows"], total["va"], *(total[name].tolist() for name in ("expr", "au", "on"))


def told(sets: Sets) -> tuple:
    labels = sets.labels
    assert (sets.rows, labels.expr) == (labels.rows, sum(labels.expr_classes))
    return labels.rows, labels.va, labels.expr_classes, labels.au, labels.au_positives


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_fold_and_all_else_part_the_rows_by_video_and_have_the_labels_that_a_recount_finds(sets, shards, number):
    config = tiny(shards, Path("/"), "run")
    parts = part_by_fold(sets, f"{number}/3", Cache())
    train, val = (open_samples(part, config, Cache()) for part in parts)
    assert isinstance(train, Mixture)
    everything = open_samples(sets, config, Cache())
    assert not rows_of(train) & rows_of(val)
    assert rows_of(train) | rows_of(val) == rows_of(everything)
    assert not videos_of(train) & videos_of(val)
    for part, samples in zip(parts, (train, val)):
        batches = read_all(samples)
        assert recount(batches) == told(part)
        assert {row for batch in batches for row in batch.valid_rows()} == rows_of(samples)
        assert samples.group_sizes.sum() == samples.counts.rows == part.rows
        places = [place for batch in batches for place in batch.samples.tolist()]
        assert places == list(range(part.rows))
        for task, numbers in samples.labelled().items():
            masks = [getattr(batch.labels, f"{task}_mask").flatten(1).any(1) for batch in batches]
            assert numbers.tolist() == [n for n, has in enumerate(m for mask in masks for m in mask.tolist()) if has]


def test_folds_together_hold_every_row_once_and_each_has_an_identity_of_its_own(sets, shards):
    config = tiny(shards, Path("/"), "run")
    parts = [part_by_fold(sets, f"{number}/3", Cache()) for number in (1, 2, 3)]
    rows = [row for _, val in parts for row in open_samples(val, config, Cache()).names().rows.tolist()]
    assert sorted(rows) == sorted(rows_of(open_samples(sets, config, Cache())))
    identities = [identity for pair in parts for part in pair for identity in (part.sha256, part.origin)]
    identities += [sets.sha256, part_by_fold(sets, "1/2", Cache())[0].sha256]
    assert len(set(identities)) == len(identities)
    assert all(part.whole.sha256 == sets.sha256 for pair in parts for part in pair)
    assert str(parts[1][1]) == f"fold 2/3 of {sets}"


def test_videos_have_the_same_folds_whatever_the_order_of_the_sets(sets, shards):
    turned, config = read_sets(sets.uris[::-1]), tiny(shards, Path("/"), "run")
    for number in (1, 2, 3):
        one, other = (part_by_fold(each, f"{number}/3", Cache())[1] for each in (sets, turned))
        mine, theirs = (
            sorted(image.partition("/")[2] for image in open_samples(part, config, Cache()).names().images)
            for part in (one, other)
        )
        assert mine == theirs


def test_a_run_holds_out_the_videos_that_features_are_dealt_by(shards):
    uri = f"{shards}/cropped/train"
    rows = read_rows(ShardReader(uri, read_sets([uri]).indexes[0], Cache()))
    folds = deal_folds(rows.owners, rows.num_rows, 3, source="")
    config = tiny(shards, Path("/"), "run")
    for number in (1, 2, 3):
        _, val = part_by_fold(read_sets([uri]), f"{number}/3", Cache())
        samples = open_samples(val, config, Cache())
        assert isinstance(samples, PartSamples)
        assert videos_of(samples) == {video for video, fold in zip(rows.videos, folds) if fold == number - 1}


def test_pictures_that_training_has_too_are_found_across_the_sides_of_a_fold(sets, shards, tmp_path):
    train, val = part_by_fold(sets, "1/3", Cache())
    assert find_shared(train, val).count == 0
    twin = tmp_path / "twin"
    shutil.copytree(f"{shards}/cropped_aligned/train", twin)  # the same videos: they are in the same folds
    both = part_by_fold(read_sets([f"{shards}/cropped_aligned/val", str(twin)]), "1/3", Cache())
    assert find_shared(*both).count == 0
    assert find_shared(both[0], both[0].whole).count > 0


MODES = {
    "masked": {},
    "per_task": {"data": {"sampling": "per_task"}},
    "mix": {"data": {"mix": [0.75, 0.25]}},
    "part": {"data": {"epoch_fraction": 0.5}},
}


@pytest.mark.whole
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(num_ranks=st.integers(1, 5), number=st.integers(1, 3), epoch=st.integers(0, 3))
def test_no_rank_reads_a_row_that_is_held_out_and_all_read_the_rows_of_one(shards, mode, num_ranks, number, epoch):
    config = tiny(
        shards, Path("/"), "run", {"data": {"fold": f"{number}/3"}, "train": {"global_batch": 6}}, MODES[mode]
    )
    data = open_data(config)
    samples, held_out = (open_samples(part, config, Cache()) for part in (data.train, data.val))
    order = build_order(config, data, samples)
    how = {"epoch": epoch, "start_step": 0, "workers": 0, "prefetch": 1}

    def steps(count: int) -> list[list[int]]:
        ranks = [train_batches(samples, order, rank=rank, num_ranks=count, **how) for rank in range(count)]
        return [sorted(row for batch in step for row in batch.valid_rows()) for step in zip(*ranks, strict=True)]

    found = steps(num_ranks)
    assert found == steps(1)
    read = [row for step in found for row in step]
    assert len(found) == data.steps_per_epoch
    assert set(read) <= rows_of(samples)
    assert not set(read) & rows_of(held_out)
    if mode == "masked":
        assert len(set(read)) == len(read) == data.num_samples // 6 * 6


def test_windows_of_features_are_of_the_videos_that_are_not_held_out(tmp_path):
    lengths = {"train": [9, 14, 5, 20, 7, 8], "val": [11, 6, 13]}
    source = {"train": "a" * 64, "val": "d" * 64}
    uris = [
        str(write_features(tmp_path / split, of_split, split=split, source=source[split], seed=number))
        for number, (split, of_split) in enumerate(lengths.items())
    ]
    sequence = {"window": 6, "dims": [6], "context": 2}
    base = {
        "data": {"train": uris, "fold": "2/3", "workers": 0},
        "model": {"name": "c", "backbone": "features", "sequence": sequence},
        "train": {"global_batch": 2},
    }
    seen: list[set[int]] = []
    for number in (1, 2, 3):
        config = build_config(base, {"data": {"fold": f"{number}/3"}})
        data = open_data(config)
        train, val = (open_samples(part, config, Cache()) for part in (data.train, data.val))
        assert (recount(read_all(train)), recount(read_all(val))) == (told(data.train), told(data.val))
        assert not rows_of(train) & rows_of(val)
        assert len(rows_of(train) | rows_of(val)) == sum(map(sum, lengths.values()))
        # The sets name their videos alike: v0 of one is v0 of the other, and in its fold.
        assert not {v.partition("/")[2] for v in videos_of(train)} & {v.partition("/")[2] for v in videos_of(val)}
        order = build_order(config, data, train)
        rows = [
            row
            for rank in range(2)
            for batch in train_batches(
                train, order, epoch=1, start_step=0, rank=rank, num_ranks=2, workers=0, prefetch=1
            )
            for row in batch.valid_rows()
        ]
        assert set(rows) <= rows_of(train)
        assert len(rows) == len(set(rows))
        seen.append(rows_of(val))
        assert data.train.video_rows.sum() + data.val.video_rows.sum() == sum(map(sum, lengths.values()))
        np.testing.assert_allclose(data.train.statistics, data.train.whole.statistics)
    assert sum(map(len, seen)) == len(set.union(*seen)) == sum(map(sum, lengths.values()))


def test_windows_of_pictures_are_of_the_videos_that_are_not_held_out(sets):
    model = {"name": "c", "backbone": "small", "sequence": {"window": 4}}
    data = {"train": sets.uris, "fold": "3/3", "image_size": 80, "workers": 0}
    config = build_config({"data": data, "model": model, "train": {"global_batch": 2}})
    found = open_data(config)
    train, val = (open_samples(part, config, Cache()) for part in (found.train, found.val))
    assert (recount(read_all(train)), recount(read_all(val))) == (told(found.train), told(found.val))
    pictures = open_samples(found.val, build_config({"model": {"backbone": "small"}}), Cache())
    assert rows_of(val) == rows_of(pictures)
    assert not rows_of(train) & rows_of(val)
    order, how = build_order(config, found, train), {"start_step": 0, "workers": 0, "prefetch": 1}
    batches = train_batches(train, order, epoch=0, rank=0, num_ranks=1, **how)
    rows = [row for batch in batches for row in batch.valid_rows()]
    assert set(rows) <= rows_of(train)
    assert len(set(rows)) == len(rows) > 0


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fold", "words"),
    [("2", "expected K/N, such as 2/5"), ("a/3", "K/N, such as"), ("0/3", "K from 1 to N"), ("4/3", "K from 1 to N"),
     ("1/1", "N from 2 to 1000"), ("1/9999", "N from 2"), ("-1/3", "K/N, such as")],
)  # fmt: skip
def test_a_fold_that_is_none_is_refused(fold, words):
    with pytest.raises(InputError, match=rf"data.fold is '{fold}': .*{words}"):
        build_config({"data": {"fold": fold}})


def test_a_fold_and_a_validation_set_clash(shards, tmp_path):
    with pytest.raises(InputError, match=r"data.fold is 1/3, .*data.val is /val; leave one of them out"):
        build_config({"data": {"fold": "1/3", "val": "/val"}})
    config = tiny(shards, tmp_path, "run", {"data": {"fold": "1/9"}})
    with pytest.raises(InputError, match=r"cropped/val has 8 video\(s\), too few for 9 folds"):
        open_data(config)


def test_a_plan_says_what_is_held_out_and_that_nothing_is_scored(shards, sets, tmp_path):
    plan = str(plan_run(tiny(shards, tmp_path, "run", {"data": {"fold": "2/3"}})))
    train, val = part_by_fold(sets, "2/3", Cache())
    assert f"train   all but fold 2/3 of {sets}: {train.rows} rows of cropped, labelled va {train.labels.va}," in plan
    assert f"val     fold 2/3 of {sets}: {val.rows} rows, labelled va {val.labels.va}, " in plan
    plan = str(plan_run(tiny(shards, tmp_path, "run")))
    assert f"train   {sets}: 60 rows of cropped" in plan
    assert "val     no validation set: no score; for a score give --data.val, or hold a fold of the videos out" in plan
    assert "not scored" not in plan


def test_a_mixture_one_of_whose_sets_is_held_out_as_a_whole_is_refused(tmp_path):
    source = write_dataset(tmp_path / "source", num_train=24, num_val=8)  # the latter are one video, v0
    create(str(source), str(tmp_path / "shards"), views=("cropped",), frames_per_shard=5, jobs=1)
    joined = read_sets([f"{tmp_path}/shards/cropped/{split}" for split in ("train", "val")])
    of_val = [part_by_fold(joined, f"{number}/4", Cache())[0].label_counts[1].rows for number in (1, 2, 3, 4)]
    assert sorted(of_val) == [0, 8, 8, 8]
    layer = {"data": {"fold": f"{of_val.index(0) + 1}/4", "mix": [0.5, 0.5]}}
    with pytest.raises(InputError, match=r"data.mix gives 4 of .* rows to .*cropped/val, and a pass over it has 0: "):
        open_data(tiny(tmp_path / "shards", tmp_path, "run", layer))


def test_settings_of_scores_are_unread_without_a_validation_set(shards):
    args = ["--preset", "small", "--dry-run", "--local", "--data.train", f"{shards}/cropped/train"]
    done = run_here("mtl_dist.train", *args, "--train.eval-batch", "3")
    assert_one_message(done, "train.eval_batch is 3, and nothing reads it: there is no validation set")


# ----------------------------------------------------------------------------------------------------- members of folds


def make_member(fold: str, *layers: dict, uri: str = "", sha: str = "a") -> Member:
    """A run of a fold, as far as grouping looks at it."""
    whole = SimpleNamespace(origin=sha, rows=4)
    val = SimpleNamespace(view="cropped", whole=whole)
    weights = Weights(None, build_config({"data": {"fold": fold, "train": "/t"}}, *layers), {}, "cropped", 1)
    return Member(uri or f"runs/{fold}", weights, val)


def test_runs_of_all_folds_are_one_member_for_every_recipe():
    other = {"loss": {"expr_prior": 1.0}}
    runs = {
        "b-2": make_member("2/2", other), "a-1": make_member("1/2"), "b-1": make_member("1/2", other),
        "a-2": make_member("2/2", {"train": {"eval_batch": 3}, "data": {"workers": 0}}),
    }  # fmt: skip
    assert group_members(runs, taken=()) == {"b": ("b-1", "b-2"), "a": ("a-1", "a-2")}
    alone = {name: make_member("") for name in "xy"}
    assert group_members(alone, taken=()) == {"x": ("x",), "y": ("y",)}


def test_runs_that_began_with_one_of_their_fold_each_are_one_member_and_two_beginnings_are_two():
    def begun(fold: str, start: str) -> Member:
        return make_member(fold, {"run": {"start": start}})

    runs = {"x": begun("1/2", "/first-1"), "y": begun("2/2", "/first-2")}
    assert group_members(runs, taken=()) == {"x": ("x", "y")}
    runs = {f"{start}{fold[0]}": begun(fold, f"/{start}") for fold in ("1/2", "2/2") for start in "mn"}
    assert group_members(runs, taken=("m",)) == {"m-2": ("m1", "m2"), "n": ("n1", "n2")}


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"a": ("1/3", {}), "b": ("3/3", {})}, "runs/a of 1/3, runs/b of 3/3: there is no run of fold 2/3 of "),
        ({"a": ("1/2", {}), "b": ("2/2", {}), "c": ("2/2", {})}, "runs/b and runs/c are all of fold 2/2 of .*name one"),
        ({"a": ("1/2", {}), "b": ("2/2", {"run": {"seed": 3}})}, "of 2/2, are not of one .*: run.seed is 0 and 3"),
        ({"a": ("1/2", {}), "b": ("2/3", {})}, "runs/a of 1/2: there is no run of fold 2/2"),
    ],
)  # fmt: skip
def test_a_missing_or_doubled_fold_is_one_message(runs, words):
    members = {name: make_member(fold, layer, uri=f"runs/{name}") for name, (fold, layer) in runs.items()}
    with pytest.raises(InputError, match=words):
        group_members(members, taken=())


def make_table(rows: list[int], seed: int) -> PredictionTable:
    rng, n = np.random.default_rng(seed), len(rows)
    predictions = Predictions(rng.uniform(-1, 1, (n, 2)), rng.dirichlet(np.ones(8), n), rng.random((n, 12)))
    none = np.zeros((n, 12))
    targets = Targets(none[:, :2], np.array(rows) % 8, none, none[:, 0] > 0, none[:, 0] == 0, none > 0)
    images = [f"v{row}/1.jpg" for row in rows]
    return PredictionTable(PredictedRows(np.array(rows), predictions, targets), images, [f"v{row}" for row in rows])


def test_tables_of_folds_become_one_in_the_order_of_rows_and_must_hold_every_row_once():
    one, other = make_table([1, 4, 6], 1), make_table([0, 5], 2)
    joined = join_tables([one, other], rows=5)
    assert joined.predicted.rows.tolist() == [0, 1, 4, 5, 6]
    assert joined.videos == ["v0", "v1", "v4", "v5", "v6"]
    assert joined.images[3] == "v5/1.jpg"
    np.testing.assert_array_equal(joined.predicted.predictions.au[[1, 2, 4]], one.predicted.predictions.au)
    np.testing.assert_array_equal(joined.predicted.predictions.va[[0, 3]], other.predicted.predictions.va)
    assert joined.predicted.targets.expr.tolist() == [0, 1, 4, 5, 6]
    assert join_tables([one], rows=99) is one
    for tables, rows in (([one, other], 6), ([one, make_table([4, 5], 2)], 5)):
        with pytest.raises(InputError, match="they do not part the sets"):
            join_tables(tables, rows=rows)


# ----------------------------------------------------------------------------------------------------------- whole runs


def flags(shards: Path, storage: Path, name: str, *more: str) -> list[str]:
    return [
        "mtl_dist.train", "--local", "--preset", "small", "--run.storage", str(storage), "--run.name", name,
        "--data.train", f"{shards}/cropped/train", f"{shards}/cropped/val", "--train.global-batch", "8",
        "--train.epochs", "1", "--data.image-size", "80", "--engine.threads", "1", "--optim.warmup-steps", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folded(shards, tmp_path_factory) -> Path:
    """Two runs, each on TRAIN and VAL without a half of their videos."""
    storage = tmp_path_factory.mktemp("folded")
    for number in (1, 2):
        done = run_here(*flags(shards, storage, f"fold-{number}", "--data.fold", f"{number}/2"))
        assert done.returncode == 0, done.stderr
        assert f"fold-{number} RUNS_OF_OTHER_FOLDS --out" in done.stdout
    return storage


@pytest.mark.whole
def test_runs_of_two_folds_are_a_member_whose_predictions_are_those_of_each_on_its_own_fold(folded, dataset, tmp_path):
    runs = [f"{folded}/fold-{number}" for number in (2, 1)]
    (tmp_path / "list.txt").write_text("image\nv0/00000.jpg\nt1/00008.jpg\n")
    test = ["--test-list", str(tmp_path / "list.txt"), "--test-root", str(dataset)]
    done = run_here(
        "mtl_dist.ensemble", "--runs", *runs, "--out", str(tmp_path / "out"), "--local", "--folds", "3", *test
    )
    assert done.returncode == 0, done.stderr
    assert "60 rows, out of fold" in done.stdout
    report = json.loads((tmp_path / "out/score.json").read_text())
    assert list(report["scores"]) == ["constant predictor", "fold", "ensemble"]
    assert [(m["name"], m["member"], m["fold"]) for m in report["members"]] == [
        ("fold-1", "fold", "1/2"),
        ("fold-2", "fold", "2/2"),
    ]
    found = read_predictions(f"{tmp_path}/out/predictions.parquet")
    own = [read_predictions(f"{tmp_path}/out/members/fold-{number}.parquet") for number in (1, 2)]
    by_hand = {}
    for table in own:
        for place, row in enumerate(table.predicted.rows.tolist()):
            by_hand[row] = [array[place] for array in (*table.predicted.predictions, *table.predicted.targets)]
    assert len(by_hand) == sum(len(table.images) for table in own) == 60
    assert found.predicted.rows.tolist() == sorted(by_hand)
    columns = zip(*(by_hand[row] for row in sorted(by_hand)))
    for mine, theirs in zip((*found.predicted.predictions, *found.predicted.targets), columns):
        np.testing.assert_array_equal(mine, np.array(theirs))
    assert report["p"] == scores(metric_sums(found.predicted.predictions, found.predicted.targets))["p"]
    videos = [video for fold in report["calibration"]["folds"] for video in fold["scored_videos"]]
    assert sorted(videos) == sorted([*(f"1/t{n}" for n in range(5)), *(f"2/v{n}" for n in range(3))])
    # What each said of its fold in training is what it says here.
    for number, table in zip((1, 2), own):
        (scored,) = [r["scores"] for r in read_records(f"{folded}/fold-{number}") if r["kind"] == "eval"]
        assert scores(metric_sums(table.predicted.predictions, table.predicted.targets))["p"] == pytest.approx(
            scored["p"]
        )
    # Without calibration the test list has the mean of both.
    done = run_here("mtl_dist.ensemble", "--runs", *runs, "--out", str(tmp_path / "out"), "--local", "--steps", *test)
    assert done.returncode == 0, done.stderr
    tested = pq.read_table(tmp_path / "out/test_predictions.parquet")
    both = [read_predictions(f"{tmp_path}/out/members/test/fold-{n}.parquet").predicted.predictions for n in (1, 2)]
    assert not np.array_equal(both[0].va, both[1].va)
    np.testing.assert_allclose(tested["valence"], (both[0].va + both[1].va)[:, 0] / 2, rtol=1e-6)
    np.testing.assert_allclose(tested["p_AU1"], (both[0].au + both[1].au)[:, 0] / 2, rtol=1e-6)


@pytest.mark.whole
def test_what_runs_of_folds_cannot_be_ensembled_or_continued_as_is_refused(folded, shards, runs, tmp_path):
    one, two = (f"{folded}/fold-{number}" for number in (1, 2))
    out = ["--out", str(tmp_path / "out"), "--local"]
    assert_one_message(run_here("mtl_dist.ensemble", "--runs", one, *out), f"{one} of 1/2: there is no run of fold 2/2")
    done = run_here("mtl_dist.ensemble", "--runs", one, f"{runs}/cropped", *out)
    assert_one_message(done, "scored on fold 1/2 of", "ensemble them apart")
    done = run_here("mtl_dist.ensemble", "--runs", one, two, "--each-task", *out)
    assert_one_message(done, "--each-task", "leave it out")
    shutil.copytree(one, tmp_path / "fold-1")
    done = run_here(*flags(shards, tmp_path, "fold-1", "--data.fold", "2/2"))
    assert_one_message(done, "data.fold '1/2'", "the configuration says '2/2'")
    done = run_here(*flags(shards, tmp_path, "fold-1"))
    assert_one_message(done, "data.fold '1/2'", "says ''")
    assert not (tmp_path / "out").exists()


@pytest.mark.whole
def test_a_fold_is_held_out_of_a_run_on_every_number_of_ranks_and_reported(folded, shards, tmp_path):
    member = open_member(f"{folded}/fold-1")
    state = json.loads(next(Path(folded).glob("fold-1/checkpoints/*/state.json")).read_text())
    assert state["identity"] == {
        "training set": part_by_fold(member.val.whole, "1/2", Cache())[0].sha256,
        "validation set": member.val.sha256,
    }
    done = run_here("mtl_dist.report", f"{folded}/fold-1", "--out", str(tmp_path / "report"), "--draws", "5")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report/report.html").read_text()
    assert "fold 1/2 of" in page
    assert "all but fold 1/2 of" in page
    network = SimpleNamespace(is_file=False, uri=f"{folded}/fold-1")
    held_out = videos_of(open_samples(member.val, member.weights.config, Cache()))
    everyone = {*(f"1/t{number}" for number in range(5)), *(f"2/v{number}" for number in range(3))}
    assert {video.partition("/")[2] for video in everyone - held_out} == _training_videos(network, None)
    done = run_here("mtl_dist.report", f"{folded}/fold-1", f"{folded}/fold-2", "--out", str(tmp_path / "two"))
    assert_one_message(done, "cannot be compared", "report them apart")


# ------------------------------------------------------------------------------------------------- no validation at all


@pytest.fixture(scope="module")
def unscored(shards, tmp_path_factory) -> Path:
    """A run of two epochs on TRAIN and VAL, without scores; returns its storage."""
    storage = tmp_path_factory.mktemp("unscored")
    more = ("--train.epochs", "2", "--checkpoint.every-steps", "5", "--checkpoint.keep-last", "3")
    done = run_here(*flags(shards, storage, "all", *more))
    assert done.returncode == 0, done.stderr
    assert "val     no validation set: no score; for a score give --data.val" in done.stdout
    (last,) = [c.uri for c in committed(f"{storage}/all")[0] if c.step == 14]
    assert f"run {storage}/all: no validation set: no score\nlast    {last}\n" in done.stdout
    assert "mtl_dist.ensemble" not in done.stdout
    return storage


@pytest.mark.whole
def test_a_run_without_a_validation_set_saves_as_others_do_and_its_last_checkpoint_is_what_predicts(
    unscored, dataset, tmp_path
):
    run = f"{unscored}/all"
    found, _ = committed(run)
    assert [(checkpoint.step, checkpoint.scores) for checkpoint in found] == [(7, {}), (10, {}), (14, {})]
    assert {record["kind"] for record in read_records(run)} == {"step", "pace"}
    weights = open_weights(run)
    assert (weights.checkpoint.step, weights.is_scored, weights.is_finished) == (14, False, True)
    assert weights.state["identity"]["validation set"] == NO_SET
    out = tmp_path / "out.csv"
    done = run_here("mtl_dist.predict", "--runs", run, "--input", str(dataset / "cropped/v0"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) > 5
    done = run_here("mtl_dist.export", run, "--out", str(tmp_path / "exported"), "--formats", "safetensors")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "exported/README.md").read_text()
    assert "No validation set: no score." in card
    assert "- validation set: none\n" in card


@pytest.mark.whole
def test_status_and_report_of_a_run_without_a_validation_set_say_so(unscored, runs, tmp_path):
    run = f"{unscored}/all"
    done = run_here("mtl_dist.train", "--status", run)
    assert done.returncode == 0, done.stderr
    assert "scores       no validation set: no score" in done.stdout
    done = run_here("mtl_dist.report", run, "--out", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report/report.html").read_text()
    assert "No validation set: no score. What is shown is how these runs were trained" in page
    assert "--data.fold K/N" in page
    assert len((tmp_path / "report/figures/loss.csv").read_text().splitlines()) == 1 + 14
    done = run_here("mtl_dist.report", run, f"{runs}/cropped", "--out", str(tmp_path / "both"))
    assert_one_message(done, f"{run}: no validation set: no score, and other runs have one; report them apart")


@pytest.mark.whole
def test_what_needs_a_score_refuses_a_run_without_a_validation_set(unscored, shards, tmp_path):
    run, how = f"{unscored}/all", "for a score give --data.val, or hold a fold of the videos out: --data.fold K/N"
    done = run_here("mtl_dist.ensemble", "--runs", run, "--out", str(tmp_path / "out"), "--local")
    assert_one_message(done, f"run {run} has no validation set: no score; {how}")
    own = flags(shards, tmp_path, "x")[2:]
    done = run_here("tune.search", *own, "--search.name", "s", "--search.trials", "2", "--dry-run")
    assert_one_message(done, f"trials compete by search.metric p, and there is no validation set: no score; {how}")
    done = run_here("tune.population", *own, "--population.name", "p", "--dry-run", "--population.generations", "1")
    assert_one_message(done, f"runs compete by population.metric p, and there is no validation set: no score; {how}")


@pytest.mark.whole
def test_a_run_without_a_validation_set_goes_on_and_gets_none_later(unscored, shards, tmp_path):
    shutil.copytree(f"{unscored}/all", tmp_path / "all")
    more = ("--train.epochs", "2", "--checkpoint.every-steps", "5", "--checkpoint.keep-last", "3")
    done = run_here(*flags(shards, tmp_path, "all", *more))
    assert done.returncode == 0, done.stderr
    assert "is finished (step 14 of 14)" in done.stdout
    args = flags(shards, tmp_path, "all", *more)
    args.remove(f"{shards}/cropped/val")
    scored = run_here(*args, "--data.val", f"{shards}/cropped/val")
    assert_one_message(scored, "trained on another training set")
    done = run_here(*flags(shards, tmp_path, "all", *more, "--data.fold", "1/2"))
    assert_one_message(done, "data.fold ''", "says '1/2'")
