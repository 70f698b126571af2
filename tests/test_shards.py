"""Shard sets: the same bytes when made twice, killed or not; plain tars to others; every damage is found."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist import storage
from mtl_dist.data import as_webdataset
from mtl_dist.data.decode import decode
from mtl_dist.data.index import INDEX_NAME, Index, dump_index, read_index, read_sets
from mtl_dist.data.sidecar import dump_sidecar, parse_sidecar, read_about
from mtl_dist.errors import Damaged, InputError
from mtl_dist.shards import skipping, ustar, writer
from mtl_dist.shards.__main__ import create, inspect, verify
from mtl_dist.shards.annotations import FILES, Annotations, read_annotations
from mtl_dist.shards.claims import CLAIM_PREFIX
from mtl_dist.shards.columns import Columns, TableOptions
from mtl_dist.shards.overlap import find_shared
from mtl_dist.shards.sheet import choose_samples, draw_sheet
from mtl_dist.tasks import AUS, EXPRESSIONS, SPLITS, VIEWS
from tests.conftest import REPO, assert_one_message, run_here, run_module, write_dataset

SETS = [(view, split) for view in VIEWS for split in SPLITS]
each_set = pytest.mark.parametrize(("view", "split"), SETS)


def read_tree(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name, _ in storage.list_objects(str(root))}


def read_rows(dataset: Path, split: str) -> list[dict]:
    """The annotation file by another parser: image, valence, arousal, expression, 12 action units."""
    with (dataset / FILES[split]).open() as file:
        lines = list(csv.reader(file))[1:]
    rows = []
    for number, (image, *text) in enumerate(lines):
        va, expr, au = [float(value) for value in text[:2]], int(text[2]), [int(value) for value in text[3:]]
        rows.append(
            {
                "row": number,
                "image": image,
                "va": va if va != [-5, -5] else None,
                "expr": expr if expr >= 0 else None,
                "au": [None if value < 0 else value for value in au] if set(au) != {-1} else None,
            }
        )
    return rows


def assert_labels(found: dict, expected: dict) -> None:
    assert {**found, "va": None} == {**expected, "va": None}
    assert found["va"] == (None if expected["va"] is None else pytest.approx(expected["va"], abs=1e-6))


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """A copy of the session's shards that a test may damage."""
    shutil.copytree(shards, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.mark.whole
def test_made_twice_every_byte_is_the_same_whatever_the_number_of_processes(dataset, shards, tmp_path):
    create(str(dataset), str(tmp_path / "again"), frames_per_shard=7, jobs=2)
    again = read_tree(tmp_path / "again")
    assert len(again) == 2 * (2 * 6 + 1) + 2 * (2 * 3 + 1)
    assert again == read_tree(shards)


def test_another_seed_puts_the_same_rows_elsewhere(dataset, shards, tmp_path):
    create(str(dataset), str(tmp_path), views=("cropped",), frames_per_shard=7, seed=1, jobs=1)
    rows = [rows_of(root / "cropped" / "train") for root in (shards, tmp_path)]
    assert rows[0] != rows[1]
    assert sorted(chain(*rows[0])) == sorted(chain(*rows[1])) == list(range(40))


def test_shards_are_cut_by_bytes(dataset, shards, tmp_path):
    create(str(dataset), str(tmp_path), views=("cropped",), shard_bytes=20_000, jobs=1)
    index = read_index(str(tmp_path / "cropped" / "train"))
    assert (index.frames_per_shard, index.shard_bytes) == (None, 20_000)
    contents = [entry.tar_bytes for entry in index.shards]
    assert len(contents) > 3
    assert max(contents) <= 20_000 + ustar.RECORD  # an archive ends with a padding
    assert min(contents[:-1]) > 10_000
    assert sorted(chain(*rows_of(tmp_path / "cropped" / "train"))) == list(range(40))
    create(str(dataset), str(tmp_path / "both"), views=("cropped",), shard_bytes=20_000, frames_per_shard=2, jobs=1)
    assert {entry.rows for entry in read_index(str(tmp_path / "both" / "cropped" / "train")).shards} == {2}


def test_an_image_larger_than_a_shard_has_one_of_its_own(dataset, tmp_path):
    create(str(dataset), str(tmp_path), views=("cropped",), shard_bytes=1, jobs=1)
    assert {entry.rows for entry in read_index(str(tmp_path / "cropped" / "train")).shards} == {1}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 6543, 8 << 20])
def test_a_member_header_is_that_of_tarfile(size):
    member = tarfile.TarInfo("012345678.json")
    member.size, member.mode = size, 0o444
    assert bytes(ustar.make_header(b"012345678.json", size)) == member.tobuf(tarfile.USTAR_FORMAT)


def test_an_archive_is_byte_for_byte_that_of_tarfile(shards):
    data = (shards / "cropped" / "train" / "shard-000001.tar").read_bytes()
    again = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as tar,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
    ):
        for member in tar:
            copied = tarfile.TarInfo(member.name)
            copied.size, copied.mode = member.size, 0o444
            copy.addfile(copied, tar.extractfile(member))
    assert again.getvalue() == data


