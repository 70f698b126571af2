"""The final job: members found, paired by row, averaged, scored; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save

from mtl_dist import storage
from mtl_dist.data.index import read_index
from mtl_dist.ensemble.__main__ import main
from mtl_dist.ensemble.by_task import choose_by_task
from mtl_dist.ensemble.calibrated import calibrate
from mtl_dist.ensemble.gains import render_gains
from mtl_dist.ensemble.job import combine
from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.errors import InputError
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.calibration import STEPS, TASKS_OF
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predict import __main__ as predict
from mtl_dist.predicting import ensembling
from mtl_dist.predicting.cluster import TaskFailed
from mtl_dist.predicting.ensembling import FORMAT, TEST, VAL, MemberOptions, _key_of, map_here, table_name
from mtl_dist.predicting.members import open_member, predict_member
from mtl_dist.predicting.predictions import PredictionTable, read_predictions
from mtl_dist.predicting.submission import TestImages, find_images, submission_text
from mtl_dist.report.gains import gains_tables
from mtl_dist.report.results import ENSEMBLE, Result
from mtl_dist.runs import weights
from mtl_dist.runs.checkpoint import best, committed, read_tensors
from mtl_dist.runs.weights import load_weights
from mtl_dist.sealed import seal, unseal
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.annotations import FILES, read_annotations
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from tests.conftest import assert_one_message, run_here, write_dataset
from tests.test_training import train


def make_predicted(rows: np.ndarray, seed: int) -> PredictedRows:
    rng = np.random.default_rng(seed)
    n = len(rows)
    predictions = Predictions(rng.uniform(-1, 1, (n, 2)), rng.dirichlet(np.ones(8), n), rng.random((n, 12)))
    none = np.zeros((n, 12))
    targets = Targets(none[:, :2], rows % 8, none, none[:, 0] > 0, none[:, 0] == 0, none > 0)
    return PredictedRows(rows, predictions, targets)


def test_probabilities_and_va_are_averaged():
    members = [make_predicted(np.arange(20), seed) for seed in (1, 2)]
    found = combine(members)
    for mine, first, second in zip(found.predictions, members[0].predictions, members[1].predictions):
        np.testing.assert_allclose(mine, (first + second) / 2)


def test_rows_that_do_not_pair_are_an_error_that_names_them():
    with pytest.raises(InputError, match=r"\[19, 20\]"):
        combine([make_predicted(np.arange(20), 1), make_predicted(np.r_[0:19, 20], 1)])
    members = [make_predicted(np.arange(20), seed) for seed in (1, 2)]
    other = members[1]._replace(targets=members[1].targets._replace(expr=members[1].targets.expr + 1))
    with pytest.raises(InputError, match="labels differ"):
        combine([members[0], other])


def ensemble(*args) -> subprocess.CompletedProcess[str]:
    return run_here("mtl_dist.ensemble", *map(str, args))


def files_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rewrite(run: Path, name: str, content: bytes) -> None:
    """Replace a file of a run's best checkpoint, as if training had written it."""
    uri = Path(best(committed(str(run))[0]).uri)
    (uri / name).write_bytes(content)
    commit = unseal((uri / "COMMIT.json").read_bytes())
    commit["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (uri / "COMMIT.json").write_bytes(seal(commit))


def rewrite_state(run: Path, **changes) -> None:
    state = json.loads((Path(best(committed(str(run))[0]).uri) / "state.json").read_text())
    rewrite(run, "state.json", json.dumps(state | changes).encode())


def write_test_list(path: Path, dataset: Path) -> list[str]:
    """A list of the validation images in another order, some twice."""
    names = [*read_annotations(dataset / FILES["val"]).images[::-1], "v0/00003.jpg"]
    path.write_text("\n".join(["image,valence,arousal,expression,aus", *names]) + "\n")
    return names


def test_the_job_writes_everything_twice_the_same_and_reads_each_checkpoint_once(runs, dataset, tmp_path, monkeypatch):
    names = write_test_list(tmp_path / "list.txt", dataset)
    args = ["--runs", *(f"{runs}/{view}" for view in VIEWS), "--test-list", tmp_path / "list.txt"]
    args += ["--test-root", dataset, "--out"]
    done = ensemble(*args, tmp_path / "first")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "first/score.json").read_text())
    assert list(report["scores"]) == ["constant predictor", *VIEWS, "ensemble"]
    assert report["p"] == report["scores"]["ensemble"]["p"]
    for view, member in zip(VIEWS, report["members"]):
        chosen = best(committed(f"{runs}/{view}")[0])
        assert member["checkpoint"] == chosen.uri
        # The job and the training run score one checkpoint alike, whatever batches they predicted it in.
        assert report["scores"][view]["p"] == pytest.approx(chosen.score, abs=1e-4)
        own = read_predictions(f"{tmp_path}/first/{member['predictions']}").predicted
        assert scores(metric_sums(own.predictions, own.targets)) == report["scores"][view]

    # The plain mean, as it is scored; then calibrated out of fold, as the last step is.
    mean = read_predictions(f"{tmp_path}/first/predictions.parquet")
    assert mean.predicted.rows.tolist() == list(range(20))
    assert all(re.fullmatch(r"v\d/\d{5}\.jpg", image) for image in mean.images)
    assert scores(metric_sums(mean.predicted.predictions, mean.predicted.targets))["p"] == pytest.approx(report["p"])
    assert list(report["steps"]) == ["plain mean", "+ temperature", "+ weights", "+ thresholds", "+ smoothing"]
    assert report["steps"]["plain mean"]["p"] == pytest.approx(report["p"])
    assert report["steps"]["+ smoothing"]["p"] == report["p_calibrated"]
    folds = report["calibration"]["folds"]
    assert sorted(video for fold in folds for video in fold["scored_videos"]) == ["v0", "v1", "v2"]
    table = pq.read_table(tmp_path / "first/calibrated.parquet")
    fold_of = dict(zip([image.split("/")[0] for image in table["image"].to_pylist()], table["fold"].to_pylist()))
    assert [sorted(v for v, fold in fold_of.items() if fold == n) for n in range(3)] == [
        fold["scored_videos"] for fold in folds
    ]
    assert "what each step adds" in (tmp_path / "first/table.txt").read_text()

    # One line a line of the list: the validation images again, by parameters fitted on all rows.
    lines = (tmp_path / "first/submission.txt").read_text().splitlines()
    assert lines[0] == "image,valence,arousal,expression,aus"
    assert [line.split(",")[0] for line in lines[1:]] == names
    assert {len(line.split(",")) for line in lines[1:]} == {16}
    assert len({line for line in lines if line.startswith("v0/00003.jpg")}) == 1
    tested = {row["image"]: row for row in pq.read_table(tmp_path / "first/test_predictions.parquet").to_pylist()}
    thresholds = report["calibration"]["parameters"]["thresholds"]
    for line in lines[1:]:
        image, valence, _, expression, *aus = line.split(",")
        assert float(valence) == pytest.approx(tested[image]["valence"], abs=6e-5)
        assert EXPRESSIONS[int(expression)] == tested[image]["expression"]
        assert [int(au) for au in aus] == [tested[image][f"p_{name}"] > t for name, t in thresholds.items()]

    read = []
    monkeypatch.setattr(weights, "read_tensors", lambda of, name: read.append(of.uri) or read_tensors(of, name))
    main([*map(str, args), str(tmp_path / "second")])
    assert read == [member["checkpoint"] for member in report["members"]]
    assert files_below(tmp_path / "first") == files_below(tmp_path / "second")

    # Another ensemble in the same place: nothing of the first is left to be taken for its.
    main(["--runs", *(f"{runs}/{view}" for view in VIEWS), "--steps", "--out", str(tmp_path / "second")])
    left = {path.name for path in (tmp_path / "second").iterdir()}
    assert left == {"score.json", "table.txt", "predictions.parquet", "members"}


