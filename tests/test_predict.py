"""Prediction of folders, lists, videos and shard sets; what it refuses; parts in processes of their own."""

from __future__ import annotations

import csv
import io
import os
import shutil
import struct
import sys
import threading
from fractions import Fraction
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mtl_dist import storage
from mtl_dist.data.decode import MAX_IMAGE_BYTES, decode
from mtl_dist.data.frames import BadImage, image_batches, read_image, read_in_order
from mtl_dist.data.videos import count_frames, video_batches
from mtl_dist.ensemble.job import combine
from mtl_dist.errors import InputError, StorageError
from mtl_dist.predict import __main__ as predict
from mtl_dist.predict import job
from mtl_dist.predicting import inputs
from mtl_dist.predicting.inputs import open_frames
from mtl_dist.predicting.members import open_member, predict_member, row_names
from mtl_dist.predicting.predictions import read_predictions
from mtl_dist.predicting.spread import Task, _results, predict_frames
from mtl_dist.predicting.submission import find_images, read_test_list
from mtl_dist.runs.checkpoint import COMMIT, best, committed
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.columns import TableOptions
from mtl_dist.synthetic.render import write_synthetic
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from mtl_dist.threads import DaemonThreads
from tests.conftest import assert_one_message, run_here
from tests.fatal_frames import FatalFrames
from tests.test_ensemble import rewrite_state
from tests.windows import as_windows

