"""Sets made by strangers, their checksums right: refused by name whatever they claim; nothing is extracted."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from safetensors.numpy import load, save

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.decode import DecodeError, decode, decode_into
from mtl_dist.data.index import INDEX_NAME, MAX_INDEX_BYTES, dump_index, read_index
from mtl_dist.data.reader import ShardReader
from mtl_dist.errors import InputError
from mtl_dist.shards.__main__ import verify
from tests.conftest import within

SIZE = 48


@pytest.fixture
def foreign(shards, tmp_path) -> Path:
    """A set that a test may change."""
    (tmp_path / "set").mkdir()
    for path in (shards / "cropped" / "val").iterdir():
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "set"


def seal(directory: Path) -> str:
    """Make all checksums of a changed set right, as its author would; return its URI."""
    index, entries = read_index(str(directory)), []
    for entry in index.shards:
        about = {}
        for kind, suffix in (("tar", "tar"), ("sidecar", "safetensors")):
            data = (directory / f"{entry.name}.{suffix}").read_bytes()
            about |= {f"{kind}_bytes": len(data), f"{kind}_sha256": hashlib.sha256(data).hexdigest()}
        entries.append(entry.model_copy(update=about))
    (directory / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"shards": entries})))
    return str(directory)


def assert_refused(directory: Path, words: str) -> None:
    """Neither a reader nor `verify` takes the set; both name the file."""
    uri = seal(directory)
    with pytest.raises(InputError, match=rf"shard-000000.*({words})"):
        ShardReader(uri, read_index(uri), Cache()).read_batch(np.arange(20), SIZE)
    with pytest.raises(InputError, match=rf"shard-000000.*({words})"):
        verify(uri, jobs=1)


def first(value):
    """Change the first entry of an array."""

    def change(array):
        array = array.copy()
        array[0] = value
        return array

    return change


def names(text: bytes):
    return lambda array: np.array([list(text.ljust(200, b"\0"))] + [list(b"v/1.jpg".ljust(200, b"\0"))] * 6, np.uint8)


HOSTILE = {
    "offset negative": ("offset", first(-512), "images at"),
    "offset huge": ("offset", first(1 << 62), "images at"),
    "offset beyond": ("offset", lambda array: array + 100_000, "images at|end beyond"),
    "offset overlaps": ("offset", lambda array: array * 0 + 512, "overlap"),
    "length negative": ("length", first(-1), "images of -1"),
    "length zero": ("length", first(0), "images of 0"),
    "length huge": ("length", first((1 << 63) - 1), "images of"),
    "length beyond": ("length", lambda array: array + (array == array[-1]) * 30_000, "overlap|end beyond"),
    "row negative": ("row", first(-1), "row numbers"),
    "row huge": ("row", first(1 << 40), "row numbers"),
    "row twice": ("row", lambda array: array * 0 + 3, "row numbers"),
    "va nan": ("va", first(np.nan), "valence"),
    "va inf": ("va", first(np.inf), "valence"),
    "va five": ("va", first(5.0), "valence"),
    "expr": ("expr", first(200), "'expr' holds 200"),
    "au": ("au", first(2), "'au' holds 2"),
    "mask": ("au_mask", first(255), "'au_mask' holds 255"),
    "name out": ("image", names(b"../../etc/passwd"), "image name"),
    "name absolute": ("image", names(b"/etc/passwd"), "image name"),
    "name with nul": ("image", names(b"a\0b/1.jpg"), "image name"),
    "name with newline": ("image", names(b"a\n/1.jpg"), "image name"),
    "name not text": ("image", names(b"\xff\xfe/1.jpg"), "utf-8"),
    "name empty": ("image", names(b""), "image name"),
    "name long": ("image", lambda array: np.full((len(array), 100_000), 65, np.uint8), "100000 bytes"),
    "rows fewer": ("*", lambda array: array[:-1], "6 rows; the index says 7"),
    "rows none": ("*", lambda array: array[:0], "no rows"),
    "shape": ("va", lambda array: array[:, :1].copy(), "array 'va'"),
    "type": ("row", lambda array: array.astype(np.float64), "array 'row'"),
    "scalar": ("image", lambda array: np.uint8(0).reshape(()), "array 'image'"),
    "column": ("row", lambda array: array[:, None], "array 'row'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sidecar_is_refused_by_name(foreign, name):
    key, change, words = HOSTILE[name]
    path = foreign / "shard-000000.safetensors"
    arrays = load(path.read_bytes())
    path.write_bytes(save({k: np.ascontiguousarray(change(v)) if key in ("*", k) else v for k, v in arrays.items()}))
    assert_refused(foreign, words)


def header(text: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        header(b"{}", length=1 << 60),
        header(b"{}"),
        header(b"[" * 100_000),
        header(b'{"row":{"dtype":"I64","shape":[1000000000],"data_offsets":[0,8000000000]}}'),
        header(b'{"row":{"dtype":"I64","shape":[4611686018427387904,4],"data_offsets":[0,8]}}') + bytes(8),
        header(b'{"row":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}') + bytes(8),
        header(b'{"row":{"dtype":"F4","shape":[4],"data_offsets":[0,8]}}') + bytes(8),
    ],
    ids=["short", "long header", "empty", "nested", "giant", "overflow", "bf16", "f4"],
)
def test_a_hostile_header_of_a_sidecar_is_refused_by_name(foreign, data):
    (foreign / "shard-000000.safetensors").write_bytes(data)
    assert_refused(foreign, "")


def tar_of(*members: tuple[str, bytes, dict]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, about in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in about.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data) if data else None)
    return file.getvalue()


BAD_TARS = {
    "a member of 4 GB": lambda data: tar_of(("x", b"", {"size": (4 << 30)})),
    "100,000 members": lambda data: bytes(tarfile.TarInfo("x").tobuf()) * 10**5,
    "names outside": lambda data: data.replace(data[:13], b"../../../../x", 1),
    "a link": lambda data: tar_of(("x", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})),
    "a device": lambda data: tar_of(("x", b"", {"type": tarfile.CHRTYPE, "devmajor": 1})),
    "a long name": lambda data: tar_of(("x", b"", {"type": tarfile.GNUTYPE_LONGNAME, "size": (1 << 33) - 1})),
    "a pax header": lambda data: tar_of(("x", b"", {"type": tarfile.XHDTYPE, "size": (1 << 33) - 1})),
    "a sparse file": lambda data: tar_of(("x", b"", {"type": tarfile.GNUTYPE_SPARSE, "size": (1 << 33) - 1})),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "more behind": lambda data: data + tar_of(("x", b"hidden", {})),
    "zeros behind": lambda data: data + bytes(50_000),
    "another JSON": lambda data: data.replace(b'"expr": ', b'"expr":1', 1),
    "no JSON": lambda data: data.replace(b'{"row"', b"[[[[[[", 1),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_verify_names_a_tar_that_is_not_its_sidecars(foreign, name):
    path = foreign / "shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(BAD_TARS[name](whole).ljust(len(whole), b"\0"))
    uri = seal(foreign)
    with within(5), pytest.raises(InputError, match=r"shard-000000\.tar"):
        verify(uri, jobs=1)
    assert {path.name for path in foreign.parent.iterdir()} == {"set"}


def test_verify_finds_a_row_in_two_shards_and_labels_that_the_index_does_not_count(foreign):
    paths = [foreign / f"shard-00000{number}.safetensors" for number in (0, 1)]
    index = read_index(str(foreign))
    labels = index.labels.model_copy(update={"va": index.labels.va - 1})
    (foreign / INDEX_NAME).write_bytes(dump_index(index.model_copy(update={"labels": labels})))
    with pytest.raises(InputError, match="the index counts other labels"):
        verify(str(foreign), jobs=1)
    for suffix in ("safetensors", "tar"):
        (foreign / f"shard-000001.{suffix}").write_bytes((foreign / f"shard-000000.{suffix}").read_bytes())
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(InputError, match="a row is in several shards"):
        verify(seal(foreign), jobs=1)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 19},
        {"rows": 1 << 70},
        {"shards": []},
        {"labels": {"va": -1}},
        {"labels": {"expr": 1 << 60}},
        {"labels": {"au": [10**9] * 12}},
        {"labels": {"expr_classes": [1] * 8}},
        {"shard": {"rows": 8}},
        {"shard": {"rows": 1 << 40, "tar_bytes": 1 << 39}},
        {"shard": {"sidecar_bytes": 1 << 40}},
        {"shard": {"name": "shard-000002"}},
        {"shard": {"name": "shard-000001"}},
    ],
    ids=str,
)
def test_an_index_that_contradicts_itself_is_refused(foreign, change):
    index = read_index(str(foreign))
    about = {key: value for key, value in change.items() if key in ("rows", "shards")}
    if "labels" in change:
        about["labels"] = index.labels.model_copy(update=change["labels"])
    if "shard" in change:
        about["shards"] = [index.shards[0].model_copy(update=change["shard"]), *index.shards[1:]]
    (foreign / INDEX_NAME).write_bytes(dump_index(index.model_copy(update=about)))
    with pytest.raises(InputError, match=INDEX_NAME):
        read_index(str(foreign))


def test_an_index_larger_than_any_is_not_read(foreign, s3, monkeypatch):
    os.truncate(foreign / INDEX_NAME, 2 << 30)  # sparse
    before = peak_bytes()
    with pytest.raises(InputError, match=rf"has {2 << 30} bytes; at most {MAX_INDEX_BYTES} are read"):
        read_index(str(foreign))
    storage.write_bytes("s3://mtl/large/index.json", b"[" * 100_000)
    monkeypatch.setattr("mtl_dist.data.index.MAX_INDEX_BYTES", 1000)
    with pytest.raises(InputError, match=r"large/index\.json has 100000 bytes; at most 1000 are"):
        read_index("s3://mtl/large")
    assert peak_bytes() - before < 50 << 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def jpeg(side: int = 48) -> bytearray:
    return bytearray(simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)))


@pytest.mark.parametrize("side", [65500, 4097])
def test_a_picture_bomb_is_refused_before_it_takes_memory(side):
    bomb = jpeg()
    place = bomb.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = struct.pack(">HH", side, side)
    before = peak_bytes()
    for read in (decode, lambda data: decode(data, 112), lambda data: decode_into(data, np.empty((112, 112, 3), "u1"))):
        with pytest.raises(DecodeError, match=f"{side} x {side} pixels"):
            read(bytes(bomb))
    assert peak_bytes() - before < 10 << 20


def test_a_picture_of_endless_scans_is_refused_before_it_takes_time():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode(data, 112).shape == (112, 112, 3)
    last = data[data.rindex(b"\xff\xda") : -2]
    with within(1), pytest.raises(DecodeError, match="scans; at most 100"):
        decode(data[:-2] + last * 20_000 + data[-2:], 112)
