"""The drawn data set has the layout of the real one, is reproducible, and shows each action unit where it belongs."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist.shards.annotations import FILES, HEADER
from mtl_dist.synthetic.canvas import ALIGNED_PX
from mtl_dist.synthetic.faces import render_views
from mtl_dist.synthetic.person import Look, make_identity
from mtl_dist.synthetic.plan import annotation_text, plan_splits
from mtl_dist.synthetic.render import PARAMETERS_FILE, write_synthetic
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from tests.conftest import assert_one_message, run_here

SIZES = {"num_train": 14, "num_val": 6, "frames_per_video": 5}

# Where an AU shows, as (left, top, right, bottom) in aligned pixels.
REGIONS = {
    1: (38, 0, 74, 40),
    2: (14, 0, 98, 40),
    4: (28, 8, 84, 42),
    6: (10, 34, 102, 74),
    7: (22, 28, 90, 54),
    10: (34, 56, 78, 92),
    12: (24, 60, 88, 96),
    15: (34, 74, 78, 104),
    23: (34, 70, 78, 98),
    24: (34, 70, 78, 98),
    25: (34, 72, 78, 98),
    26: (10, 66, 102, 112),
}


def read_rows(text: str) -> list[list[str]]:
    header, *lines = text.splitlines()
    assert header == HEADER
    return [line.split(",") for line in lines]


def read_tree(dest: Path) -> dict[str, bytes]:
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    dest = tmp_path_factory.mktemp("synthetic") / "data"
    finished = []
    summary = write_synthetic(dest, **SIZES, seed=3, progress=finished.append)
    return dest, summary, finished


@pytest.fixture(scope="module")
def large_plan():
    return plan_splits(num_train=3000, num_val=1000, seed=0, frames_per_video=24)


def test_layout(small_set):
    dest, summary, finished = small_set
    assert sum(finished) == summary["num_images_written"] == 2 * (14 + 6)
    assert {path.name for path in dest.iterdir()} == {*VIEWS, *FILES.values(), PARAMETERS_FILE}
    for split, name in FILES.items():
        rows = read_rows((dest / name).read_text())
        assert len(rows) == summary[split]["num_rows"]
        for image, *values in rows:
            assert len(values) == 15
            cropped, aligned = (Image.open(dest / view / image) for view in VIEWS)
            assert aligned.size == (ALIGNED_PX, ALIGNED_PX)
            assert cropped.width == cropped.height
            assert 112 <= cropped.width <= 160


@pytest.mark.whole
def test_files_do_not_depend_on_the_number_of_processes(small_set, tmp_path):
    dest, _, _ = small_set
    write_synthetic(tmp_path, **SIZES, seed=3, jobs=2)
    assert read_tree(tmp_path) == read_tree(dest)


def test_seeds_differ():
    texts = [
        annotation_text(plan_splits(num_train=50, num_val=9, seed=seed, frames_per_video=9)["train"]) for seed in (0, 1)
    ]
    assert texts[0] != texts[1]


def test_rerun_does_nothing_and_repairs_what_is_missing(small_set):
    dest, summary, _ = small_set
    before = read_tree(dest)
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("*.*")}
    assert write_synthetic(dest, **SIZES, seed=3) == summary | {"num_images_written": 0}
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*.*")} == times

    # As a kill leaves it: no annotations yet, a frame half done.
    (dest / FILES["val"]).unlink()
    next(iter(sorted((dest / "cropped").rglob("*.jpg")))).unlink()
    assert write_synthetic(dest, **SIZES, seed=3)["num_images_written"] == 2
    assert read_tree(dest) == before


def test_other_data_is_never_written_over(small_set, tmp_path):
    dest, _, _ = small_set
    with pytest.raises(ValueError, match="delete it or choose another directory"):
        write_synthetic(dest, **SIZES, seed=4)
    (tmp_path / "cropped").mkdir()
    with pytest.raises(ValueError, match="not a synthetic set"):
        write_synthetic(tmp_path, **SIZES)
    assert_one_message(run_here("mtl_dist.shards", "synth", tmp_path), "not a synthetic set, choose another place")
    (tmp_path / PARAMETERS_FILE).write_text("{")
    assert_one_message(run_here("mtl_dist.shards", "synth", tmp_path), f"{PARAMETERS_FILE} is damaged")


def test_videos_of_the_splits_are_disjoint_and_frames_sparse(large_plan):
    train, val = (large_plan[split] for split in ("train", "val"))
    names = [video.name for video in train + val]
    assert len(set(names)) == len(names)
    assert len({video.identity for video in train + val}) == len(names)
    gaps = np.concatenate([np.diff([frame.number for frame in video.frames]) for video in train])
    assert gaps.min() >= 1
    assert 3 <= np.median(gaps) <= 5
    assert sum(len(video.frames) for video in train) == 3000


def test_missing_labels(large_plan):
    rows = {split: read_rows(annotation_text(videos)) for split, videos in large_plan.items()}
    for split, (va, expr, au) in {"train": (0.73, 0.64, 0.73), "val": (1.0, 0.57, 1.0)}.items():
        assert np.mean([row[1] != "-5.0" for row in rows[split]]) == pytest.approx(va, abs=0.03)
        assert np.mean([row[3] != "-1" for row in rows[split]]) == pytest.approx(expr, abs=0.03)
        assert np.mean(["-1" not in row[4:] for row in rows[split]]) == pytest.approx(au, abs=0.03)
        images = [row[0] for row in rows[split]]
        assert 0 < len(images) - len(set(images)) < 0.01 * len(images)
    assert all((row[1] == "-5.0") == (row[2] == "-5.0") for row in rows["train"])
    assert any(set(row[1:]) == {"-5.0", "-1"} for row in rows["train"])
    assert any("-1" in row[4:] and set(row[4:]) != {"-1"} for row in rows["train"])


def test_every_class_has_a_share(large_plan):
    for videos in (
        large_plan["train"],
        large_plan["val"],
        plan_splits(num_train=900, num_val=1, seed=5, frames_per_video=24)["train"],
    ):
        rows = read_rows(annotation_text(videos))
        expr = [int(row[3]) for row in rows if row[3] != "-1"]
        assert np.bincount(expr, minlength=len(EXPRESSIONS)).min() > 0.05 * len(expr)
        aus = np.array([row[4:] for row in rows if "-1" not in row[4:]], dtype=int)
        assert aus.mean(axis=0).min() > 0.03
        assert aus.mean(axis=0).max() < 0.6


@pytest.mark.parametrize("au", AUS)
def test_an_action_unit_changes_its_own_region(au):
    left, top, right, bottom = REGIONS[au]
    identity = make_identity(np.random.default_rng(4))
    off, on = (
        np.asarray(render_views(identity, Look(aus={au: intensity}), np.random.default_rng(0))[1], dtype=float)
        for intensity in (0.0, 1.0)
    )
    change = np.abs(on - off).mean(axis=2)
    inside = np.zeros_like(change, dtype=bool)
    inside[top:bottom, left:right] = True
    assert change[inside].mean() > 1.5
    assert change[inside].mean() > 5 * change[~inside].mean()


def test_alignment_removes_the_tilt_of_the_head():
    identity = make_identity(np.random.default_rng(4))
    views = [render_views(identity, Look(aus={}, roll=roll), np.random.default_rng(0)) for roll in (0.0, 0.3)]
    cropped, aligned = (
        np.abs(np.subtract(*(np.asarray(image, dtype=float) for image in pair))) for pair in zip(*views, strict=True)
    )
    eyes = (slice(30, 50), slice(20, 92))
    assert 3 * aligned[eyes].mean() < cropped.mean()


def test_synth_ends_with_what_there_is_and_the_command_that_is_next(tmp_path):
    done = run_here("mtl_dist.shards", "synth", str(tmp_path / "my faces"), "--num-train", "4", "--num-val", "2")
    assert done.returncode == 0, done.stderr
    assert "my faces: 12 images written" in done.stdout
    assert "{" not in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: python -m "))
    assert run_here(*command, "--jobs", "1").returncode == 0
    assert (tmp_path / "my faces-shards" / "cropped" / "train" / "index.json").exists()