SIZE = 80  # of the images that the run was trained at


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Rendered faces: one JPEG a frame, in a directory a video."""
    root = tmp_path_factory.mktemp("faces")
    write_synthetic(root, num_train=20, num_val=2, frames_per_video=6)
    return root / "cropped"


def write_video(
    path: Path | str,
    *,
    frames: int = 12,
    width: int = 96,
    height: int = 80,
    degrees: int = 0,
    times=None,
    codec: str = "mpeg4",
    **options: str,
) -> Path:
    """Write a video whose frames tell their number by their brightness, brighter in the upper left corner.

    `times` are those of its frames in 1/25 s, where they are not one after the other; `options` are the container's.
    """
    path = Path(path)
    with av.open(str(path.absolute()), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, 25)
        if degrees:
            stream.set_display_rotation(degrees)
        for number, time in enumerate(times or range(frames)):
            pixels = np.full((height, width, 3), (20 + 10 * number) % 256, np.uint8)
            pixels[: height // 3, : width // 3] = 240
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def run_predict(run: Path, source: Path | str, out: Path | str, *more: str) -> None:
    predict.main(["--runs", str(run), "--input", str(source), "--out", str(out), *more])


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def numbers(rows: list[dict[str, str]]) -> np.ndarray:
    """(n, 22): VA, expression and AU probabilities."""
    names = ["valence", "arousal", *(f"p_{name}" for name in EXPRESSIONS), *(f"p_AU{number}" for number in AUS)]
    return np.array([[float(row[name]) for name in names] for row in rows])


def expected(run: Path, pixels: list[np.ndarray]) -> np.ndarray:
    """Predict (SIZE, SIZE, 3) pictures one at a time, written out."""
    model = load_weights(open_weights(str(run)))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = []
    with torch.no_grad():
        for picture in pixels:
            image = torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255
            outputs = model.predict_images(((image - mean) / std)[None])
            rows.append(torch.cat([outputs.va, outputs.expr_logits.softmax(-1), outputs.au_logits.sigmoid()], -1)[0])
    return torch.stack(rows).numpy()


def test_frames_that_come_as_padded_samples_are_predicted_as_those_that_come_alone(run, faces):
    """Three frames a sample; of the last batch, some are padding."""
    frames, told = open_frames(str(faces), scratch=faces), []

    class Windows:
        num_frames = frames.num_frames

        def batches(self, size, **which):
            return (as_windows(batch, 3) for batch in frames.batches(size, **which))

    models = (open_weights(str(run)),) * 2
    found = predict_frames(Task(models, Windows(), "cpu", 4, 0), processes=1, progress=told.append).predicted
    alone = predict_frames(Task(models, frames, "cpu", 4, 0), processes=1, progress=lambda count: None).predicted
    assert sum(told) == frames.num_frames == len(found.rows)
    for mine, theirs in zip((found.rows, *found.predictions), (alone.rows, *alone.predictions), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_folder_is_predicted_in_the_order_of_its_names(run, faces, tmp_path):
    run_predict(run, faces, tmp_path / "out.csv", "--batch", "7", "--workers", "2")
    rows = read_rows(tmp_path / "out.csv")
    names = sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg"))
    assert [row["image"] for row in rows] == names
    assert [int(row["row"]) for row in rows] == list(range(22))
    found = numbers(rows)
    np.testing.assert_allclose(found, expected(run, [decode((faces / n).read_bytes(), SIZE) for n in names]), atol=1e-5)
    assert [row["expression"] for row in rows] == [EXPRESSIONS[i] for i in found[:, 2:10].argmax(1)]
    assert "label_valence" not in rows[0]


def test_a_shard_set_is_predicted_as_the_ensemble_predicts_it_and_scored(run, tmp_path, capsys):
    member = open_member(str(run))
    run_predict(run, str(member.val), tmp_path / "out.parquet", "--batch", "9")
    reference = predict_member(member, device=torch.device("cpu"))
    table = read_predictions(str(tmp_path / "out.parquet"))
    np.testing.assert_array_equal(table.predicted.rows, reference.rows)
    for mine, theirs in zip(table.predicted.predictions, reference.predictions):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    for mine, theirs in zip(table.predicted.targets, reference.targets):
        np.testing.assert_array_equal(mine, theirs)
    assert table.images[:2] == ["v0/00000.jpg", "v0/00001.jpg"]
    printed = capsys.readouterr().out
    assert "constant predictor" in printed
    assert f"{member.weights.checkpoint.score:.4f}" in printed


def test_a_list_becomes_the_challenges_file_line_by_line(run, faces, tmp_path):
    names = sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg"))[:5]
    names = [names[3], names[0], names[3]]  # in the list's order, one twice
    (tmp_path / "test.txt").write_text("\n".join(["image", *names]) + "\n")
    run_predict(run, tmp_path / "test.txt", tmp_path / "out.txt", "--images", str(faces))
    header, *lines = (tmp_path / "out.txt").read_text().splitlines()
    assert header == "image,valence,arousal,expression,aus"
    values = expected(run, [decode((faces / name).read_bytes(), SIZE) for name in names])
    for line, name, value in zip(lines, names, values, strict=True):
        cells = line.split(",")
        assert cells[0] == name
        assert [float(cell) for cell in cells[1:3]] == pytest.approx(value[:2], abs=1e-4)
        assert int(cells[3]) == value[2:10].argmax()
        assert [int(cell) for cell in cells[4:]] == (value[10:] > 0.5).astype(int).tolist()


def test_several_models_give_the_mean_of_their_probabilities(run, faces, tmp_path):
    first, last = (checkpoint.uri for checkpoint in committed(str(run))[0])
    for name, runs in (("first", [first]), ("last", [last]), ("both", [first, last])):
        args = ["--runs", *runs, "--input", str(faces), "--out", str(tmp_path / f"{name}.csv")]
        predict.main(args)
    one, two, mean = (numbers(read_rows(tmp_path / f"{name}.csv")) for name in ("first", "last", "both"))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(mean, (one + two) / 2, atol=1e-6)


def test_models_of_two_views_are_refused_with_pictures_of_one(run, runs, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "predict_frames", lambda *args, **options: pytest.fail("predicted"))
    aligned = runs / "cropped_aligned"
    pattern = rf"^--runs names {run}, of view 'cropped', and {aligned}, of view 'cropped_aligned'; .*--faces"
    with pytest.raises(InputError, match=pattern):
        predict.main(["--runs", *map(str, (run, aligned)), "--input", str(faces), "--out", str(tmp_path / "out.csv")])
    assert not (tmp_path / "out.csv").exists()


def both(runs: Path, *more: Path | str) -> list[str]:
    return ["--runs", *(str(runs / view) for view in VIEWS), *map(str, more)]


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_both_views_of_a_laid_out_directory_are_the_plain_mean_of_the_ensemble(runs, dataset, tmp_path, processes):
    predict.main(
        both(runs, "--input", dataset, "--out", tmp_path / "out.csv", "--batch", "8", "--processes", processes)
    )
    rows = {row["image"]: row for row in read_rows(tmp_path / "out.csv")}
    assert len(rows) == len(list((dataset / "cropped").rglob("*.jpg")))
    members = [open_member(str(runs / view)) for view in VIEWS]
    mean = combine([predict_member(member, device=torch.device("cpu")) for member in members])
    images = row_names(members[0]).images
    expected = np.concatenate(mean.predictions, axis=1)
    np.testing.assert_allclose(numbers([rows[image] for image in images]), expected, atol=1e-6)


def test_what_lacks_a_view_is_told_and_the_other_views_models_decide_on_request(runs, dataset, tmp_path, capsys):
    root = tmp_path / "data"
    for view in VIEWS:
        shutil.copytree(dataset / view / "v0", root / view / "v0")
    names = sorted(path.name for path in (root / "cropped/v0").iterdir())
    (root / "cropped/v0" / names[0]).unlink()
    (root / "cropped_aligned/v0" / names[1]).write_bytes(b"no picture")
    (tmp_path / "list.txt").write_text("image\n" + "".join(f"v0/{name}\n" for name in names[:3]))
    args = both(runs, "--input", tmp_path / "list.txt", "--images", root, "--out", tmp_path / "out.csv")
    with pytest.raises(InputError, match=rf"^1 of 3 pictures are not in each of .*v0/{names[0]}; .*--skip-bad-images"):
        predict.main(args)
    predict.main([*args, "--skip-bad-images"])
    assert "note: 2 frame(s), such as v0/00000.jpg, have no picture in some view" in capsys.readouterr().out
    own = []
    for view, name in (("cropped_aligned", names[0]), ("cropped", names[1])):
        run_predict(runs / view, root / view / "v0" / name, tmp_path / "one.csv")
        own.append(numbers(read_rows(tmp_path / "one.csv"))[0])
    found = numbers(read_rows(tmp_path / "out.csv"))
    np.testing.assert_allclose(found[:2], own, atol=1e-6)
    assert len(found) == 3


def test_a_shard_set_of_another_view_is_refused(run, runs, tmp_path):
    other = runs / "shards" / "cropped_aligned" / "val"
    pattern = rf"^--input is {other}, of view 'cropped_aligned'; expected 'cropped', that of --runs"
    with pytest.raises(InputError, match=r"--skip-bad-images is for image files, and .* is a shard set"):
        run_predict(run, other, tmp_path / "out.csv", "--skip-bad-images")
    with pytest.raises(InputError, match=r"--exif is for image files, and .* is a shard set"):
        run_predict(run, other, tmp_path / "out.csv", "--exif", "ignore")
    with pytest.raises(InputError, match=pattern):
        run_predict(run, other, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_checkpoint_that_tells_no_view_predicts_with_any(run, runs, tmp_path):
    shutil.copytree(run, tmp_path / "old")
    rewrite_state(tmp_path / "old", view=None)
    aligned = runs / "cropped_aligned"
    args = ["--input", str(runs / "shards" / "cropped_aligned" / "val"), "--out", str(tmp_path / "out.csv")]
    predict.main(["--runs", str(tmp_path / "old"), str(aligned), *args])
    assert len(read_rows(tmp_path / "out.csv")) == 20


@pytest.mark.parametrize(
    ("of_models", "expected"),
    [
        ([{"p": 1.2, "va": 0.5, "expr": 0.3, "au": 0.4}], ""),
        ([{"p": 0.3, "expr": 0.3}], "no model was scored on va, au, for want of labels: what is said of them"),
        ([{"p": 0.3, "expr": 0.3}, {"p": 0.4, "au": 0.4}], "scored on va, "),
        ([{}], ""),  # a checkpoint that was never scored says nothing of labels
        ([{}, {"p": 0.9, "ccc_a": 0.5, "expr": 0.3}], "scored on au, "),
    ],
)
def test_what_no_validation_set_had_labels_of_is_said(of_models, expected):
    said = job._note_unscored([SimpleNamespace(checkpoint=SimpleNamespace(scores=scores)) for scores in of_models])
    assert expected in said
    assert bool(said) == bool(expected)


def test_two_processes_predict_what_one_predicts_in_its_order(run, faces, tmp_path):
    for processes in ("1", "2"):
        run_predict(run, faces, tmp_path / f"{processes}.csv", "--batch", "5", "--processes", processes)
    one, two = (read_rows(tmp_path / f"{processes}.csv") for processes in ("1", "2"))
    assert len(one) == 22
    assert [(row["row"], row["image"]) for row in one] == [(row["row"], row["image"]) for row in two]
    np.testing.assert_allclose(numbers(one), numbers(two), atol=1e-6)  # equal bits where threads are as many


def test_a_killed_process_is_an_error_that_names_it(run, faces):
    names = tuple(path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg"))
    task = Task((open_weights(str(run)),), FatalFrames(str(faces), names), "cpu", 4, 1)
    with pytest.raises(InputError, match="process 2 of 2 was killed by signal 9"):
        predict_frames(task, processes=2, progress=lambda count: None)


def test_a_process_that_is_killed_while_it_sends_is_named_too():
    receiver, sender = Pipe(duplex=False)
    os.write(sender.fileno(), struct.pack("!i", 100) + b"the first of 100 bytes")
    sender.close()
    killed = SimpleNamespace(join=lambda: None, exitcode=-9)
    with pytest.raises(InputError, match="process 2 of 2 was killed by signal 9"):
        list(_results({receiver: (1, killed)}, 2, lambda count: None))


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_decoded_is_named_by_whichever_process_reads_it(run, faces, tmp_path, processes):
    shutil.copytree(faces, tmp_path / "faces")
    broken = sorted((tmp_path / "faces").rglob("*.jpg"))[5]
    broken.write_bytes(broken.read_bytes()[:1500])
    with pytest.raises(InputError, match=rf"{broken} cannot be decoded: damaged or truncated"):
        run_predict(run, tmp_path / "faces", tmp_path / "out.csv", "--batch", "4", "--processes", processes)
    assert not list(tmp_path.glob("*out.csv*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_are_left_out_and_named_and_nothing_else_changes(run, faces, tmp_path, capsys, processes):
    pictures = sorted(faces.rglob("*.jpg"))
    lines = [str(picture) for picture in pictures]
    (tmp_path / "cut.jpg").write_bytes(pictures[3].read_bytes()[:-300])
    lines[3], lines[8:8] = str(tmp_path / "cut.jpg"), ["gone.jpg"] * 5  # a whole batch of 4, and a part of the next
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    more = ["--skip-bad-images", "--batch", "4", "--workers", str(processes - 1), "--processes", str(processes)]
    run_predict(run, tmp_path / "list.txt", tmp_path / "some.csv", *more)
    said = capsys.readouterr().out
    assert said.count("left out: image") == 6
    assert "some.csv: 21 frames, 6 left out" in said
    assert "cut.jpg cannot be decoded" in said
    assert said.count("gone.jpg does not exist") == 5
    assert "says it has" not in said
    run_predict(run, faces, tmp_path / "all.csv")
    some, every = read_rows(tmp_path / "some.csv"), read_rows(tmp_path / "all.csv")
    del every[3]
    good = [row for row in range(27) if row != 3 and row not in range(8, 13)]
    assert [int(row["row"]) for row in some] == good
    assert [row["image"] for row in some] == [lines[row] for row in good]
    np.testing.assert_allclose(numbers(some), numbers(every), atol=1e-5)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_image_that_may_not_be_read_is_not_left_out(run, faces, tmp_path, processes):
    """As where credentials expire: picture after picture that is whole would be lost."""
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", MAX_IMAGE_BYTES + 1)
    (tmp_path / "list.txt").write_text("\n".join([*map(str, sorted(faces.rglob("*.jpg"))), "huge.jpg"]) + "\n")
    more = ["--skip-bad-images", "--batch", "4", "--processes", processes]
    with pytest.raises(InputError, match=r"huge\.jpg has \d+ bytes; at most"):
        run_predict(run, tmp_path / "list.txt", tmp_path / "out.csv", *more)
    assert not (tmp_path / "out.csv").exists()


def test_leaving_out_every_image_is_an_error(run, tmp_path):
    (tmp_path / "list.txt").write_text("gone.jpg\nlost.jpg\n")
    with pytest.raises(InputError, match=r"none of the 2 images .* the first: image .*gone\.jpg does not exist"):
        run_predict(run, tmp_path / "list.txt", tmp_path / "out.csv", "--skip-bad-images")
    assert not (tmp_path / "out.csv").exists()


def test_every_nth_frame_of_a_video_is_predicted_under_its_number(run, tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    run_predict(run, video, tmp_path / "out.csv", "--every-frames", "5", "--batch", "2")
    rows = read_rows(tmp_path / "out.csv")
    assert [row["image"] for row in rows] == ["clip/00001.jpg", "clip/00006.jpg", "clip/00011.jpg"]
    assert [int(row["row"]) for row in rows] == [0, 5, 10]
    with av.open(str(video)) as container:
        decoded = [frame.to_image().crop((8, 0, 88, 80)) for frame in container.decode(video=0)]
    np.testing.assert_allclose(
        numbers(rows), expected(run, [np.asarray(decoded[i]) for i in (0, 5, 10)]), atol=1e-5
    )  # the middle square of 96 x 80 is what the run takes, without a resize


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["images", "video"])
def test_parts_hold_every_frame_once_in_the_same_batches(tmp_path, kind, num_parts):
    video = write_video(tmp_path / "clip.mp4", frames=11)
    for number in range(11):
        Image.fromarray(np.full((64, 64, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(11)]
    parts = []
    for part in range(num_parts):
        which = {"batch": 3, "size": 64, "part": part, "num_parts": num_parts}
        read = image_batches(paths, workers=part, **which) if kind == "images" else video_batches(video, **which)
        parts.append([(batch.rows.flatten().tolist(), batch) for batch in read])
    found = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    assert [rows for rows, _ in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert all(rows[0] // 3 % num_parts == number for number, part in enumerate(parts) for rows, _ in part)
    brightness = torch.cat([batch.inputs.float().mean((1, 2, 3, 4)) for _, batch in found])
    assert (brightness.diff() > 3).all()  # frames tell their number by their brightness
    assert not any(mask.any() for _, batch in found for mask in batch.labels[3:])


def test_a_table_of_a_video_has_its_seconds_and_one_of_images_has_not(run, faces, tmp_path):
    video = write_video(tmp_path / "clip.mkv", times=[0, 1, 5, 50], width=80)
    run_predict(run, video, tmp_path / "video.csv")
    assert [float(row["seconds"]) for row in read_rows(tmp_path / "video.csv")] == [0, 0.04, 0.2, 2]
    run_predict(run, faces, tmp_path / "faces.csv")
    assert "seconds" not in read_rows(tmp_path / "faces.csv")[0]


@pytest.mark.parametrize("processes", ["1", "2", "3"])
def test_the_videos_of_a_directory_are_predicted_one_after_the_other(run, tmp_path, processes, capsys):
    folder = tmp_path / "films"
    for name, frames in (("b/one.mp4", 7), ("a.mp4", 5)):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        run_predict(run, write_video(folder / name, frames=frames), tmp_path / f"{frames}.csv", "--every-frames", "2")
    (folder / "notes.txt").touch()
    more = ("--every-frames", "2", "--processes", processes, "--batch", "2")
    run_predict(run, folder, tmp_path / "out.csv", *more)
    rows, apart = read_rows(tmp_path / "out.csv"), [read_rows(tmp_path / f"{frames}.csv") for frames in (5, 7)]
    assert [row["image"] for row in rows] == [f"a/{n:05d}.jpg" for n in (1, 3, 5)] + [
        f"b/one/{n:05d}.jpg" for n in (1, 3, 5, 7)
    ]
    assert [int(row["row"]) for row in rows] == list(range(7))
    assert [row["seconds"] for row in rows] == [row["seconds"] for table in apart for row in table]
    np.testing.assert_allclose(numbers(rows), numbers([*apart[0], *apart[1]]), atol=1e-5)
    assert "other files were left out: 1 .txt" in capsys.readouterr().out


def test_videos_of_one_name_keep_their_suffix(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        write_video(tmp_path / name, frames=1)
    videos = open_frames(str(tmp_path), scratch=tmp_path / "scratch")
    assert [video.title for video in videos.videos] == ["a.mkv", "a.mp4"]


def test_pictures_that_are_hardly_faces_are_said(run, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x112] = 6
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = {"lying": (80, 100), "tall": (60, 120), "scene": (160, 90), "huge": (1000, 1000), "face": (112, 112)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / f"{name}.jpg", **({"exif": exif} if name == "lying" else {}))
    for name in ("one.heic", "two.heic", "Thumbs.db"):
        (folder / name).touch()
    run_predict(run, folder, tmp_path / "out.csv")
    said = capsys.readouterr().out
    assert "1 picture(s), such as " in said
    assert "lying.jpg, are not stored upright, says their EXIF, and were turned; --exif ignore" in said
    assert "note: 2 picture(s), such as " in said
    assert "scene.jpg, 160 x 90, are far from square and were squashed" in said
    assert "huge.jpg, 1000 x 1000, are much larger than what the models read" in said
    assert "other files were left out: 2 .heic, 1 .db" in said
    run_predict(run, folder, tmp_path / "out.csv", "--exif", "ignore")
    assert "lying.jpg, are not stored upright, says their EXIF, and were taken as they are" in capsys.readouterr().out


def test_a_lying_photograph_is_predicted_as_its_upright_self(run, faces, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(min(faces.rglob("*.jpg"))) as image:
        image.save(folder / "upright.png")
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "lying.png", exif=exif)
    run_predict(run, folder, tmp_path / "out.csv")
    lying, upright = numbers(read_rows(tmp_path / "out.csv"))
    np.testing.assert_allclose(lying, upright, atol=3e-3)  # a resize rounds rows before columns


def test_the_challenges_file_has_a_line_for_frames_without_a_picture(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a/00003.png", "a/00010.png", "b/00002.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 80, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "a/00004.png").write_bytes(b"no picture")
    listed = ["a/00011", "b/00001", "a/00010", "b/00002", "a/00004", "a/00003", "a/00001", "b/00003"]
    (tmp_path / "list.txt").write_text("image\n" + "".join(f"{name}.png\n" for name in listed))
    with pytest.raises(InputError, match="do not exist"):
        run_predict(run, tmp_path / "list.txt", tmp_path / "out.txt")
    run_predict(run, tmp_path / "list.txt", tmp_path / "out.txt", "--skip-bad-images")
    lines = (tmp_path / "out.txt").read_text().splitlines()[1:]
    assert [line.partition(".png,")[0] for line in lines] == listed
    values = {name: line.partition(",")[2] for name, line in zip(listed, lines, strict=True)}
    nothing = "0.0000,0.0000,0," + ",".join("0" * 12)
    assert values["b/00001"] == values["a/00001"] == nothing
    assert values["a/00011"] == values["a/00010"] != values["a/00003"]
    assert values["a/00004"] == values["a/00003"] != nothing
    assert values["b/00003"] == values["b/00002"] != nothing
    assert (
        "5 of 8 frames have no picture, such as a/00011.png: 3 have the values of the last frame before in their "
        "video, 2 have none before and zeros (Neutral, no action unit)"
    ) in capsys.readouterr().out


def submission_lines(path: Path) -> list[tuple[str, int]]:
    """Image and expression of every line."""
    cells = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return [(image, int(expression)) for image, _, _, expression, *_ in cells]


def test_the_challenges_file_of_some_frames_of_a_video_has_a_line_for_each(run, tmp_path, capsys):
    video = write_video(tmp_path / "clip.mp4", frames=7)
    for name in ("out.csv", "out.txt"):
        run_predict(run, video, tmp_path / name, "--every-frames", "3")
    wanted = [(row["image"], EXPRESSIONS.index(row["expression"])) for row in read_rows(tmp_path / "out.csv")]
    assert submission_lines(tmp_path / "out.txt") == wanted
    assert [image for image, _ in wanted] == [f"clip/{n:05d}.jpg" for n in (1, 4, 7)]
    assert "no picture" not in capsys.readouterr().out


def test_the_challenges_file_of_a_set_has_a_line_for_each_of_its_rows_also_where_some_are_left_out(
    run, faces, tmp_path, capsys
):
    names = sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg"))[:9]
    splits = ["train", "val", "train", "test", "val", "train", "train", "train", "val"]
    lines = [f"{name},1,{split}" for name, split in zip(names, splits, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["image,expression,split", *lines]))
    create(str(tmp_path / "t.csv"), str(tmp_path), views=("cropped",), jobs=1, table=TableOptions(images=faces))
    capsys.readouterr()
    for name in ("out.csv", "out.txt"):
        run_predict(run, tmp_path / "cropped" / "val", tmp_path / name)
    rows = read_rows(tmp_path / "out.csv")
    assert [int(row["row"]) for row in rows] == [1, 4, 8]
    wanted = [(row["image"], EXPRESSIONS.index(row["expression"])) for row in rows]
    assert submission_lines(tmp_path / "out.txt") == wanted
    assert [image for image, _ in wanted] == [names[row] for row in (1, 4, 8)]
    assert "no picture" not in capsys.readouterr().out


def test_ctrl_c_does_not_wait_for_what_threads_are_reading():
    is_begun, is_free = threading.Event(), threading.Event()

    def wait() -> None:
        is_begun.set()
        is_free.wait()

    def interrupted() -> None:
        with DaemonThreads(1, "test") as pool:
            pool.submit(wait)
            is_begun.wait()
            raise KeyboardInterrupt

    def closed() -> None:
        reading = read_in_order(lambda path: is_free.wait() if path else None, ["", "slow"], workers=2, ahead=1)
        assert next(reading) is None
        reading.close()  # as Python does where Ctrl-C comes while a batch is predicted

    try:
        with pytest.raises(KeyboardInterrupt):
            DaemonThreads(1, "interrupted").submit(interrupted).result(timeout=30)
        DaemonThreads(1, "closed").submit(closed).result(timeout=30)
    finally:
        is_free.set()


def test_a_video_without_a_count_of_frames_is_refused_where_it_ends_before_its_time(tmp_path):
    # At any frame rate: the second has most of its frames in its first second.
    for times in (range(100), [*range(20), *range(20, 2000, 100)]):
        whole = write_video(tmp_path / "whole.mkv", times=times)
        assert count_frames(whole) == len(times)
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(InputError, match=r"video .*cut\.mkv is cut short: its header says \d+\.\d s, and it ends"):
            open_frames(str(cut), scratch=tmp_path)


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV writes no H.264")
def test_an_mp4_that_was_cut_is_refused_at_once_though_its_table_of_frames_is_whole(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "predict_frames", lambda *args, **options: pytest.fail("predicted"))
    whole = write_video(tmp_path / "whole.mp4", frames=100, codec="libx264", movflags="faststart")
    assert count_frames(whole) == 100
    for share in (0.5, 0.97):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        with pytest.raises(InputError, match=r"video .*cut\.mp4 is cut short or damaged after frame \d+ of 100; get"):
            run_predict(run, cut, tmp_path / "out.csv")
    assert not list(tmp_path.glob("*out.csv*"))


def test_frames_that_an_edit_list_hides_are_not_missed(run, tmp_path, capsys):
    write_video(tmp_path / "whole.mp4", frames=50)
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "edited.mp4"), "w") as edited:
        stream = edited.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):  # as ffmpeg -ss 0.8 -c copy: what is before 0 is there, and not shown
            if packet.size:
                packet.stream = stream
                packet.pts -= int(Fraction("0.8") / packet.time_base)
                packet.dts -= int(Fraction("0.8") / packet.time_base)
                edited.mux(packet)
    with av.open(str(tmp_path / "edited.mp4")) as edited:
        assert edited.streams.video[0].frames == 50
    run_predict(run, tmp_path / "edited.mp4", tmp_path / "out.csv")
    assert len(read_rows(tmp_path / "out.csv")) == 30
    assert "could be decoded" not in capsys.readouterr().out


@pytest.mark.parametrize("more", [(), ("--every-frames", "50"), ("--processes", "2", "--batch", "4")])
def test_a_video_of_which_too_few_frames_can_be_decoded_is_refused(run, tmp_path, monkeypatch, more):
    video = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(inputs, "count_frames", lambda path: 15)
    with pytest.raises(InputError, match=r"video .*clip\.mp4 has 15 frames, and 12 could be decoded; get the whole"):
        run_predict(run, video, tmp_path / "out.csv", *more)
    assert not list(tmp_path.glob("*out.csv*"))


def test_a_frame_or_two_fewer_are_a_note(run, tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(inputs, "count_frames", lambda path: 14)
    run_predict(run, video, tmp_path / "out.csv")
    assert len(read_rows(tmp_path / "out.csv")) == 12
    assert "clip.mp4 says it has 14 such frames; 12 could be decoded" in capsys.readouterr().out


def test_a_video_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("12:30.mp4", frames=2)
    video = open_frames("12:30.mp4", scratch=tmp_path)
    assert video.names(np.array([1])) == ["12:30/00002.jpg"]
    assert len(next(video.batches(80, batch=4, workers=0, part=0, num_parts=1)).rows) == 2


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("PNG", m) for m in ("RGB", "L", "P", "RGBA")), ("WEBP", "RGB"), ("BMP", "L"), ("GIF", "P"), ("TIFF", "RGB")],
)
def test_a_picture_is_read_as_pil_reads_it_whatever_its_name(tmp_path, kind, mode):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "face.png", kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / "face.png"), np.asarray(image.convert("RGB")))
    assert read_image(tmp_path / "face.png", 16).shape == (16, 16, 3)


def test_files_that_are_no_whole_picture_are_named(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(data, "PNG")
    deep = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
    flipped = bytearray(data.getvalue())
    flipped[len(flipped) // 2] ^= 255
    cases = {"cut": data.getvalue()[:900], "flipped": bytes(flipped), "deep": deep.getvalue(), "text": b"no picture"}
    for name, content in cases.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.png (cannot be decoded|is not read)") as error:
            read_image(tmp_path / f"{name}.png", 32)
        assert isinstance(error.value, BadImage) == (name != "deep"), "a whole picture is not left out as a bad one"
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")


def make_bad_inputs(root: Path) -> dict[str, tuple[Path, str]]:
    """Bad sources by name, each with a pattern of its message."""
    (root / "garbage.mp4").write_bytes(b"this is no video" * 99)
    whole = write_video(root / "whole.mp4")
    (root / "cut.mp4").write_bytes(whole.read_bytes()[:-400])  # the table of frames is at its end
    (root / "list.txt").write_text("a/1.jpg\nb/2.jpg\n")
    (root / "words.txt").write_text("image\na/1.jpg\nsome words\n")
    (root / "heic.txt").write_text("a/1.heic\na/2.jpg\n")
    (root / "empty.txt").write_text("image\n")
    (root / "notes.md").write_text("image\n")
    (root / "nothing").mkdir()
    (root / "both").mkdir()
    (root / "both" / "1.jpg").touch()
    (root / "both" / "2.mp4").touch()
    return {
        "garbage": (root / "garbage.mp4", r"video .*garbage\.mp4 cannot be read: Invalid data"),
        "cut video": (root / "cut.mp4", r"video .*cut\.mp4 cannot be read"),
        "no video": (root / "gone.mp4", r"video .*gone\.mp4 does not exist"),
        "missing images": (root / "list.txt", r"2 of 2 images of .*list\.txt do not exist below .*: a/1.jpg, b/2.jpg"),
        "words in a list": (root / "words.txt", r"words\.txt:3: 'some words' is no image path"),
        "a first line that is no header": (root / "heic.txt", r"heic\.txt:1: 'a/1\.heic' is no image path"),
        "empty list": (root / "empty.txt", r"empty\.txt names no image"),
        "no list": (root / "gone.txt", r"gone\.txt cannot be read"),
        "foreign file": (root / "notes.md", r"notes\.md is no image, video or list by its name"),
        "empty directory": (root / "nothing", r"no images at .*nothing"),
        "no directory": (root / "nosuch", r"--input .*nosuch does not exist"),
        "images and videos": (
            root / "both",
            r"both holds images and videos \(1, such as 1\.jpg, and 1, such as 2\.mp4",
        ),
        "no image": (root / "gone.png", r"image .*gone\.png does not exist"),
    }


def test_bad_input_is_one_message_that_names_it_and_nothing_is_written(run, tmp_path):
    out = tmp_path / "results" / "out.csv"
    for name, (source, pattern) in make_bad_inputs(tmp_path).items():
        with pytest.raises(InputError, match=pattern):
            run_predict(run, source, out)
        assert not out.parent.exists(), name


def test_bad_options_are_refused_before_anything_is_predicted(run, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "predict_frames", lambda *args, **options: pytest.fail("predicted"))
    (tmp_path / "out.csv").write_text("an earlier file")
    (tmp_path / "dir.csv").mkdir()
    cases = [
        ((run, faces, "out.json"), r"--out is out\.json; expected a name that ends with"),
        ((run, faces, tmp_path / "out.csv", "--every-frames", "2"), "--every-frames is for videos"),
        ((run, faces, tmp_path / "out.csv", "--images", "x"), "--images tells where the paths of a list start"),
        ((run, faces, tmp_path / "out.csv", "--batch", "0"), "--batch is 0; expected 1 or more"),
        ((run, write_video(tmp_path / "a, b.mp4"), tmp_path / "out.txt"), "'a, b' has a comma or newline in its name"),
        ((run, tmp_path / "list.txt", f"{tmp_path}/list.txt"), "the --input itself, which it would replace"),
        ((run, faces, tmp_path / "dir.csv"), r"dir\.csv, a directory; give a file's name"),
        ((run, faces, tmp_path / "out.csv/out.csv"), r"^\S*/out\.csv cannot be written to: it is a file"),
        ((run, tmp_path / "a, b.mp4", "out.csv", "--skip-bad-images"), r"for image files, and .* is a video"),
        ((run, tmp_path / "a, b.mp4", "out.csv", "--exif", "ignore"), r"--exif is for image files, and .* is a video"),
        ((tmp_path, faces, tmp_path / "out.csv"), "has no committed checkpoint"),
        (
            (run / "checkpoints" / "step_000000099_00000000", faces, tmp_path / "out.csv"),
            "000000099_0.* does not exist",
        ),
    ]
    for args, pattern in cases:
        with pytest.raises(InputError, match=pattern):
            run_predict(*args)
    assert (tmp_path / "out.csv").read_text() == "an earlier file"


def test_a_folder_is_listed_through_links_once_and_never_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for directory in (folder / "own", elsewhere):
        directory.mkdir(parents=True)
        (directory / "1.jpg").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "own" / "2.jpg").symlink_to(elsewhere / "1.jpg")
    (folder / "own" / "up").symlink_to(folder)
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (elsewhere / "back").symlink_to(folder)
    (folder / f"{storage.PART_PREFIX}1.jpg").touch()
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "1.jpg").touch()
    assert open_frames(str(folder), scratch=tmp_path).listed == ("linked/1.jpg", "own/1.jpg", "own/2.jpg")
    # What is deleted is what is really there.
    stored = [name for name, _ in storage.list_objects(str(folder))]
    assert stored == [".thumbnails/1.jpg", "own/1.jpg", "own/2.jpg"]
    storage.delete_all(str(folder))
    assert (elsewhere / "1.jpg").exists()
    assert not folder.exists()
    assert storage.list_objects(str(folder)) == []


def refuse(monkeypatch, function: str, refused: Path | str) -> None:
    """Refuse one path to os.<function>, as a file system does to everyone but root."""
    real = getattr(os, function)

    def guarded(path, *args, **options):
        if str(path) == str(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, function, guarded)


def test_what_may_not_be_read_is_one_message_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    for name in ("1.jpg", "own/2.jpg"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        refuse(patch, "scandir", tmp_path / "own")
        with pytest.raises(InputError, match=rf"{tmp_path}/own cannot be listed: Permission denied; change its"):
            open_frames(str(tmp_path), scratch=tmp_path)
    with monkeypatch.context() as patch:
        refuse(patch, "stat", tmp_path / "own/2.jpg")
        for read in (
            lambda: storage.exists(f"{tmp_path}/own/2.jpg"),
            lambda: find_images(str(tmp_path), "own", ["2.jpg"]),
        ):
            with pytest.raises(InputError, match=rf"{tmp_path}/own/2\.jpg may not be .* by this user"):
                read()
    monkeypatch.setattr(Path, "open", lambda path, *args: (_ for _ in ()).throw(PermissionError(13, "denied")))
    for read in (storage.read_bytes, read_image, read_test_list):
        with pytest.raises(InputError, match=rf"{tmp_path}/1\.jpg may not be read by this user"):
            read(f"{tmp_path}/1.jpg")


def test_a_store_that_is_away_is_no_fault_of_the_list(tmp_path, monkeypatch):
    def read_bytes(uri: str, **options):
        raise StorageError(f"{uri}: no answer")

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    for read in (read_test_list, lambda uri: open_frames(uri, scratch=tmp_path)):
        with pytest.raises(StorageError, match="no answer"):
            read("s3://mtl/list.txt")


@pytest.mark.parametrize("command", ["predict", "export", "ensemble", "report"])
def test_results_that_would_go_with_a_ray_job_are_refused(run, faces, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as `ray job submit` does
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    args = {
        "predict": ["--runs", str(run), "--input", str(faces), "--out", "out.csv"],
        "export": [str(run), "--out", "out", "--formats", "safetensors"],
        "ensemble": ["--runs", str(run), "--out", "out"],
        "report": [str(run), "--out", "out"],
    }[command]
    done = run_here(f"mtl_dist.{command}", *args)
    assert_one_message(done, "--out is out", "inside the working directory of a Ray job")
    assert not list(tmp_path.iterdir())


def test_names_that_no_table_can_hold_are_refused_at_once(run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    odd = os.fsdecode(b"caf\xe9")
    (folder / f"{odd}.jpg").touch()
    for source in (folder, folder / f"{odd}.jpg", write_video(tmp_path / f"{odd}.mp4", frames=1)):
        with pytest.raises(InputError, match=r"file name 'caf\\udce9(\.jpg)?' is not UTF-8"):
            run_predict(run, source, tmp_path / "out.csv")


def test_a_checkpoint_is_found_however_its_path_is_written(run, monkeypatch):
    chosen = best(committed(str(run))[0]).uri
    monkeypatch.chdir(run)
    for name in (f"checkpoints/{Path(chosen).name}", f"{run}//checkpoints/./{Path(chosen).name}/", f"file://{chosen}"):
        assert open_weights(name).uri == chosen


def test_a_copy_of_a_checkpoint_outside_its_run_is_its_weights_too(run, tmp_path):
    chosen = best(committed(str(run))[0])
    copy = Path(shutil.copytree(chosen.uri, tmp_path / Path(chosen.uri).name))
    weights = open_weights(str(copy))
    assert (weights.uri, weights.checkpoint.files, weights.newest_step) == (str(copy), chosen.files, chosen.step)
    mine, theirs = (load_weights(opened).state_dict() for opened in (weights, open_weights(str(run))))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_of_other_classes_is_refused_by_its_own_name_too(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rewrite_state(tmp_path / "run", classes={"expressions": [*EXPRESSIONS[::-1]], "aus": list(AUS)})
    chosen = best(committed(f"{tmp_path}/run")[0]).uri
    for name in (chosen, f"{tmp_path}/run"):
        with pytest.raises(InputError, match=rf"^{chosen} has other classes"):
            open_weights(name)


def test_a_run_whose_checkpoints_are_unfinished_is_refused(run, faces, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for commit in tmp_path.glob(f"run/checkpoints/*/{COMMIT}"):
        commit.unlink()
    checkpoint = next(tmp_path.glob("run/checkpoints/*"))
    for name in (tmp_path / "run", checkpoint):
        with pytest.raises(InputError, match=rf"checkpoint.*{checkpoint.name[:5]}.*its save did not finish"):
            run_predict(name, faces, tmp_path / "out.csv")
    with pytest.raises(InputError, match="is not in its run"):
        run_predict(checkpoint.rename(tmp_path / checkpoint.name), faces, tmp_path / "out.csv")


def test_an_unreadable_video_ends_the_command_with_exit_code_2(run, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    done = run_here("mtl_dist.predict", "--runs", run, "--input", tmp_path / "bad.mp4", "--out", tmp_path / "o.csv")
    assert_one_message(done, "bad.mp4 cannot be read")
    assert not (tmp_path / "o.csv").exists()


def test_without_pyav_a_video_is_refused_with_what_to_install(run, tmp_path, monkeypatch):
    video = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)  # what makes Python say that there is no such module
    with pytest.raises(InputError, match=r"pip install 'mtl_dist\[video\]'"):
        run_predict(run, video, tmp_path / "out.csv")


def test_images_and_videos_are_read_from_s3_and_predictions_written_there(run, faces, s3, tmp_path):
    names = sorted(path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg"))[:3]
    for name in names:
        storage.upload(faces / name, f"s3://mtl/predict/faces/{name}")
    storage.write_bytes("s3://mtl/predict/list.txt", "\n".join(names).encode())
    storage.upload(write_video(tmp_path / "clip.mp4"), "s3://mtl/predict/clip.mp4")
    for source, more in (("faces", ()), ("list.txt", ("--images", "s3://mtl/predict/faces"))):
        run_predict(run, f"s3://mtl/predict/{source}", "s3://mtl/predict/out.csv", *more)
        (tmp_path / "out.csv").write_bytes(storage.read_bytes("s3://mtl/predict/out.csv"))
        assert [row["image"] for row in read_rows(tmp_path / "out.csv")] == names
    video = open_frames("s3://mtl/predict/clip.mp4", every=5, scratch=tmp_path)
    assert (video.num_frames, video.names(np.array([5]))) == (3, ["clip/00006.jpg"])