@pytest.mark.whole
def test_a_run_killed_in_the_middle_continues_and_ends_like_an_undisturbed_one(tmp_path):
    source = write_dataset(tmp_path / "source", num_train=150, num_val=10, size=32)
    arguments = ["create", str(source), str(tmp_path / "killed"), "--frames-per-shard", "1", "--jobs", "1"]
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}  # what a killed process leaves there is ours
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl_dist.shards", *arguments], cwd=REPO, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").rglob("*.safetensors"))) < 20:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert 20 <= len(finished) < 320
    assert not list((tmp_path / "killed").rglob(INDEX_NAME)), "an index before its shards"
    create(str(source), str(tmp_path / "killed"), frames_per_shard=1, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished was made again"
    create(str(source), str(tmp_path / "whole"), frames_per_shard=1, jobs=1)
    assert read_tree(tmp_path / "killed") == read_tree(tmp_path / "whole")


def test_a_rerun_of_a_finished_set_writes_no_shard(dataset, copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("shard-*")}
    create(str(dataset), str(copied), frames_per_shard=7, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("shard-*")} == before


@pytest.mark.whole
@pytest.mark.parametrize(
    "lost",
    [
        "tar", "safetensors", "tar cut short", "sidecar cut short", "sidecar without a size", "sidecar changed",
        "sidecar changed, no index",
    ],
)  # fmt: skip
def test_a_rerun_repairs_what_is_lost_or_torn(dataset, shards, copied, lost):
    tar, sidecar = (copied / f"cropped/train/shard-000002.{suffix}" for suffix in ("tar", "safetensors"))
    match lost:
        case "tar":
            tar.unlink()
        case "safetensors":
            sidecar.unlink()
        case "tar cut short":
            os.truncate(tar, tar.stat().st_size - 512)
        case "sidecar cut short":
            os.truncate(sidecar, 100)
        case "sidecar without a size":  # its checksum is right
            data = sidecar.read_bytes()
            about = {key: value for key, value in read_about(data).items() if key != "tar_bytes"}
            sidecar.write_bytes(dump_sidecar(parse_sidecar(data), about))
        case _:  # a label that changed on disk must not be sealed by a new checksum
            flip_bit(sidecar, sidecar.stat().st_size - 1)
            if "no index" in lost:
                (sidecar.parent / INDEX_NAME).unlink()
    create(str(dataset), str(copied), frames_per_shard=7, jobs=1)
    assert read_tree(copied) == read_tree(shards)


def test_two_different_sets_made_at_once_at_one_place_are_not_mixed(dataset, tmp_path):
    # Both decide what to make before either writes a shard: the moment at which neither sees the other's shards.
    found = {split: read_annotations(dataset / FILES[split]) for split in SPLITS}
    dirs = {"cropped": dataset / "cropped"}
    with contextlib.ExitStack() as claims, contextlib.ExitStack() as others:
        plans = writer.plan_sets(found, dirs, str(tmp_path), seed=0, claims=claims)
        with pytest.raises(InputError, match=r"another set is being made at .*/cropped/train, as .*delete that file"):
            writer.plan_sets(found, dirs, str(tmp_path), seed=1, claims=others)
        with pytest.raises(InputError, match="another set is being made at"):  # of turned pictures, or not
            writer.plan_sets(found, dirs, str(tmp_path), seed=0, claims=others, exif="ignore")
        others.close()
        again = writer.plan_sets(found, dirs, str(tmp_path), seed=0, claims=others)  # the same bytes: allowed
        for planned in (plans, again):
            writer.write_sets(planned, jobs=1, progress=lambda rows: None)
    verify(str(tmp_path / "cropped" / "train"))
    assert not list(tmp_path.rglob(f"{CLAIM_PREFIX}*"))


def test_a_run_that_was_killed_while_it_made_a_set_does_not_keep_itself_out(dataset, tmp_path):
    found = {split: read_annotations(dataset / FILES[split]) for split in SPLITS}
    killed = contextlib.ExitStack()
    writer.plan_sets(found, {"cropped": dataset / "cropped"}, str(tmp_path), seed=0, claims=killed)
    with contextlib.ExitStack() as claims:
        plans = writer.plan_sets(found, {"cropped": dataset / "cropped"}, str(tmp_path), seed=0, claims=claims)
        indexes = writer.write_sets(plans, jobs=1, progress=lambda rows: None)
    assert [index.rows for index in indexes] == [40, 20]
    assert not list(tmp_path.rglob(f"{CLAIM_PREFIX}*"))
    verify(str(tmp_path / "cropped" / "val"))


@each_set
def test_tarfile_reads_every_row_with_its_image_and_labels(dataset, shards, view, split):
    expected, found = read_rows(dataset, split), {}
    for path in sorted((shards / view / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for (image_name, image), (json_name, text) in zip(members[::2], members[1::2], strict=True):
            labels = json.loads(text)
            assert (image_name, json_name) == (f"{labels['row']:09d}.jpg", f"{labels['row']:09d}.json")
            assert image == (dataset / view / labels["image"]).read_bytes()
            found[labels["row"]] = labels
    assert sorted(found) == list(range(len(expected)))
    for row in expected:
        assert_labels(found[row["row"]], row)


def test_stock_webdataset_reads_every_row_with_its_image_and_labels(dataset, shards):
    import webdataset

    tars = [str(path) for path in sorted((shards / "cropped" / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    expected = read_rows(dataset, "train")
    assert sorted(int(sample["__key__"]) for sample in samples) == list(range(40))
    for sample in samples:
        row = expected[int(sample["__key__"])]
        assert_labels(sample["json"], row)
        with Image.open(dataset / "cropped" / row["image"]) as image:
            np.testing.assert_array_equal(sample["jpg"], np.asarray(image.convert("RGB")))


def test_a_set_is_webdatasets_own_pipeline_for_other_loops_local_and_in_the_store(shards, s3, tmp_path):
    """Also in the workers of a DataLoader, and from the cache once the store has nothing."""
    import torch
    import webdataset

    local = shards / "cropped" / "train"
    stock = webdataset.WebDataset([str(path) for path in sorted(local.glob("*.tar"))], shardshuffle=False)
    names = ("__key__", "jpg", "json")
    expected = [{name: sample[name] for name in names} for sample in stock]
    for path in local.iterdir():
        storage.upload(path, f"s3://mtl/stock/{path.name}")
    for uri in (str(local), "s3://mtl/stock"):
        dataset = as_webdataset(uri, cache_dir=tmp_path)
        assert isinstance(dataset, webdataset.WebDataset)
        assert [{name: sample[name] for name in names} for sample in dataset] == expected
    storage.delete("s3://mtl/stock/shard-000000.tar")
    pairs = as_webdataset("s3://mtl/stock", cache_dir=tmp_path).decode("rgb8").to_tuple("json", "jpg")
    loader = torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert sorted(labels["row"] for labels, _ in loader) == sorted(int(sample["__key__"]) for sample in expected)
    rows = [sample["__key__"] for sample in as_webdataset(str(local), shardshuffle=100, seed=1)]
    assert sorted(rows) == sorted(sample["__key__"] for sample in expected)
    assert rows != [sample["__key__"] for sample in expected]


def test_a_set_that_is_not_there_or_whose_tar_was_cut_is_no_pipeline(shards, tmp_path):
    with pytest.raises(InputError, match="no shard set at"):
        as_webdataset(str(tmp_path))
    shutil.copytree(shards / "cropped" / "train", tmp_path / "set")
    tar = tmp_path / "set" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(InputError, match=r"shard-000001\.tar"):
        list(as_webdataset(str(tmp_path / "set")))


@each_set
def test_a_sidecar_agrees_with_its_tar_and_the_annotations(dataset, shards, view, split):
    annotations = read_annotations(dataset / FILES[split])
    for path in sorted((shards / view / split).glob("*.tar")):
        sidecar = parse_sidecar(path.with_suffix(".safetensors").read_bytes())
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
        assert [member.name for member in members] == [f"{row:09d}.jpg" for row in sidecar.row]
        assert [member.offset_data for member in members] == sidecar.offset.tolist()
        assert [member.size for member in members] == sidecar.length.tolist()
        assert sidecar.image_names() == [annotations.images[row] for row in sidecar.row]
        for name in ("va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
            np.testing.assert_array_equal(getattr(sidecar, name), getattr(annotations, name)[sidecar.row])


@each_set
def test_an_index_counts_what_is_there(dataset, shards, view, split):
    directory, rows = shards / view / split, read_rows(dataset, split)
    index = read_index(str(directory))
    assert (index.view, index.split, index.rows) == (view, split, len(rows))
    assert index.source_sha256 == hashlib.sha256((dataset / FILES[split]).read_bytes()).hexdigest()
    assert [entry.rows for entry in index.shards] == [7] * (len(rows) // 7) + [len(rows) % 7]
    for entry in index.shards:
        for suffix, size, sha256 in (
            ("tar", entry.tar_bytes, entry.tar_sha256),
            ("safetensors", entry.sidecar_bytes, entry.sidecar_sha256),
        ):
            data = (directory / f"{entry.name}.{suffix}").read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)
    labels = index.labels
    assert labels.rows == len(rows)
    assert labels.va == sum(row["va"] is not None for row in rows)
    assert labels.expr == sum(row["expr"] is not None for row in rows)
    assert labels.expr_classes == [sum(row["expr"] == i for row in rows) for i in range(len(EXPRESSIONS))]
    with_au = [row["au"] for row in rows if row["au"] is not None]
    assert labels.au == [sum(au[i] is not None for au in with_au) for i in range(len(AUS))]
    assert labels.au_positives == [sum(au[i] == 1 for au in with_au) for i in range(len(AUS))]
    assert labels.unlabelled == sum(row["va"] is row["expr"] is row["au"] is None for row in rows)


def rows_of(directory: Path) -> list[list[int]]:
    return [parse_sidecar(path.read_bytes()).row.tolist() for path in sorted(directory.glob("*.safetensors"))]


@pytest.mark.parametrize("split", SPLITS)
def test_both_views_hold_the_same_rows_in_the_same_shards(shards, split):
    rows = rows_of(shards / "cropped" / split)
    assert rows == rows_of(shards / "cropped_aligned" / split)
    assert list(chain(*rows)) != sorted(chain(*rows)), "rows are shuffled once, when written"


def test_verify_says_that_whole_sets_are_whole(shards, capsys):
    verify(str(shards / "cropped" / "val"), jobs=1)
    assert "20 rows in 3 shards are whole" in capsys.readouterr().out


def test_verify_names_every_damaged_shard_and_no_other(copied):
    directory = copied / "cropped" / "train"
    tars = [directory / f"shard-{number:06d}.tar" for number in range(6)]
    sidecars = [tar.with_suffix(".safetensors") for tar in tars]
    place = parse_sidecar(sidecars[0].read_bytes()).offset[3] + 300
    flip_bit(tars[0], int(place))  # in an image
    flip_bit(tars[1], 512 * 0 + 20)  # in the header of a member: its name
    flip_bit(sidecars[2], sidecars[2].stat().st_size - 3)
    os.truncate(tars[3], tars[3].stat().st_size // 2)
    tars[4].unlink()
    with pytest.raises(InputError) as error:
        verify(str(directory), jobs=1)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("5 faults in ")
    for line, path, what in zip(
        lines[1:],
        (tars[0], tars[1], sidecars[2], tars[3], tars[4]),
        ["its sha256"] * 3 + ["bytes; the index says", "is gone"],
        strict=False,
    ):
        assert str(path) in line
        assert what in line
    assert "create" in lines[-1]


def test_verify_finds_a_set_whose_checksums_are_right_and_whose_content_is_wrong(copied):
    """As a fault of the writer would leave it: a wrong offset, an image that does not decode, a checksum of another."""
    directory = copied / "cropped" / "val"
    index = read_index(str(directory))
    entries = []
    for number, entry in enumerate(index.shards):
        path = directory / f"{entry.name}.safetensors"
        sidecar, about = parse_sidecar(path.read_bytes()), read_about(path.read_bytes())
        if number == 0:
            sidecar = sidecar._replace(offset=sidecar.offset + 512)
        elif number == 1:
            sidecar = sidecar._replace(crc32=sidecar.crc32 + np.uint32(1))
        else:
            tar = directory / f"{entry.name}.tar"
            data = bytearray(tar.read_bytes())
            data[sidecar.offset[0] : sidecar.offset[0] + 16] = bytes(16)
            tar.chmod(0o644)
            tar.write_bytes(data)
            entry = entry.model_copy(update={"tar_sha256": hashlib.sha256(data).hexdigest()})
        data = dump_sidecar(sidecar, about)
        path.write_bytes(data)
        entries.append(entry.model_copy(update={"sidecar_sha256": hashlib.sha256(data).hexdigest()}))
    (directory / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"shards": entries})))
    with pytest.raises(InputError) as error:
        verify(str(directory), jobs=1)
    lines = str(error.value).splitlines()
    assert "shard-000000.tar: its members are not those of the sidecar" in lines[1]
    assert sum("shard-000001.tar" in line and "do not match their checksum" in line for line in lines) == 7
    assert any("shard-000002.tar" in line and "not a JPEG" in line for line in lines)


def test_a_flipped_bit_anywhere_in_an_index_is_found(shards, tmp_path):
    data = (shards / "cropped" / "train" / INDEX_NAME).read_bytes()
    rng = np.random.default_rng(0)
    (tmp_path / INDEX_NAME).write_bytes(data)
    assert read_index(str(tmp_path)).rows == 40
    for place in rng.choice(len(data) * 8, 600, replace=False).tolist():
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / INDEX_NAME).write_bytes(damaged)
        with pytest.raises(InputError):
            read_index(str(tmp_path))


def test_a_field_that_a_later_version_adds_damages_no_set_and_changes_no_identity(shards):
    class Later(Index):
        added: str | None = None

    raw = json.loads((shards / "cropped" / "train" / INDEX_NAME).read_bytes())
    claimed = raw.pop("sha256")
    assert Later.model_validate(raw).sha256 == claimed
    assert Later.model_validate(raw | {"added": "x"}).sha256 != claimed
    assert json.loads(dump_index(Later.model_validate(raw))) == raw | {"sha256": claimed}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"3", b'"text"', b"{}", b"[" * 100_000, b"\xff\xfe", b'{"sha256": "x"}']
)
def test_a_foreign_index_is_refused(tmp_path, content):
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(InputError, match=INDEX_NAME):
        read_index(str(tmp_path))


def test_an_index_cannot_lead_out_of_its_set(shards, tmp_path):
    index = read_index(str(shards / "cropped" / "val"))
    for name in ("../shard-000000", "shard-000000/../../x", "/etc/passwd", "shard-000000\n"):
        entry = index.shards[0].model_copy(update={"name": name})
        (tmp_path / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"shards": [entry]})))
        with pytest.raises(InputError, match=r"shards\.0\.name"):
            read_index(str(tmp_path))


