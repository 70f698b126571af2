"""WebDataset tars of others become the shards that a table of the same pictures and labels becomes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import simplejpeg
import webdataset
from numpy.random import default_rng

from mtl_dist import storage
from mtl_dist.data import as_webdataset
from mtl_dist.data.index import read_index
from mtl_dist.errors import InputError
from mtl_dist.shards import adopt
from mtl_dist.shards.__main__ import create
from mtl_dist.shards.columns import Columns, TableOptions
from mtl_dist.tasks import AUS

CROPPED = {"views": ("cropped",), "jobs": 1}
PICTURES = [simplejpeg.encode_jpeg(default_rng(n).integers(0, 255, (16, 16, 3), "uint8")) for n in range(12)]


def label(n: int) -> dict:
    return {
        "va": [n / 20, -n / 20] if n % 3 else None,
        "expr": n % 8,
        "au": [n % 2] * 11 + [None],
        "who": {"id": f"p{n // 4}"},
    }


def write_tars(place: Path, name: str, samples: list[list[dict]]) -> None:
    """Write tars as people do, with webdataset's own writer."""
    place.mkdir(parents=True, exist_ok=True)
    for number, tar in enumerate(samples):
        with webdataset.TarWriter(str(place / name.format(number)), mtime=0) as writer:
            for sample in tar:
                writer.write(sample)