def test_an_interrupted_ensemble_continues_with_the_members_it_has(runs, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--runs", f"{runs}/cropped", f"{runs}/cropped_aligned", "--steps", "--out", str(out)]
    main(args)
    before = files_below(out)
    (out / "members/cropped.parquet").write_bytes(before["members/cropped.parquet"][:-100])
    main(args)
    assert "1 of 2 member(s) predicted already" in capsys.readouterr().out
    assert files_below(out) == before
    report = json.loads((out / "score.json").read_text())
    assert (report["steps"], report["calibration"], report["p_calibrated"]) == ({}, None, None)
    kept = {f"members/{view}.parquet" for view in VIEWS}
    assert set(before) == {"score.json", "table.txt", "predictions.parquet"} | kept


@pytest.fixture
def half_a_test_list(dataset, tmp_path) -> list[str]:
    """Flags of a test list whose second image is cut short."""
    shutil.copytree(dataset / "cropped/v0", tmp_path / "cropped/v0")
    image = tmp_path / "cropped/v0/00001.jpg"
    image.write_bytes(image.read_bytes()[:300])
    (tmp_path / "list.txt").write_text("image\nv0/00000.jpg\nv0/00001.jpg\n")
    return ["--test-list", str(tmp_path / "list.txt"), "--test-root", str(tmp_path), "--out", str(tmp_path / "out")]


def count_predicted(monkeypatch) -> list[str]:
    """Return a list that the names of members come to whose validation sets are predicted."""
    predicted = []

    def counted(member, **options):
        predicted.append(member.run_uri)
        return predict_member(member, **options)

    monkeypatch.setattr(ensembling, "predict_member", counted)
    return predicted


def test_a_bad_test_image_leaves_what_the_member_predicted_before(
    runs, dataset, tmp_path, half_a_test_list, monkeypatch
):
    args, out = ["--runs", f"{runs}/cropped", *half_a_test_list], tmp_path / "out"
    predicted = count_predicted(monkeypatch)
    assert_one_message(run_here("mtl_dist.ensemble", *args), "v0/00001.jpg cannot be decoded", "predicted is kept")
    kept = files_below(out)
    assert set(kept) == {"members/cropped.parquet"}
    shutil.copy(dataset / "cropped/v0/00001.jpg", tmp_path / "cropped/v0")
    main(args)
    assert predicted == [f"{runs}/cropped"]
    assert kept.items() < files_below(out).items()
    assert len((out / "submission.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_test_list_that_fails_otherwise_is_tried_again_without_the_validation_set(
    runs, tmp_path, half_a_test_list, monkeypatch, retries
):
    tries, predicted = [], count_predicted(monkeypatch)

    def lost(paths, **options):
        tries.append(paths)
        raise OSError("the disk is gone")

    monkeypatch.setattr(ensembling, "image_batches", lost)
    with pytest.raises(InputError, match=rf"cropped could not .*OSError: the disk is gone.*tried {retries + 1} time"):
        main(["--runs", f"{runs}/cropped", *half_a_test_list, "--retries", str(retries)])
    assert len(tries) == retries + 1
    assert predicted == [f"{runs}/cropped"]
    assert set(files_below(tmp_path / "out")) == {"members/cropped.parquet"}


def test_frames_without_a_picture_have_what_is_known_of_them(runs, dataset, tmp_path, capsys):
    listed = ["v0/00001.jpg", "v0/00002.jpg", "v0/00003.jpg", "v0/00000.jpg", "v1/00000.jpg"]
    (tmp_path / "list.txt").write_text("image,valence,arousal,expression,aus\n" + "".join(f"{n}\n" for n in listed))
    for view, names in (("cropped", [listed[0], listed[4]]), ("cropped_aligned", [listed[0], listed[1], listed[4]])):
        for name in names:
            (tmp_path / view / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dataset / view / f"v0/0000{listed.index(name) % 3}.jpg", tmp_path / view / name)
    (tmp_path / "cropped" / listed[3]).write_bytes(b"no picture")
    both = ["--runs", f"{runs}/cropped", f"{runs}/cropped_aligned", "--steps"]
    args = [*both, "--test-root", str(tmp_path), "--test-list", f"{tmp_path}/list.txt", "--out", f"{tmp_path}/out"]
    with pytest.raises(InputError, match=r"2 of 5 listed images are not in .*/cropped: .*--skip-bad-images"):
        main(args)
    capsys.readouterr()
    main([*args, "--skip-bad-images"])
    said = capsys.readouterr().out
    assert "note: 1 of 5 frames have a picture in one view alone" in said
    assert "2 of 5 frames have no picture, such as v0/00003.jpg: 1 have the values of the last frame before" in said
    lines = dict(line.split(",", 1) for line in (tmp_path / "out/submission.txt").read_text().splitlines()[1:])
    assert list(lines) == listed
    assert lines["v0/00003.jpg"] == lines["v0/00002.jpg"] != lines["v0/00001.jpg"]
    assert lines["v0/00000.jpg"] == "0.0000,0.0000,0," + ",".join("0" * 12)
    one = read_predictions(f"{tmp_path}/out/members/test/cropped_aligned.parquet").predicted
    assert lines["v0/00002.jpg"].startswith(",".join(f"{value:.4f}" for value in one.predictions.va[1] + 0.0))
    shutil.rmtree(tmp_path / "cropped" / "v0")
    with pytest.raises(InputError, match=r"4 of 5 listed images are not in .*/cropped: "):
        main([*args, "--skip-bad-images"])


def test_predictions_of_test_images_of_before_exif_was_read_do_not_hold(runs):
    member, files = open_member(f"{runs}/cropped"), best(committed(f"{runs}/cropped")[0]).files
    before = {"format": FORMAT, "model": files["model.safetensors"]["sha256"], "state": files["state.json"]["sha256"]}
    how = MemberOptions(64, 0, "cpu", None, 1, 0, 0, True, False)
    keys = [hashlib.sha256(json.dumps(before | {"test": "of images"}).encode()).hexdigest()]
    keys += [_key_of(member, TestImages([], "of images"), how._replace(exif=exif)) for exif in ("apply", "ignore")]
    assert len(set(keys)) == 3


def test_several_members_of_one_view_and_a_single_one_are_ensembles(runs, tmp_path):
    """The second is another training by its weights, and has the same name."""
    shutil.copytree(runs / "cropped", tmp_path / "cropped")
    weights = load_file(f"{best(committed(f'{runs}/cropped')[0]).uri}/model.safetensors")
    other = {name: 0.9 * value for name, value in weights.items() if name.endswith("weight")}
    rewrite(tmp_path / "cropped", "model.safetensors", save(weights | other))
    main(["--runs", f"{runs}/cropped", f"{tmp_path}/cropped", "--folds", "2", "--out", f"{tmp_path}/two"])
    report = json.loads((tmp_path / "two/score.json").read_text())
    assert list(report["scores"]) == ["constant predictor", "cropped", "cropped-2", "ensemble"]
    first, second = (read_predictions(f"{tmp_path}/two/members/{n}.parquet") for n in ("cropped", "cropped-2"))
    mean = read_predictions(f"{tmp_path}/two/predictions.parquet").predicted.predictions
    assert not np.array_equal(first.predicted.predictions.expr, second.predicted.predictions.expr)
    for mine, one, other in zip(mean, first.predicted.predictions, second.predicted.predictions):
        np.testing.assert_allclose(mine, (one + other) / 2, atol=1e-6)
    assert len(report["calibration"]["folds"]) == 2
    main(["--runs", f"{tmp_path}/cropped", "--out", f"{tmp_path}/one"])
    report = json.loads((tmp_path / "one/score.json").read_text())
    assert report["scores"]["cropped"] == report["scores"]["ensemble"]


def test_what_members_predicted_has_a_file_of_its_own_for_every_run_and_set():
    """A run may be called after another, with a part behind a point."""
    names = ["cropped", "cropped.test", "test"]
    assert len({table_name(name, part) for name in names for part in (VAL, TEST)}) == 6


def test_tasks_name_no_path_that_depends_on_where_they_run(runs, tmp_path, monkeypatch):
    """Ray's tasks work in directories of their own."""
    tasks = []

    def take(task):
        tasks.append(task)
        raise InputError("seen")

    monkeypatch.chdir(runs)
    monkeypatch.setattr(ensembling, "predict_task", take)
    sets = ["--val", "shards/cropped/val", "--cache-dir", "cache", "--local"]
    with pytest.raises(InputError, match="seen"):
        main(["--runs", "cropped", *sets, "--out", str(tmp_path / "out")])
    (task,) = tasks
    paths = (task.member.weights.uri, task.member.val.uris[0], task.how.cache_dir)
    assert all(Path(path).is_absolute() for path in paths), paths


def test_a_run_without_a_checkpoint_is_one_message_and_exit_code_2(runs, tmp_path):
    args = ["--runs", f"{runs}/cropped", f"{runs}/nothing", "--out", tmp_path / "out"]
    done = run_here("mtl_dist.ensemble", *args)
    assert_one_message(done, f"{runs}/nothing", "no committed checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_member_that_overflows_is_named_and_not_averaged_away(runs, dataset, tmp_path):
    run = Path(shutil.copytree(runs / "cropped", tmp_path / "broken"))
    weights = load_file(f"{best(committed(str(run))[0]).uri}/model.safetensors")
    rewrite(
        run,
        "model.safetensors",
        save({n: v * np.float32("nan") if v.dtype == np.float32 else v for n, v in weights.items()}),
    )
    pattern = r"broken/checkpoints/.* not finite for 20 of 20 images, such as v0/00000\.jpg"
    with pytest.raises(InputError, match=pattern):
        main(["--runs", f"{runs}/cropped", str(run), "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out/score.json").exists()
    with pytest.raises(InputError, match=r"broken gives values that are not finite"):
        predict.main(["--runs", str(run), "--input", f"{dataset}/cropped/v0", "--out", f"{tmp_path}/out.csv"])
    assert not (tmp_path / "out.csv").exists()


def test_single_images_that_are_dealt_into_folds_are_noted(capsys):
    """Nothing tells which of them show one person."""
    command = EnsembleCommand(("run",), "out", steps=("temperature",))
    images = [f"{number:02d}.jpg" for number in range(20)]
    for videos, words in ((images, "single images are dealt into folds"), ([name[:1] for name in images], "")):
        fitted = calibrate([PredictionTable(make_predicted(np.arange(20), 1), images, videos)], command)
        assert len(set(fitted.folds)) == (5 if words else 2)
        assert words in (printed := capsys.readouterr().out)
        assert ("note: " in printed) == bool(words)


@pytest.mark.parametrize("place", ["", "/", "/checkpoints/ensemble", "/ensemble"])
def test_an_ensemble_among_the_files_of_a_run_is_refused(runs, tmp_path, monkeypatch, place):
    run = shutil.copytree(runs / "cropped", tmp_path / "cropped")
    before = files_below(run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--out is cropped{place}, where the run {run} keeps its own files"):
        main(["--runs", f"{runs}/cropped_aligned", str(run), "--out", f"cropped{place}"])
    assert files_below(run) == before


def test_out_that_is_a_file_is_one_message_that_names_the_flag(runs, tmp_path):
    (tmp_path / "o.txt").write_text("mine")
    done = run_here("mtl_dist.ensemble", "--runs", f"{runs}/cropped", "--out", f"{tmp_path}/o.txt")
    assert_one_message(done, f"--out is {tmp_path}/o.txt, which is a file; expected a directory")
    with pytest.raises(InputError, match=f"^{tmp_path}/o.txt cannot be written to: it is a file; expected a directory"):
        storage.check_writable(f"{tmp_path}/o.txt")
    assert (tmp_path / "o.txt").read_text() == "mine"


def test_one_run_given_twice_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="one and the same"):
        main(["--runs", f"{runs}/cropped", f"{runs}/cropped/", "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_a_member_with_another_order_of_classes_is_named(runs, tmp_path):
    run = Path(shutil.copytree(runs / "cropped", tmp_path / "reordered"))
    rewrite_state(run, classes={"expressions": [*EXPRESSIONS[::-1]], "aus": list(AUS)})
    with pytest.raises(InputError, match=r"reordered/.*another order.*Other"):
        main(["--runs", f"{runs}/cropped_aligned", str(run), "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_members_scored_on_different_data_are_named_with_their_checksums(runs, shards, tmp_path):
    create(str(write_dataset(tmp_path / "source", seed=1)), str(tmp_path / "shards"), frames_per_shard=7, jobs=1)
    run = Path(shutil.copytree(runs / "cropped", tmp_path / "elsewhere"))
    sha256 = read_index(f"{tmp_path}/shards/cropped/val").sha256
    rewrite_state(run, identity={"training set": "", "validation set": sha256})
    sets = ["--val", f"{shards}/cropped_aligned/val", f"{tmp_path}/shards/cropped/val"]
    with pytest.raises(InputError, match=f"elsewhere on .*{sha256[:12]}.*different sources"):
        main(["--runs", f"{runs}/cropped_aligned", str(run), *sets, "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("header\nv0/00000.jpg\nv0/77777.jpg\nv0/88888.jpg\n", ["2 of 3", "v0/77777.jpg, v0/88888.jpg"]),
        ("header\nv0/00000.jpg\n../secret.jpg\n", ["list.txt:3", "'../secret.jpg'"]),
        ("v0/00000.jpg\n", ["list.txt:1", "header"]),
        ("header\nv0/00000.jpg,1\n", ["list.txt:2"]),
        ("header\n", ["names no image"]),
    ],
)
def test_a_bad_test_list_is_one_message_before_anything_is_predicted(runs, dataset, tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    args = ["--runs", f"{runs}/cropped", "--out", str(tmp_path / "out"), "--test-root", str(dataset)]
    with pytest.raises(InputError) as error:
        main([*args, "--test-list", str(tmp_path / "list.txt")])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--folds", "1"], "--folds is 1; expected 2 or more"),
        (["--half-windows", "0", "-5"], "--half-windows"),
        (["--val", "x", "y"], "--val names 2 sets for 1 runs"),
        (["--test-list", "x"], "belong together"),
        (["--skip-bad-images"], "for the images of --test-list, and none is given"),
        (["--exif", "ignore"], "--exif is for the images of --test-list, and none is given"),
        (["--steps", "weights", "weights"], "'weights' twice"),
        (["--steps", "--calibrate", "auto"], "--calibrate auto chooses among --steps, and these are none"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(args, words):
    with pytest.raises(InputError, match=words):
        main(["--runs", "run", "--out", "out", *args])


@pytest.mark.parametrize("module", ["mtl_dist.ensemble", "mtl_dist.report"])
def test_a_validation_set_that_has_moved_is_found_by_the_flag_that_the_message_names(module, runs, tmp_path):
    run = Path(shutil.copytree(runs / "cropped", tmp_path / "run"))
    config = json.loads((Path(best(committed(str(run))[0]).uri) / "state.json").read_text())["config"]
    rewrite_state(run, config=config | {"data.val": "/moved/val"})
    args = [*(["--runs"] if module == "mtl_dist.ensemble" else []), run, "--out", tmp_path / "out"]
    done = run_here(module, *args)
    assert_one_message(done, f"the validation set of run {run}: no shard set at '/moved/val'", "where it is with --val")
    done = run_here(module, *args, "--val", "/gone")
    assert_one_message(done, "no shard set at '/gone'")
    assert open_member(str(run), f"{runs}/shards/cropped/val").val.rows == 20


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_one_message(runs, tmp_path):
    shutil.copytree(runs / "cropped", tmp_path / "run")
    member = open_member(str(tmp_path / "run"))
    shutil.rmtree(member.weights.uri)
    with pytest.raises(InputError, match="deleted meanwhile: its run is training"):
        load_weights(member.weights)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_an_image_that_is_replaced_by_one_of_its_size_is_another(s3, tmp_path, place):
    root = str(tmp_path) if place == "disk" else "s3://mtl/replaced"
    found = []
    for data in (b"one", b"two", b"two"):
        storage.write_bytes(f"{root}/cropped/v/1.jpg", data)
        found.append(find_images(root, "cropped", ["v/1.jpg"]).sha256)
    assert found[0] != found[1]
    assert place == "disk" or found[1] == found[2]


def test_a_submission_is_clipped_and_has_the_challenges_form():
    va = np.array([[1.5, -2.0], [-0.00001, 0.123456]])
    text = submission_text(["a/1.jpg", "b/2.jpg"], va, np.array([7, 0]), np.eye(2, 12, dtype=bool))
    assert text.splitlines()[1:] == [
        "a/1.jpg,1.0000,-1.0000,7,1,0,0,0,0,0,0,0,0,0,0,0",
        "b/2.jpg,0.0000,0.1235,0,0,1,0,0,0,0,0,0,0,0,0,0",
    ]


def test_a_member_that_fails_is_tried_again_here_and_then_named():
    calls = []

    def fail_twice(item):
        calls.append(item)
        if len(calls) < 3:
            raise OSError("lost")
        return item * 2

    assert list(map_here(fail_twice, {"a": 4}, retries=2)) == [("a", 8)]
    calls.clear()
    with pytest.raises(TaskFailed, match="a: OSError: lost"):
        list(map_here(fail_twice, {"a": 4}, retries=1))
    with pytest.raises(InputError, match="yours"):
        list(map_here(lambda item: (_ for _ in ()).throw(InputError("yours")), {"a": 4}, retries=5))


@pytest.mark.whole
def test_a_photograph_set_without_va_and_au_trains_and_says_what_the_score_covers(tmp_path):
    source = write_dataset(tmp_path / "source")
    for path in source.glob("*.txt"):
        lines = path.read_text().splitlines()
        cells = [line.split(",") for line in lines[1:]]
        kept = [",".join([c[0], "-5", "-5", c[3], *["-1"] * 12]) for c in cells]
        path.write_text("\n".join([lines[0], *kept]) + "\n")
    done = run_here("mtl_dist.shards", "create", str(source), str(tmp_path / "shards"), "--frames-per-shard", "7")
    assert "no labels at all for va, au" in done.stdout
    done = train(tmp_path / "shards", tmp_path, "run", "--train.epochs", "1")
    state = json.loads(next(tmp_path.glob("run/checkpoints/*/state.json")).read_text())
    assert state["scores"]["covers"] == ["expr"]
    assert state["scores"]["va"] is None
    assert state["scores"]["p"] == state["scores"]["expr"]


def test_a_task_is_taken_from_the_member_that_is_best_at_it_on_other_videos():
    rows, videos = np.arange(300), [f"v{row // 10}" for row in range(300)]
    good_va, good_expr = make_predicted(rows, 1), make_predicted(rows, 2)
    rng = np.random.default_rng(0)
    va, au = rng.uniform(-1, 1, (300, 2)), rng.integers(0, 2, (300, 12)).astype(float)
    every = np.ones(300, bool)
    targets = Targets(va, rows % 8, au, every, every, np.ones((300, 12), bool))
    good_va = good_va._replace(predictions=good_va.predictions._replace(va=va), targets=targets)
    sure = np.eye(8)[rows % 8]
    good_expr = good_expr._replace(predictions=good_expr.predictions._replace(expr=sure, au=au), targets=targets)
    tables = {
        name: PredictionTable(predicted, [f"{video}/{row}.jpg" for row, video in enumerate(videos)], videos)
        for name, predicted in (("first", good_va), ("second", good_expr))
    }
    found = choose_by_task(tables, EnsembleCommand(("a",), "out"))
    assert found.chosen == {"va": {"first": 5}, "expr": {"second": 5}, "au": {"second": 5}}
    assert found.scores["p"] == pytest.approx(3.0)


def test_choosing_by_task_does_not_gain_by_chance():
    """Members that know nothing: the best of many on a set looks better than it is."""
    rows, videos = np.arange(400), [f"v{row // 10}" for row in range(400)]
    members = {f"m{seed}": make_predicted(rows, seed) for seed in range(12)}
    targets = make_predicted(rows, 99).targets._replace(va=np.random.default_rng(77).uniform(-1, 1, (400, 2)))
    targets = targets._replace(va_mask=np.ones(400, bool))
    tables = {
        name: PredictionTable(member._replace(targets=targets), videos, videos) for name, member in members.items()
    }
    best_here = max(scores(metric_sums(t.predicted.predictions, targets))["va"] for t in tables.values())
    assert choose_by_task(tables, EnsembleCommand(("a",), "out")).scores["va"] < best_here


def test_checkpoints_that_are_best_at_one_task_are_a_line_of_their_own(runs, tmp_path):
    done = run_here(
        "mtl_dist.ensemble", "--runs", runs / "cropped", "--out", tmp_path / "out", "--local", "--each-task"
    )
    assert done.returncode == 0, done.stderr
    report = unseal((tmp_path / "out" / "score.json").read_bytes())
    assert "each task from its best checkpoint" in report["scores"]
    assert sum(report["by_task"]["va"].values()) == len(report["calibration"]["folds"])
    plain = run_here("mtl_dist.ensemble", "--runs", runs / "cropped", "--out", tmp_path / "plain", "--local")
    assert plain.returncode == 0
    assert unseal((tmp_path / "plain" / "score.json").read_bytes())["p"] == report["p"]


def read_gains(out: Path) -> tuple[dict, dict[str, list[str]]]:
    """score.json, and what the page has of its gains: {step: cells with what is below them}."""
    report = unseal((out / "score.json").read_bytes())
    (table,) = gains_tables([Result("e", "e", ENSEMBLE, None, {}, score_file=report)])
    return report, {row[0].text: [f"{cell.text} {cell.below}".strip() for cell in row[1:]] for row in table.rows}


def cells_of(text: str, name: str) -> list[str]:
    """The cells of a row of the table of gains, those of its lines joined: a long name has several, too."""
    lines = text[text.index("what each step gains") :].splitlines()
    begins = [n for n, line in enumerate(lines) if line.startswith(("│ + ", "│ each", "└"))]
    first, last = next((n, after) for n, after in pairwise(begins) if lines[n].startswith(f"│ {name[:9]}"))
    columns = zip(*(line.strip("│").split("│") for line in lines[first:last]))
    return [" ".join(part.strip() for part in column if part.strip()) for column in columns][1:]


@pytest.mark.parametrize("calibrate", ["all", "auto"])
def test_the_gains_of_steps_are_the_same_in_score_json_on_the_console_and_on_the_page(
    runs, tmp_path, capsys, calibrate
):
    out = tmp_path / "out"
    args = ["--runs", *(f"{runs}/{view}" for view in VIEWS), "--local", "--each-task", "--out", str(out)]
    main([*args, "--steps", *STEPS[::-1], "--calibrate", calibrate])
    said, by_task = capsys.readouterr().out, "each task from its best checkpoint"
    report, page = read_gains(out)
    assert report["options"]["calibrate"] == calibrate
    assert list(report["gains"]) == [*list(report["steps"])[1:], by_task] == [*(f"+ {s}" for s in STEPS), by_task]
    assert render_gains(report) in said
    assert render_gains(report) in (out / "table.txt").read_text()
    for name, gains in report["gains"].items():
        assert gains.keys() == {"p", *TASKS_OF.get(name.removeprefix("+ "), ("va", "expr", "au"))}
        for key, shown, on_page in zip(("p", "va", "expr", "au"), cells_of(said, name), page[name]):
            if gain := gains.get(key):
                assert gain["low"] <= gain["high"]
                numbers = f"{gain['gain']:+.4f} {gain['low']:+.4f} to {gain['high']:+.4f}"
                assert (shown, on_page) == (f"{numbers} rough: 3 videos", numbers)
            else:
                assert (shown, on_page) == ("", "–")
    last = report["gains"][by_task]["p"]["gain"]
    assert last == pytest.approx(report["scores"][by_task]["p"] - report["p"], abs=1e-6)
    scored = list(report["steps"].values())
    for before, after, gains in zip(scored, scored[1:], report["gains"].values()):
        if calibrate == "all":  # as each was added; what was tried adds up to nothing
            assert {key: gain["gain"] for key, gain in gains.items()} == pytest.approx(
                {key: after[key] - before[key] for key in gains}, abs=1e-12
            )
    assert ("kept" in report["calibration"]) == (calibrate == "auto")
    if calibrate == "auto":
        check_choices(report, cells_of, said, page)


def check_choices(report: dict, cells_of, said: str, page: dict[str, list[str]]) -> None:
    """What is kept is told alike; and what is left out is applied nowhere."""
    about = report["calibration"]
    plain = {"temperature": 1.0, "thresholds": 0.5, "smoothing": 0, "class_smoothing": 0, "prior": 1.0}
    for step in STEPS:
        kept = about["kept"].get(step, [])
        assert kept == [task for task in TASKS_OF[step] if report["gains"][f"+ {step}"][task]["gain"] > 1e-6]
        counts = {task: sum(task in fold["kept"].get(step, []) for fold in about["folds"]) for task in TASKS_OF[step]}
        assert about["kept_by_folds"][step] == counts
        shown, by_folds = ", ".join(map(str.upper, kept)) or "left out", [f"{t.upper()} {n}" for t, n in counts.items()]
        assert cells_of(said, f"+ {step}")[-2:] == [shown, ", ".join(by_folds)]
        assert page[f"+ {step}"][-1] == f"{shown} {', '.join(by_folds)} of 3 folds"
        for part in (about, *about["folds"]):
            if step in plain and not part["kept"].get(step):
                values = part["parameters"][step].values()
                assert {v for value in values for v in (value.values() if isinstance(value, dict) else [value])} == {
                    plain[step]
                }


def test_a_test_list_gets_the_steps_that_are_kept(runs, dataset, tmp_path):
    names = write_test_list(tmp_path / "list.txt", dataset)
    args = ["--runs", f"{runs}/cropped", "--local", "--steps", *STEPS, "--calibrate", "auto"]
    args += ["--test-list", f"{tmp_path}/list.txt", "--test-root", str(dataset)]
    main([*args, "--out", f"{tmp_path}/out"])
    report = unseal((tmp_path / "out/score.json").read_bytes())
    tested = {row["image"]: row for row in pq.read_table(tmp_path / "out/test_predictions.parquet").to_pylist()}
    assert set(tested) == set(names)
    thresholds = report["calibration"]["parameters"]["thresholds"]
    kept = report["calibration"]["kept"]
    assert (set(thresholds.values()) == {0.5}) == ("thresholds" not in kept)
    own = read_predictions(f"{tmp_path}/out/members/test/cropped.parquet")
    for image, arousal in zip(own.images, own.predicted.predictions.va[:, 1]):
        if not {"smoothing", "moments"} & kept.keys():
            assert tested[image]["arousal"] == pytest.approx(arousal, abs=1e-6)
        assert all(tested[image][au] == (tested[image][f"p_{au}"] > t) for au, t in thresholds.items())