def test_verify_at_the_command_line_ends_with_one_message_and_code_2(copied):
    flip_bit(copied / "cropped/val/shard-000001.tar", 5000)
    done = run_module("mtl_dist.shards", "verify", str(copied / "cropped/val"), "--jobs", "1")
    assert_one_message(done, "1 faults in", "shard-000001.tar", "sha256")
    assert "shard-000000" not in done.stderr


def test_sets_on_s3_are_those_on_disk_and_can_be_verified_and_inspected(dataset, shards, s3):
    uri = "s3://mtl/made/here"
    create(str(dataset), uri, views=("cropped",), frames_per_shard=7, jobs=1)
    stored = {name: storage.read_bytes(f"{uri}/{name}") for name, _ in storage.list_objects(uri)}
    assert stored == {name: data for name, data in read_tree(shards).items() if name.startswith("cropped/")}
    verify(f"{uri}/cropped/val", jobs=1)
    done = run_here("mtl_dist.shards", "inspect", f"{uri}/cropped/train", "--as-json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 40

    # A rerun there repairs, too.
    storage.delete(f"{uri}/cropped/val/shard-000001.tar")
    with pytest.raises(InputError, match=r"shard-000001\.tar is gone"):
        verify(f"{uri}/cropped/val", jobs=1)
    create(str(dataset), uri, views=("cropped",), frames_per_shard=7, jobs=1)
    assert storage.read_bytes(f"{uri}/cropped/val/shard-000001.tar") == stored["cropped/val/shard-000001.tar"]


def test_inspect_prints_one_json_object_for_programs_and_a_table_for_people(shards, dataset):
    uri = str(shards / "cropped_aligned" / "train")
    done = run_here("mtl_dist.shards", "inspect", uri, "--as-json")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    index = read_index(uri)
    assert about == {
        "view": "cropped_aligned",
        "split": "train",
        "rows": 40,
        "shards": 6,
        "bytes": sum(path.stat().st_size for path in Path(uri).glob("*.tar")),
        "sha256": index.sha256,
        "labels": index.labels.model_dump(),
    }
    done = run_here("mtl_dist.shards", "inspect", uri)
    assert done.returncode == 0, done.stderr
    cells = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.stdout.splitlines() if "│" in line}
    assert cells["valence, arousal"] == str(index.labels.va)
    units = {f"AU{number} on, of {of} labelled" for number, of in zip(AUS, index.labels.au)}
    assert units | set(EXPRESSIONS) <= set(cells)