def faces(*, suffix: str = "jpg", key: str = "v{}/{:05}") -> list[list[dict]]:
    made = [{"__key__": key.format(n // 3, n), suffix: PICTURES[n], "json": label(n)} for n in range(12)]
    return [made[:5], made[5:9], made[9:]]


def labels_of(dest: Path) -> dict:
    """Return what stock tools read of the sets, by split: {image: (the other labels, the picture)}."""
    found = {}
    for split in ("train", "val"):
        found[split] = {}
        for sample in as_webdataset(str(dest / "cropped" / split)):
            text = json.loads(sample["json"])
            found[split][text.pop("image")] = ({k: v for k, v in text.items() if k != "row"}, sample["jpg"])
    return found


def test_tars_become_what_a_table_of_the_same_becomes(tmp_path):
    write_tars(tmp_path / "wds", "faces-{:03}.tar", faces())
    create(str(tmp_path / "wds" / "faces-{000..002}.tar"), str(tmp_path / "adopted"), val_fraction=0.3, **CROPPED)
    lines = [["image", "video", "valence", "arousal", "expression", *(f"AU{number}" for number in AUS)]]
    for n in range(12):
        (path := tmp_path / "images" / f"v{n // 3}" / f"{n:05}.jpg").parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURES[n])
        va, au = label(n)["va"] or ["", ""], ["" if unit is None else unit for unit in label(n)["au"]]
        lines.append([f"v{n // 3}/{n:05}.jpg", f"v{n // 3}", *va, label(n)["expr"], *au])
    (table := tmp_path / "images" / "t.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    create(str(table), str(tmp_path / "expected"), val_fraction=0.3, **CROPPED)
    assert labels_of(tmp_path / "adopted") == labels_of(tmp_path / "expected")
    assert sum(map(len, labels_of(tmp_path / "adopted").values())) == 12


def test_cls_and_png_and_a_column_map(tmp_path, capsys):
    png = _png(PICTURES[0])
    write_tars(
        tmp_path,
        "{}.tar",
        [
            [
                {
                    "__key__": f"{n:04}",
                    "png": png[:-12] + bytes(n) + png[-12:],
                    "cls": str(n % 8),
                    "json": {"v": 0.5, "a": n / 20},
                }
                for n in range(10)
            ]
        ],
    )
    columns = Columns(valence="v", arousal="a")
    options = TableOptions(columns=columns, expressions=("7=-",))
    create(str(tmp_path / "0.tar"), str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    found = labels_of(tmp_path / "dest")
    both = found["train"] | found["val"]
    assert {name: text["expr"] for name, (text, _) in both.items()} == {
        f"{n:04}.png": None if n == 7 else n % 8 for n in range(10)
    }
    assert both["0004.png"][0]["va"] == [0.5, 0.2]
    # Keys without a directory are no film of one video: each stands alone, and that is said.
    assert "note: 10 pictures are of no directory" in capsys.readouterr().out
    assert {text["video"] for text, _ in both.values()} == set(both)


def _png(jpeg: bytes) -> bytes:
    from PIL import Image

    Image.open(io.BytesIO(jpeg)).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def test_tars_that_are_numbered_have_the_videos_of_the_names_in_their_json(tmp_path, capsys):
    """As ours are."""
    numbered = [
        [sample | {"__key__": f"{n:09}", "json": sample["json"] | {"image": f"{sample['__key__']}.jpg"}}]
        for n, sample in enumerate(sample for tar in faces() for sample in tar)
    ]
    write_tars(tmp_path, "{:02}.tar", numbered)
    create(str(tmp_path / "{00..11}.tar"), str(tmp_path / "dest"), val_fraction=0.3, **CROPPED)
    found = labels_of(tmp_path / "dest")
    videos = [{text["video"] for text, _ in rows.values()} for rows in found.values()]
    assert not videos[0] & videos[1]
    assert videos[0] | videos[1] == {"v0", "v1", "v2", "v3"}
    assert "stands alone" not in capsys.readouterr().out


def test_pictures_of_a_person_stand_together(tmp_path):
    write_tars(tmp_path, "{}.tar", faces(key="{}_{}"))
    options = TableOptions(columns=Columns(person="who.id"))
    create(str(tmp_path / "{0..2}.tar"), str(tmp_path / "dest"), val_fraction=0.4, table=options, **CROPPED)
    found = labels_of(tmp_path / "dest")
    people = {split: {text["video"] for text, _ in rows.values()} for split, rows in found.items()}
    assert not people["train"] & people["val"]
    assert people["train"] | people["val"] == {"person: p0", "person: p1", "person: p2"}


def test_a_second_set_of_tars_is_the_validation_part_and_keys_may_repeat_by_tar(tmp_path):
    samples = faces(key="{}_{}")
    numbered = [[sample | {"__key__": f"{n:04}"} for n, sample in enumerate(tar)] for tar in samples]
    write_tars(tmp_path / "train", "{}.tar", numbered[:2])
    write_tars(tmp_path / "val", "{}.tar", numbered[2:])
    source, val = str(tmp_path / "train" / "{0..1}.tar"), str(tmp_path / "val" / "0.tar")
    with pytest.raises(InputError, match=r"train/1.tar, sample '0000': .* is another picture.*--name-by-tar"):
        create(source, str(tmp_path / "dest"), table=TableOptions(val_table=val), **CROPPED)
    assert not (tmp_path / "dest").exists()
    create(source, str(tmp_path / "dest"), table=TableOptions(val_table=val, name_by_tar=True), **CROPPED)
    found = labels_of(tmp_path / "dest")
    assert set(found["val"]) == {f"val/0/{n:04}.jpg" for n in range(3)}
    assert len(found["train"]) == 9
    assert "train/1/0003.jpg" in found["train"]
    assert found["train"]["train/1/0003.jpg"][1] == PICTURES[8]


def test_no_tar_lays_its_pictures_over_those_of_another(tmp_path):
    """One that was unpacked is not looked at again: its labels would get another's pictures."""
    write_tars(tmp_path, "a{}.tar", [[{"__key__": "x/1", "jpg": PICTURES[0], "cls": "1"}]])
    write_tars(tmp_path, "b{}.tar", [[{"__key__": "x/1", "jpg": PICTURES[1], "cls": "2"}]])
    images = tmp_path / "images"
    for name, picture in (("a0", 0), ("b0", 0), ("a0", 0)):
        job = adopt.Unpacking(str(tmp_path / f"{name}.tar"), "", images, tmp_path / f"{name}.json")
        if name == "b0":
            with pytest.raises(InputError, match=r"b0.tar, sample 'x/1': .*x/1.jpg is another picture"):
                adopt.unpack_tar(job)
        else:
            adopt.unpack_tar(job)
        assert (images / "x" / "1.jpg").read_bytes() == PICTURES[picture]
    assert {path.name for path in (images / "x").iterdir()} == {"1.jpg"}


def test_a_film_that_goes_on_in_the_next_tar_is_one_video(tmp_path):
    write_tars(tmp_path, "{}.tar", faces())
    options = TableOptions(name_by_tar=True)
    create(str(tmp_path / "{0..2}.tar"), str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    videos = [{text["video"] for text, _ in rows.values()} for rows in labels_of(tmp_path / "dest").values()]
    assert not videos[0] & videos[1]
    assert videos[0] | videos[1] == {"v0", "v1", "v2", "v3"}


def test_what_was_unpacked_stays_with_images_and_a_tar_that_was_replaced_is_unpacked_again(tmp_path, monkeypatch):
    write_tars(tmp_path / "wds", "{}.tar", faces())
    source, options = str(tmp_path / "wds" / "{0..2}.tar"), TableOptions(images=tmp_path / "images")
    unpacked = []
    unpack = adopt.unpack_tar
    monkeypatch.setattr(adopt, "unpack_tar", lambda job: (unpacked.append(Path(job.uri).name), unpack(job)))
    (tmp_path / "wds" / "1.tar").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"1.tar does not exist"):
        create(source, str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    cut = (tmp_path / "away").read_bytes()
    (tmp_path / "wds" / "1.tar").write_bytes(cut[: len(cut) // 2 - 100])
    with pytest.raises(InputError, match=r"1.tar cannot be read"):
        create(source, str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    (tmp_path / "away").replace(tmp_path / "wds" / "1.tar")
    create(source, str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    create(source, str(tmp_path / "dest"), val_fraction=0.3, table=options, **CROPPED)
    assert unpacked == ["0.tar", "1.tar", "1.tar", "2.tar"]
    assert len(list((tmp_path / "images").glob("v*/*.jpg"))) == 12


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"json": {"expr": 1}}, r"sample 'a/1' has json; expected a picture"),
        ({"jpg": PICTURES[0], "png": PICTURES[1], "json": {}}, r"has jpg, png, json"),
        ({"jpg": PICTURES[0], "json": b"[1]"}, r"its json is no object"),
        ({"jpg": PICTURES[0], "json": b"{"}, r"its labels cannot be read"),
        ({"jpg": PICTURES[0], "json": b"[" * 100_000}, r"nested too deeply|cannot be read"),
        ({"jpg": PICTURES[0], "json": b" " * (adopt.MAX_LABEL_BYTES + 1)}, r"json has more than"),
        ({"jpg": PICTURES[0], "json": {"expr": 1, "expression": 2}}, r"expression is in it twice"),
        ({"jpg": PICTURES[0], "json": {"expr": 9}}, r"expression is '9'.*'a/1.jpg'"),
        ({"jpg": PICTURES[0], "json": {"mood": 9}}, r"no labels"),
        ({"jpg": b"no picture", "json": {"expr": 1}}, r"a/1.jpg"),
    ],
)
def test_what_is_wrong_is_named_by_tar_and_sample_and_nothing_is_written(tmp_path, sample, words):
    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds" / "x.tar", "w") as tar:
        for suffix, value in sample.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(f"a/1.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for key in ("b/2", "c/3"):
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(PICTURES[2])
            tar.addfile(member, io.BytesIO(PICTURES[2]))
    with pytest.raises(InputError, match=words):
        create(str(tmp_path / "wds" / "x.tar"), str(tmp_path / "dest"), val_fraction=0.5, **CROPPED)
    assert not list((tmp_path / "dest").rglob("index.json"))


@pytest.mark.parametrize("name", ["../../up.jpg", "/etc/up.jpg", "a/../../up.jpg"])
def test_a_member_cannot_leave_the_directory(tmp_path, name):
    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds" / "x.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(PICTURES[0])
        tar.addfile(member, io.BytesIO(PICTURES[0]))
    job = adopt.Unpacking(str(tmp_path / "wds" / "x.tar"), "", tmp_path / "images", tmp_path / "part.json")
    with pytest.raises(InputError, match=r"x.tar, sample .*: not a name"):
        adopt.unpack_tar(job)
    assert not list(tmp_path.rglob("up.jpg"))
    assert not (tmp_path.parent / "up.jpg").exists()


def test_a_name_is_no_command(tmp_path):
    """webdataset opens `pipe:` in a shell; a source is a path, an s3:// name, or nothing."""
    with pytest.raises(InputError, match="does not exist"):
        create(f"pipe:touch {tmp_path}/ran; cat x.tar", str(tmp_path / "dest"), val_fraction=0.5, **CROPPED)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("x-{0..2.tar", {}, "unbalanced braces"),
        ("x-{0..9999999999}.tar", {}, "more than 1,000,000 tars"),
        ("s3://bucket/faces", {}, "of s3:// tars are read"),
        ("x.csv", {"name_by_tar": True}, "--name-by-tar is for the tars"),
        ("x.csv", {"val_table": "v.tar"}, "expected two of a kind"),
        ("x.tar", {"unlabelled": True}, "--unlabelled is for a directory of pictures"),
    ],
)
def test_sources_that_are_no_tars(tmp_path, source, options, words):
    with pytest.raises(InputError, match=words):
        create(source, str(tmp_path / "dest"), table=TableOptions(**options), **CROPPED)


def test_two_views_are_refused_before_anything_is_unpacked(tmp_path):
    write_tars(tmp_path, "{}.tar", faces())
    with pytest.raises(InputError, match=r"is of one view"):
        create(str(tmp_path / "{0..2}.tar"), str(tmp_path / "dest"), val_fraction=0.3, jobs=1)


@pytest.mark.whole
def test_tars_on_s3_by_the_command_line_with_two_processes(s3, tmp_path):
    write_tars(tmp_path, "{}.tar", faces())
    for number in range(3):
        storage.upload(tmp_path / f"{number}.tar", f"s3://mtl/adopt/wds/faces-{number}.tar")
    command = [
        sys.executable,
        "-m",
        "mtl_dist.shards",
        "create",
        "s3://mtl/adopt/wds/faces-{0..2}.tar",
        "s3://mtl/adopt/dest",
    ]
    options = ["--views", "cropped", "--val-fraction", "0.3", "--jobs", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    indexes = [read_index(f"s3://mtl/adopt/dest/cropped/{split}") for split in ("train", "val")]
    assert sum(index.rows for index in indexes) == 12
    create(str(tmp_path / "{0..2}.tar"), str(tmp_path / "local"), val_fraction=0.3, **CROPPED)
    for split, index in zip(("train", "val"), indexes):
        assert read_index(str(tmp_path / "local" / "cropped" / split)).shards == index.shards


# ---------------------------------------------------------------------------------------------- pictures without labels


def write_pictures(place: Path) -> None:
    for n, name in enumerate(("a/1.jpg", "a/2.jpg", "b/deep/3.JPG", "c/4.png", "c/5.jpg", "alone.jpg")):
        (path := place / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(PICTURES[n]) if name.endswith("png") else PICTURES[n])
    (place / ".git").mkdir()
    (place / ".git" / "6.jpg").write_bytes(PICTURES[6])
    (place / "a" / "notes.txt").write_text("no picture")


def test_a_directory_of_pictures_becomes_a_set_without_labels_whose_directories_stay_together(tmp_path):
    write_pictures(tmp_path / "faces")
    options = TableOptions(unlabelled=True)
    create(str(tmp_path / "faces"), str(tmp_path / "dest"), val_fraction=0.4, table=options, **CROPPED)
    found = labels_of(tmp_path / "dest")
    names = {split: set(rows) for split, rows in found.items()}
    assert names["train"] | names["val"] == {"a/1.jpg", "a/2.jpg", "b/deep/3.JPG", "c/4.png", "c/5.jpg", "alone.jpg"}
    directories = [{name.rpartition("/")[0] for name in each} for each in names.values()]
    assert not directories[0] & directories[1]
    for text, _ in (found["train"] | found["val"]).values():
        assert (text["va"], text["expr"], text["au"]) == (None, None, None)
    index = read_index(str(tmp_path / "dest" / "cropped" / "train"))
    assert index.labels.unlabelled == index.rows == len(names["train"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dest").rglob("*.tar")}
    create(str(tmp_path / "faces"), str(tmp_path / "dest"), val_fraction=0.4, table=options, **CROPPED)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dest").rglob("*.tar")} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "holds no pictures"),
        ({"expressions": ("7=-",)}, "--expressions describes labels"),
        ({"table_format": "affectnet"}, "--table-format describes labels"),
    ],
)
def test_what_is_no_directory_of_pictures_is_refused(tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        create(
            str(tmp_path / "empty"), str(tmp_path / "dest"), table=TableOptions(unlabelled=True, **options), **CROPPED
        )
    with pytest.raises(InputError, match="is not a directory"):
        create(str(tmp_path / "absent"), str(tmp_path / "dest"), table=TableOptions(unlabelled=True), **CROPPED)
