"""Annotation text is read exactly or refused with file, line, value and what was expected."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.errors import InputError
from mtl_dist.shards.annotations import HEADER, read_annotations
from mtl_dist.tasks import AUS

GOOD = ["7/00001.jpg", "0.5", "-0.25", "3", *"010010000011"]
NO_AUS = ["-1"] * 12


def write(tmp_path: Path, *rows: list[str], header: str = HEADER, end: str = "\n") -> Path:
    path = tmp_path / "annotations.txt"
    path.write_bytes(end.join([header, *(",".join(row) for row in rows), ""]).encode())
    return path


def changed(place: int, value: str) -> list[str]:
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


def test_values_masks_and_duplicate_rows_are_read_as_written(tmp_path):
    path = write(
        tmp_path,
        GOOD,
        ["7/00001.jpg", "-5.0", "-5.0", "-1", *NO_AUS],  # the same image again: a row of its own
        ["video9-24-640x360/00002.jpg", "-5", "-5", "0", *"101101111100"],
        ["8/00003.jpg", "-1", "1", "-1", *NO_AUS],
        ["8/00003.jpg", "0", "0", "7", *NO_AUS],
    )
    read = read_annotations(path)
    assert read.images == ["7/00001.jpg"] * 2 + ["video9-24-640x360/00002.jpg"] + ["8/00003.jpg"] * 2
    assert read.va.dtype == np.float32
    assert read.va.tolist() == [[0.5, -0.25], [0, 0], [0, 0], [-1, 1], [0, 0]]
    assert read.va_mask.tolist() == [True, False, False, True, True]
    assert read.expr.tolist() == [3, 0, 0, 0, 7]
    assert read.expr_mask.tolist() == [True, False, True, False, True]
    assert read.au[[0, 2]].tolist() == [[int(c) for c in "010010000011"], [int(c) for c in "101101111100"]]
    assert read.au_mask.all(1).tolist() == [True, False, True, False, False]
    assert not read.au_mask[[1, 3, 4]].any()
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_missing_leaves_no_sentinel_behind(tmp_path):
    read = read_annotations(write(tmp_path, ["7/00001.jpg", "-5", "-5", "-1", *NO_AUS]))
    assert not read.va.any()
    assert not read.expr.any()
    assert not read.au.any()


@pytest.mark.parametrize("place", range(12))
def test_a_single_action_unit_may_be_missing(tmp_path, place):
    read = read_annotations(write(tmp_path, changed(4 + place, "-1")))
    assert read.au_mask[0].tolist() == [i != place for i in range(12)]
    assert read.au[0].tolist() == [0 if i == place else int(c) for i, c in enumerate("010010000011")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_byte_order_mark_and_blank_end_do_not_matter(tmp_path, end):
    path = write(tmp_path, GOOD, GOOD, end=end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + end.encode())
    assert read_annotations(path).images == ["7/00001.jpg"] * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (GOOD[:-1], ["15 values", "expected 16"]),
        ([*GOOD, "0"], ["17 values", "expected 16"]),
        ([""], ["1 values", "expected 16"]),
        (changed(1, "1.7"), ["valence is 1.7", "-1 to 1", "-5"]),
        (changed(2, "-1.001"), ["arousal is -1.001"]),
        (changed(1, "-5"), ["valence is -5.0 and arousal -0.25", "both or neither"]),
        (changed(3, "9"), ["expression is 9", "0 to 7"]),
        (changed(3, "8"), ["expression is 8"]),
        (changed(3, "-2"), ["expression is -2"]),
        (changed(3, "2.5"), ["expression is 2.5"]),
        (changed(4, "2"), ["AU1 is 2", "expected 0, 1"]),
        (changed(15, "0.5"), ["AU26 is 0.5"]),
        (changed(9, "-5"), [f"AU{AUS[5]} is -5"]),
        (changed(2, "happy"), ["'happy' is not a number"]),
        (changed(2, ""), ["'' is not a number"]),
        *[
            (changed(place, value), ["annotations.txt:3"])
            for value in ("nan", "inf", "-inf")
            for place in (1, 2, 3, 4, 15)
        ],
        *[
            (changed(0, name), [f"image is {name!r}", "video/frame.jpg"])
            for name in (
                "../x",
                "x/..",
                "/etc/x.jpg",
                "/x",
                "a\\b.jpg",
                "a/..\\..\\x",
                "x.jpg",
                "a/b/c.jpg",
                "a//b.jpg",
                "",
                "a/./b.jpg",
            )
        ],
        (changed(0, "a/" + "b" * 300), ["image is 'a/bbb"]),
        (changed(0, "a/\0.jpg"), ["image is"]),
        (changed(0, "a/\x1b[31m.jpg"), ["image is"]),
    ],
    ids=repr,
)
def test_a_bad_row_is_refused_with_file_line_value_and_expectation(tmp_path, row, words):
    path = write(tmp_path, GOOD, row, GOOD)
    with pytest.raises(InputError) as error:
        read_annotations(path)
    for word in (f"{path}:3", *words):
        assert word in str(error.value)


def test_spaces_and_floats_are_read_row_by_row_to_the_same_values(tmp_path):
    plain = read_annotations(write(tmp_path, GOOD, GOOD))
    spaced = read_annotations(write(tmp_path, [f" {value} " for value in GOOD], [*GOOD[:3], "+3.0", *GOOD[4:]]))
    assert spaced.images == plain.images
    for name in ("row", "va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
        np.testing.assert_array_equal(getattr(spaced, name), getattr(plain, name))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", [":1", f"expected '{HEADER}'"]),
        (b"\n\n", [f"expected '{HEADER}'"]),
        (b"image,valence,arousal,expression\n", ["header is 'image,valence,arousal,expression'"]),
        (",".join(GOOD).encode(), ["header is '7/00001.jpg"]),
        (HEADER.encode(), ["no rows"]),
        (HEADER.encode() + b"\n\n\n", ["no rows"]),
        (HEADER.encode() + b"\n\xff\xfe", ["not UTF-8"]),
        ((HEADER + "\n").encode("utf-16"), ["not UTF-8"]),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, words):
    path = tmp_path / "annotations.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_annotations(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_annotations(path)