def test_the_json_of_a_sample_has_the_bytes_that_it_always_had():
    mask = np.array([True, False])
    labels = Annotations(
        row=np.array([7, 8]),
        images=['v/é".jpg', "v/2.jpg"],
        va=np.array([[0.1, -1 / 3], [0, 0]], np.float32),
        expr=np.array([3, 0], np.uint8),
        au=np.array([[1] + [0] * 11, [0] * 12], np.uint8),
        va_mask=mask,
        expr_mask=mask,
        au_mask=np.array([[True] * 11 + [False], [False] * 12]),
        sha256="",
    )
    first = b'{"row": 7, "image": "v/\\u00e9\\".jpg", "va": [0.1, -0.333333], "expr": 3, "au": [1'
    texts = [first + b", 0" * 10 + b", null]}", b'{"row": 8, "image": "v/2.jpg", "va": null, "expr": null, "au": null}']
    assert list(writer._label_texts(labels)) == texts
    named = [text.replace(b', "va"', b', "video": "v", "va"') for text in texts]
    assert list(writer._label_texts(labels._replace(videos=["v", "v"]))) == named


def test_a_sidecar_of_other_arrays_is_refused():
    from safetensors.numpy import save

    sidecar = {"row": np.zeros(2, np.int64)}
    with pytest.raises(Damaged, match="holds the arrays"):
        parse_sidecar(save(sidecar))
    with pytest.raises(Damaged, match="not a safetensors file"):
        parse_sidecar(io.BytesIO(b"x" * 100).read())


# ---------------------------------------------------------------------------------------- other sources, and skipping


def write_table(dataset: Path, path: Path) -> Path:
    """The training rows of `dataset` as a table, with a person for every two videos."""
    rows = read_rows(dataset, "train")
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "valence", "arousal", "expression", *(f"AU{number}" for number in AUS), "person"])
        for row in rows:
            va, au = row["va"] or ["", ""], row["au"] or [None] * len(AUS)
            expr = "" if row["expr"] is None else EXPRESSIONS[row["expr"]]
            person = int(row["image"][1 : row["image"].index("/")]) // 2
            table.writerow([row["image"], *va, expr, *("" if value is None else value for value in au), f"p{person}"])
    return path


def test_a_table_becomes_both_views_by_two_runs(dataset, tmp_path, capsys):
    table, dest = write_table(dataset, tmp_path / "faces.csv"), tmp_path / "dest"
    for view in VIEWS:
        options = TableOptions(images=dataset / view)
        create(str(table), str(dest), views=(view,), frames_per_shard=7, val_fraction=0.3, jobs=1, table=options)
    assert "skipped: nothing" in capsys.readouterr().out
    expected, found = read_rows(dataset, "train"), {}
    for view, split in SETS:
        verify(str(dest / view / split), jobs=1)
        for path in (dest / view / split).glob("*.tar"):
            with tarfile.open(path) as tar:
                texts = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
            found |= {(view, text["row"]): (split, text) for text in texts}
    assert sorted(found) == sorted((view, row) for view in VIEWS for row in range(40))
    for (view, row), (split, labels) in found.items():
        assert_labels(labels, expected[row])
        assert found[VIEWS[0], row][0] == split, view
    for split in SPLITS:
        assert len({read_index(str(dest / view / split)).source_sha256 for view in VIEWS}) == 1
    people = [{int(text["image"][1]) // 2 for part, text in found.values() if part == split} for split in SPLITS]
    assert not people[0] & people[1]


def test_shards_of_other_pictures_are_not_taken_for_these(dataset, tmp_path):
    table, dest = write_table(dataset, tmp_path / "faces.csv"), tmp_path / "dest"

    def run(images: str) -> None:
        options = TableOptions(images=dataset / images)
        create(str(table), str(dest), views=("cropped",), val_fraction=0.3, jobs=1, table=options)

    run("cropped")
    before = read_tree(dest)
    with pytest.raises(InputError, match=r"holds shards of other pictures: that of row \d+ in shard-000000 is not"):
        run("cropped_aligned")
    assert read_tree(dest) == before


def test_a_table_continued_with_other_choices_is_refused(dataset, tmp_path):
    table = write_table(dataset, tmp_path / "faces.csv")

    def run(fraction: float = 0.3, **options) -> None:
        options = TableOptions(images=dataset / "cropped", **options)
        create(str(table), str(tmp_path / "dest"), views=("cropped",), val_fraction=fraction, jobs=1, table=options)

    run()
    before = read_tree(tmp_path / "dest")
    run()
    for other in ({"fraction": 0.6}, {"columns": Columns(au="")}, {"expressions": ("Bored=Other",)}):
        with pytest.raises(InputError, match=r"holds other shards|source_sha256"):
            run(**other)
    assert read_tree(tmp_path / "dest") == before


def test_a_directory_without_a_validation_part_is_parted_by_video(dataset, tmp_path):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    (source / FILES["val"]).unlink()
    with pytest.raises(InputError, match=r"validation_set_annotations\.txt does not exist; .*--val-fraction 0\.1"):
        create(str(source), str(tmp_path / "dest"), jobs=1)
    create(str(source), str(tmp_path / "dest"), views=("cropped",), frames_per_shard=7, val_fraction=0.2, jobs=1)
    rows = [list(chain(*rows_of(tmp_path / "dest" / "cropped" / split))) for split in SPLITS]
    assert sorted(chain(*rows)) == list(range(40))
    videos = [{read_rows(dataset, "train")[row]["image"].split("/")[0] for row in part} for part in rows]
    assert len(videos[1]) == 1
    assert not videos[0] & videos[1]


BAD_BYTES = {
    5: None,
    12: b"",
    33: b"<html>not found</html>",
}  # what is in the place of the images of these training rows


@pytest.fixture
def spoilt(dataset, tmp_path) -> Path:
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    images = read_annotations(source / FILES["train"]).images
    for (row, content), view in zip(BAD_BYTES.items(), ("cropped", "cropped_aligned", "cropped")):
        (source / view / images[row]).unlink()
        if content is not None:
            (source / view / images[row]).write_bytes(content)
    return source


@pytest.mark.whole
@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_of_bad_images_are_left_out_of_all_views_and_listed(spoilt, tmp_path, capsys, jobs):
    dest = tmp_path / "dest"
    create(str(spoilt), str(dest), frames_per_shard=7, jobs=jobs, skip_bad_images=True)
    for view in VIEWS:
        assert sorted(chain(*rows_of(dest / view / "train"))) == [row for row in range(40) if row not in BAD_BYTES]
        assert sorted(chain(*rows_of(dest / view / "val"))) == list(range(20))
        verify(str(dest / view / "train"), jobs=1)
    with (dest / "skipped.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [(int(line["row"]), line["split"], line["view"]) for line in listed] == [
        (5, "train", "cropped"),
        (12, "train", "cropped_aligned"),
        (33, "train", "cropped"),
    ]
    assert [line["reason"].partition(" (")[0] for line in listed] == ["missing", "empty", "no picture"]
    printed = capsys.readouterr().out
    assert "skipped: 3 rows for bad images (1 missing, 1 empty, 1 no picture), listed in" in printed
    create(str(spoilt), str(dest), frames_per_shard=7, jobs=1, skip_bad_images=True)
    assert "every shard was there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="do not exist"):
        create(str(spoilt), str(dest), frames_per_shard=7, jobs=1)


def test_skipping_nothing_gives_the_same_shards(dataset, shards, tmp_path):
    create(str(dataset), str(tmp_path), frames_per_shard=7, jobs=1, skip_bad_images=True)
    tree = read_tree(tmp_path)
    assert tree.pop("skipped.csv") == b"row,split,view,image,reason\n"
    assert all(json.loads(tree.pop(f"{view}/checked.json"))["bad"] == {} for view in VIEWS)
    assert tree == read_tree(shards)


def test_pictures_of_other_kinds_are_kept_as_jpeg_and_a_jpeg_byte_for_byte(dataset, tmp_path):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    paths = [source / "cropped" / name for name in dict.fromkeys(read_annotations(source / FILES["train"]).images)]
    pixels = {}
    for path, (kind, mode) in zip(paths, [("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("PNG", "L")]):
        image = Image.open(path).convert(mode)
        path.unlink()
        image.save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
        pixels[path] = np.asarray(image.convert("RGB"), np.int16)
    for dest in ("once", "again"):
        create(str(source), str(tmp_path / dest), views=("cropped",), jobs=1, skip_bad_images=True)
    train = tmp_path / "once" / "cropped" / "train"
    assert read_tree(train) == read_tree(tmp_path / "again" / "cropped" / "train")
    assert (tmp_path / "once" / "skipped.csv").read_text() == "row,split,view,image,reason\n"
    verify(str(train), jobs=1)
    seen = set()
    with tarfile.open(train / "shard-000000.tar") as tar:
        for member in tar.getmembers():
            data = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                path = source / "cropped" / json.loads(data)["image"]
                seen.add(path)
                if path not in pixels:
                    assert image == path.read_bytes()
                    continue
                stored = Image.open(io.BytesIO(image))
                assert stored.format == "JPEG"
                assert [layer[1:3] for layer in stored.layer] == [(1, 1)] * 3, "colours have all their pixels"
                assert np.abs(np.asarray(stored, np.int16) - pixels[path]).mean() < 4
            image = data
    assert seen == set(paths)


def lay_down(source: Path, names: list[str]) -> None:
    """Turn pictures on their side, and have their EXIF say so."""
    exif = Image.Exif()
    exif[0x112] = 6
    for path in (source / "cropped" / name for name in names):
        with Image.open(path) as image:
            turned = image.transpose(Image.Transpose.ROTATE_90)
        path.unlink()
        turned.save(path, "JPEG", exif=exif, quality=95)


@pytest.mark.whole
def test_pictures_that_are_not_stored_upright_are_turned_and_counted(dataset, tmp_path, capsys):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    names = read_annotations(source / FILES["train"]).images
    lying = [name for name in dict.fromkeys(names) if names.count(name) == 1][:3]
    lay_down(source, lying)
    for choice, said in (("apply", "were turned"), ("ignore", "were taken as they are stored")):
        for _ in range(2):  # the second time all is there, and is counted
            create(str(source), str(tmp_path / choice), views=("cropped",), frames_per_shard=7, jobs=1, exif=choice)
            assert f"3 images are not stored upright, says their EXIF, and {said}" in capsys.readouterr().out
        verify(str(tmp_path / choice / "cropped" / "train"))
        members = tar_members(tmp_path / choice / "cropped" / "train")
        for name in lying:
            stored, original = members[names.index(name)], (source / "cropped" / name).read_bytes()
            assert (stored == original) == (choice == "ignore")
            if choice == "apply":
                upright = np.asarray(Image.open(io.BytesIO(original)).transpose(Image.Transpose.ROTATE_270)).astype(int)
                assert np.abs(decode(stored).astype(int) - upright).mean() < 3
    with pytest.raises(InputError, match="has exif apply, this set exif ignore"):
        create(str(source), str(tmp_path / "apply"), views=("cropped",), frames_per_shard=7, jobs=1, exif="ignore")


@pytest.mark.whole
def test_a_set_that_an_earlier_version_began_is_continued_unless_turned_pictures_would_come_to_others(
    dataset, tmp_path
):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    options = {"views": ("cropped",), "frames_per_shard": 7, "jobs": 1}
    create(str(source), str(tmp_path / "upright"), **options)
    names = read_annotations(source / FILES["train"]).images
    rows = parse_sidecar((tmp_path / "upright/cropped/train/shard-000000.safetensors").read_bytes()).row
    lay_down(source, [names[rows[-1]]])
    create(str(source), str(tmp_path / "lying"), **options, exif="ignore")
    for made in ("upright", "lying"):
        train = tmp_path / made / "cropped" / "train"
        (train / INDEX_NAME).unlink()
        (train / "shard-000003.safetensors").unlink()
        for path in train.glob("*.safetensors"):  # as of before EXIF was read
            about = {key: value for key, value in read_about(path.read_bytes()).items() if key not in ("lying", "exif")}
            path.write_bytes(dump_sidecar(parse_sidecar(path.read_bytes()), about))
    before = read_tree(tmp_path / "lying")
    pattern = rf"earlier version.*: {source}/cropped/{names[rows[-1]]} of shard-000000 is not stored upright.*--exif ig"
    with pytest.raises(InputError, match=pattern):
        create(str(source), str(tmp_path / "lying"), **options)
    assert read_tree(tmp_path / "lying") == before
    create(str(source), str(tmp_path / "lying"), **options, exif="ignore")
    shutil.rmtree(source)
    create(shutil.copytree(dataset, str(source)), str(tmp_path / "upright"), **options)
    for made in ("upright", "lying"):
        verify(str(tmp_path / made / "cropped" / "train"))


def tar_members(directory: Path) -> dict[int, bytes]:
    """The images of a set by row."""
    found = {}
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {int(m.name[:9]): tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
    return found


def test_a_second_view_keeps_what_the_first_has_listed(spoilt, tmp_path):
    for view in (*VIEWS, *VIEWS):
        create(str(spoilt), str(tmp_path / "dest"), views=(view,), jobs=1, skip_bad_images=True)
    lines = (tmp_path / "dest" / "skipped.csv").read_text().splitlines()[1:]
    assert sorted(line.split(",")[0] for line in lines) == ["12", "33", "5"]


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    """The images that `--skip-bad-images` decodes."""
    names, check_images = [], skipping.check_images

    def note(task: tuple[Path, list[str]]) -> dict[str, str]:
        names.extend(f"{task[0].name}/{name}" for name in task[1])
        return check_images(task)

    monkeypatch.setattr(skipping, "check_images", note)
    return names


def test_a_rerun_looks_at_no_image_again_finished_or_not(spoilt, tmp_path, looked_at, monkeypatch):
    def run(dest: str) -> dict[str, bytes]:
        create(str(spoilt), str(tmp_path / dest), frames_per_shard=7, jobs=1, skip_bad_images=True)
        return read_tree(tmp_path / dest)

    def stop(*_):
        raise KeyboardInterrupt

    whole = run("whole")
    num_images = len(looked_at)
    assert num_images == len(set(looked_at)) == 2 * 54  # of 60 rows every tenth has the image before it
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_tar", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert len(looked_at) == 2 * num_images
    assert run("whole") == run("stopped") == whole
    assert len(looked_at) == 2 * num_images


@pytest.mark.whole
@pytest.mark.parametrize("change", ["repaired", "restored", "damaged"])
def test_an_image_that_changed_is_looked_at_again(spoilt, tmp_path, looked_at, change):
    images = read_annotations(spoilt / FILES["train"]).images
    path = spoilt / "cropped" / images[5 if change == "repaired" else 33]
    good = (spoilt / "cropped" / images[2]).read_bytes()
    if change != "repaired":  # of one size and date, as a backup keeps them
        path.write_bytes(bytes(len(good)) if change == "restored" else good)
    before = path.stat() if change != "repaired" else None
    dest = tmp_path / "dest"
    create(str(spoilt), str(dest), frames_per_shard=7, jobs=1, skip_bad_images=True)
    tree, num_images = read_tree(dest), len(looked_at)
    path.write_bytes(bytes(len(good)) if change == "damaged" else good)
    if before:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(InputError, match=r"holds (other shards.*source_sha256|'shard-)"):
        create(str(spoilt), str(dest), frames_per_shard=7, jobs=1, skip_bad_images=True)
    assert len(looked_at) == num_images * 3 // 2, "the other view has not changed"
    assert read_tree(dest) == tree
    create(str(spoilt), str(tmp_path / "anew"), views=("cropped",), frames_per_shard=7, jobs=1, skip_bad_images=True)
    left_out = {33} if change == "repaired" else {5} if change == "restored" else {5, 33}
    rows = chain(*rows_of(tmp_path / "anew" / "cropped" / "train"))
    assert set(range(40)) - set(rows) == left_out


def test_what_could_not_be_read_is_not_remembered(spoilt, tmp_path, looked_at):
    """A server that was away for a moment: the images are as they were."""
    (spoilt / "cropped" / read_annotations(spoilt / FILES["train"]).images[5]).mkdir()  # as good as an input error
    for _ in range(2):
        create(str(spoilt), str(tmp_path / "dest"), frames_per_shard=7, jobs=1, skip_bad_images=True)
    assert "cannot be read (Is a directory)" in (tmp_path / "dest" / "skipped.csv").read_text()
    assert len(looked_at) == 54 * (2 + 1)


@pytest.mark.whole
@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b"3", b'{"format": "x"}', b'{"bad": {"v": 1}}', b"\xff"])
def test_a_torn_record_of_images_costs_another_look(spoilt, tmp_path, looked_at, content):
    create(str(spoilt), str(tmp_path), frames_per_shard=7, jobs=1, skip_bad_images=True)
    path = tmp_path / "cropped" / "checked.json"
    if b"bad" in content:
        content = json.dumps(json.loads(path.read_text()) | json.loads(content)).encode()
    tree = read_tree(tmp_path)
    path.write_bytes(content)
    create(str(spoilt), str(tmp_path), frames_per_shard=7, jobs=1, skip_bad_images=True)
    assert len(looked_at) == 54 * (2 + 1)
    assert read_tree(tmp_path) == tree


@pytest.mark.parametrize("content", [b"", b"row,reason\n1,x\n", b"row,split,view,image,reason\n1,2\n"])
def test_another_file_in_the_place_of_the_list_is_left_alone(dataset, tmp_path, content):
    (tmp_path / "skipped.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"skipped\.csv would be written, and holds something else"):
        create(str(dataset), str(tmp_path), jobs=1, skip_bad_images=True)
    assert read_tree(tmp_path) == {"skipped.csv": content}


@pytest.mark.parametrize("what", ["most images", "a split"])
def test_a_directory_of_other_images_is_not_skipped_as_a_whole(spoilt, tmp_path, what):
    for path in (spoilt / "cropped").glob("t[0-3]/*" if what == "most images" else "v*/*"):
        path.unlink()
    with pytest.raises(InputError, match=r"of 60 rows would be skipped \(\d+ missing.*right directory"):
        create(str(spoilt), str(tmp_path / "dest"), jobs=1, skip_bad_images=True)
    assert read_tree(tmp_path / "dest") == {}


def test_create_ends_with_what_there_is_what_was_left_out_and_what_is_next(dataset, tmp_path):
    dest = tmp_path / ("a long name " * 9).strip()
    done = run_here("mtl_dist.shards", "create", str(dataset), str(dest), "--jobs", "1")
    assert done.returncode == 0, done.stderr
    index = read_index(str(dest / "cropped" / "train"))
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    cells = {line[0]: line[1] for line in lines if len(line) == 3}
    assert cells["rows"] == "40"
    assert cells["videos"] == "5"
    assert cells["Neutral"] == str(index.labels.expr_classes[0])
    assert cells["AU26 on, of labelled"] == f"{index.labels.au_positives[-1]} of {index.labels.au[-1]}"
    for words in ("skipped: nothing", "wrote 120 images in ", " images/s"):
        assert words in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: python -m "))
    assert command[command.index("--run.name") + 1] == "cropped"
    done = run_here(*command, "--dry-run", "--model.weights", "none")
    assert done.returncode == 0, done.stderr
    assert "40 rows of cropped" in done.stdout


def test_the_command_that_is_next_fits_a_machine_without_a_gpu_and_a_set_smaller_than_a_batch(tmp_path, capsys):
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    create(str(write_dataset(tmp_path / "faces", num_train=12, num_val=8)), str(tmp_path / "dest"), jobs=1)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: python -m "))
    assert command[1:4] == ["--local", "--preset", "small"]
    done = run_here(*command, "--dry-run", "--run.storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert "batch   12 over 1 rank" in done.stdout


def test_an_action_unit_that_is_always_off_is_told_from_one_that_nobody_labelled(dataset, tmp_path, capsys):
    rows = [f"{row['image']},,,,0,{number % 2}" for number, row in enumerate(read_rows(dataset, "train"))]
    (tmp_path / "t.csv").write_text("\n".join(["image,valence,arousal,expression,AU1,AU2", *rows]) + "\n")
    options = TableOptions(images=dataset / "cropped")
    dest = tmp_path / "dest"
    create(str(tmp_path / "t.csv"), str(dest), views=("cropped",), val_fraction=0.2, table=options, jobs=1)
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["AU1 on, of labelled"] == ["0 of 32", "0 of 8"]
    assert cells["AU2 on, of labelled"] == ["16 of 32", "4 of 8"]
    assert cells["AU26 on, of labelled"] == ["not labelled", "not labelled"]
    assert any("no labels at all for va, expr, AU4, AU6" in line[0] for line in lines)
    inspect(str(dest / "cropped" / "train"))
    printed = capsys.readouterr().out
    assert "AU1 on, of 32 labelled" in printed
    assert "AU26 on, not labelled" in printed


def test_validation_pictures_that_are_training_pictures_by_another_name_are_counted(dataset, tmp_path, capsys):
    source = Path(shutil.copytree(dataset, tmp_path / "source"))
    train, val = ([*dict.fromkeys(read_annotations(source / FILES[split]).images)] for split in SPLITS)
    for theirs, mine in zip(train, val[:4]):
        shutil.copy(source / "cropped" / theirs, source / "cropped" / mine)
    rows = sum(image in val[:4] for image in read_annotations(source / FILES["val"]).images)
    create(str(source), str(tmp_path / "dest"), frames_per_shard=7, jobs=1)
    printed = capsys.readouterr().out
    assert f"note: cropped: {rows} of 20 validation pictures are training pictures too, byte for byte" in printed
    assert "note: cropped_aligned" not in printed
    sets = [read_sets([str(tmp_path / "dest" / "cropped" / split)]) for split in SPLITS]
    shared = find_shared(*sets, max_bytes=2 * sets[0].shards[0].sidecar_bytes)
    assert (shared.of, shared.looked_at) == (14, 14 / 40)
    assert shared.note().startswith("at least ")


# ------------------------------------------------------------------------------------------------------ contact sheets


@pytest.mark.whole
def test_a_sheet_is_drawn_of_a_few_shards_the_same_each_time(shards, tmp_path):
    uri, path = str(shards / "cropped" / "train"), tmp_path / "sheet.png"
    index = read_index(uri)
    done = run_here("mtl_dist.shards", "inspect", uri, "--sheet", str(path), "--num-images", "9")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == draw_sheet(uri, index, num_images=9, seed=0)
    assert path.read_bytes() != draw_sheet(uri, index, num_images=9, seed=1)
    with Image.open(path) as image:
        nine = image.size
    with Image.open(io.BytesIO(draw_sheet(uri, index, num_images=1000, seed=0))) as image:
        assert image.size[0] == nine[0]
        assert image.size[1] > 2 * nine[1]  # all 40 rows


@pytest.mark.parametrize(
    ("rows", "num_images"), [([1000] * 50, 40), ([1] * 50, 40), ([3] * 20, 40), ([5], 9), ([2], 1)]
)
def test_samples_of_a_sheet_are_distinct_and_of_few_shards(rows, num_images):
    rows = np.array(rows)
    samples = choose_samples(rows, num_images=num_images, seed=0)
    assert len(set(samples.tolist())) == len(samples) == min(num_images, rows.sum())
    assert samples.min() >= 0
    assert samples.max() < rows.sum()
    shards_used = set(np.searchsorted(np.cumsum(rows), samples, side="right").tolist())
    assert len(shards_used) <= max(8, -(-num_images // rows[0]))


def test_a_sheet_of_another_kind_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"--sheet is .*sheet\.pdf; expected a file whose name ends with \.png"):
        inspect(str(shards / "cropped" / "train"), sheet=tmp_path / "sheet.pdf")
