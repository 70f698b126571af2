"""Tables are read exactly or refused with file, row, value and expectation; splits keep videos and people whole."""

from __future__ import annotations

import csv
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from simplejpeg import encode_jpeg

from mtl_dist.config import Config
from mtl_dist.data.index import read_sets
from mtl_dist.data.names import find_bad_name, is_image_name
from mtl_dist.errors import InputError
from mtl_dist.objective.smoothing import smooth
from mtl_dist.predicting.members import Member, row_names
from mtl_dist.report.intervals import number_videos
from mtl_dist.shards import __main__ as shards
from mtl_dist.shards.annotations import FILES
from mtl_dist.shards.annotations import HEADER as ANNOTATIONS_HEADER
from mtl_dist.shards.columns import Columns, TableOptions
from mtl_dist.shards.sources import Source, read_source
from mtl_dist.shards.splits import group_rows, split_by_video, video_of
from mtl_dist.shards.tables import read_table
from mtl_dist.tasks import AUS, EXPRESSIONS
from mtl_dist.timeline import make_timeline

AU_NAMES = [f"AU{number}" for number in AUS]
HEADER = ["image", "valence", "arousal", "expression", *AU_NAMES]
ON = "010010000011"
GOOD = ["a/b/1.jpg", "0.5", "-0.25", "3", *ON]
AFFECTNET_HEADER = [
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks"),
    *("expression", "valence", "arousal"),
]


def write(path: Path, *rows: list[str], header: list[str] = HEADER) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def changed(place: int, value: str) -> list[str]:
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


def read(path: Path, **options):
    return read_table(path, TableOptions(**options))


def split(path: Path, options: TableOptions | None = None, *, val_fraction: float | None = None) -> Source:
    return read_source(path, options or TableOptions(), val_fraction=val_fraction, seed=0)


def expressions(table) -> list[int | None]:
    annotations = table.annotations
    return [int(code) if known else None for code, known in zip(annotations.expr, annotations.expr_mask)]


# ------------------------------------------------------------------------------------------------- what a table holds


def test_values_masks_and_rows_are_read_as_written(tmp_path):
    none = [""] * 12
    path = write(
        tmp_path / "t.csv",
        GOOD,
        ["1.jpg", "", "", "", *none],  # nothing at all, and no directory
        ["1.jpg", "-5", "-5", "-1", *["-1"] * 12],  # the codes of annotation text
        ["ä b/c.jpg", "nan", "NaN", " happy ", *none[:-1], "1"],
        ["x/1.jpg", "-1", "1.0", "7.0", *["1.0"] * 12],
    )
    table = read(path)
    found = table.annotations
    assert found.row.tolist() == [0, 1, 2, 3, 4]
    assert found.images == ["a/b/1.jpg", "1.jpg", "1.jpg", "ä b/c.jpg", "x/1.jpg"]
    assert found.va.tolist() == [[0.5, -0.25], [0, 0], [0, 0], [0, 0], [-1, 1]]
    assert found.va_mask.tolist() == [True, False, False, False, True]
    assert expressions(table) == [3, None, None, EXPRESSIONS.index("Happiness"), 7]
    assert found.expr.tolist() == [3, 0, 0, 4, 7]
    assert found.au[0].tolist() == [int(c) for c in ON]
    assert found.au_mask.sum(1).tolist() == [12, 0, 0, 1, 12]
    assert found.au[3].tolist() == [0] * 11 + [1]
    assert [array.dtype for array in (found.va, found.expr, found.au)] == [np.float32, np.uint8, np.uint8]
    assert table.videos.to_pylist() == ["a/b", "", "", "ä b", "x"]
    assert (table.is_val, table.persons, table.left_out, table.unlabelled) == (None, None, {}, {})


def test_parquet_of_any_type_is_read_like_the_same_csv(tmp_path):
    rng = np.random.default_rng(0)
    rows = 50
    va = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    names = [EXPRESSIONS[code] if code < 8 else None for code in rng.integers(0, 9, rows)]
    columns = {
        "image": [f"v{row // 5}/{row}.jpg" for row in range(rows)],
        "valence": pa.array(va[:, 0]),
        "arousal": pa.array(va[:, 1].astype(np.float64)),
        "expression": pa.array(names).dictionary_encode(),
        "AU1": pa.array(rng.random(rows) < 0.5),  # bool
        "AU2": pa.array([None if row % 3 else row % 2 for row in range(rows)], pa.int8()),
        "AU4": pa.array(np.where(rng.random(rows) < 0.5, np.nan, 1.0)),
        "note": ["x"] * rows,
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=7)
    cells = zip(*(pa.array(column).to_pylist() for column in columns.values()))
    text = [["" if cell is None else str(cell) for cell in row] for row in cells]
    path = write(tmp_path / "t.csv", *text, header=list(columns))
    found, expected = (read(tmp_path / name).annotations for name in ("t.parquet", "t.csv"))
    assert path.exists()
    assert found.images == expected.images
    for name in ("row", "va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_array_equal(found.va, va)
    assert found.au_mask.any(0).tolist() == [number in (1, 2, 4) for number in AUS]


def test_columns_have_any_name_and_order_and_others_are_not_looked_at(tmp_path):
    header = ["junk", "E", "file", "V", "A", *(f" AU{number:02}_c" for number in AUS)]
    path = write(tmp_path / "t.csv", ["?", "Sad", "x/1.jpg", "0.5", "0.25", *ON], header=header)
    columns = Columns(image="file", valence="V", arousal="A", expression="E", au="AU{:02}_c")
    table = read(path, columns=columns)
    assert table.annotations.images == ["x/1.jpg"]
    assert table.annotations.va.tolist() == [[0.5, 0.25]]
    assert expressions(table) == [EXPRESSIONS.index("Sadness")]
    assert table.annotations.au[0].tolist() == [int(c) for c in ON]


@pytest.mark.parametrize(
    ("header", "tasks"),
    [
        (["image", "valence", "arousal"], (True, False, False)),
        (["image", "expression"], (False, True, False)),
        (["image", "AU12"], (False, False, True)),
    ],
)
def test_a_task_without_columns_has_no_labels(tmp_path, header, tasks):
    table = read(write(tmp_path / "t.csv", ["1.jpg", "1", "1"][: len(header)], header=header)).annotations
    assert (table.va_mask.any(), table.expr_mask.any(), table.au_mask.any()) == tasks


@pytest.mark.parametrize("au", ["AU{:02}", "au{}", "Au_{:02}", "AU {}"])
def test_columns_that_differ_in_case_padding_or_separators_are_found_and_told(tmp_path, au):
    header = ["Image", "Valence", "AROUSAL", "expression", *map(au.format, AUS), "Person", "Split", "face_x"]
    rows = [["a/1.jpg", "0.5", "-0.25", "3", *ON, "ann", "train", "7"], ["b/1.jpg", "", "", "", *ON, "bob", "val", "7"]]
    table = read(write(tmp_path / "t.csv", *rows, header=header))
    assert table.annotations.va.tolist() == [[0.5, -0.25], [0, 0]]
    assert table.annotations.au.tolist() == [[int(value) for value in ON]] * 2
    assert table.annotations.au_mask.all()
    assert table.persons.to_pylist() == ["ann", "bob"]
    assert table.is_val.tolist() == [False, True]
    for words in ("'Valence' as valence", f"'{au.format(1)}' as AU1,", "'Person' as person", "; not read: face_x"):
        assert words in table.about_columns
    assert split(tmp_path / "t.csv").notes == [table.about_columns]


def test_the_usual_names_go_before_names_like_them_and_a_pattern_that_is_given_leaves_others_out(tmp_path):
    header = ["image", "Valence", "valence", "arousal", *AU_NAMES[:-1], "AU26_r", "AU01"]
    row = ["a/1.jpg", "9", "0.5", "-0.25", *ON[:-1], "2.7", "0"]
    table = read(write(tmp_path / "t.csv", row, header=header), columns=Columns(au="AU{}"))
    assert table.annotations.va.tolist() == [[0.5, -0.25]]
    assert table.annotations.au_mask.tolist() == [[True] * 11 + [False]]
    assert table.about_columns.endswith("; not read: Valence, AU26_r, AU01")


def test_an_empty_name_leaves_a_column_out(tmp_path):
    path = write(tmp_path / "t.csv", changed(3, "who knows"))
    assert not read(path, columns=Columns(expression="")).annotations.expr_mask.any()


def test_names_and_synonyms_of_expressions_in_any_case(tmp_path):
    names = ["neutral", "ANGRY", "Disgusted", "fearful", "Happy", "sad", "Surprised", "other", "Anger", "2", "5.0"]
    table = read(write(tmp_path / "t.csv", *([f"{i}.jpg", name] for i, name in enumerate(names)), header=HEADER[:4:3]))
    assert expressions(table) == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 5]


def test_further_names_get_a_class_or_no_label_when_told(tmp_path):
    path = write(tmp_path / "t.csv", *([f"{i}.jpg", name] for i, name in enumerate(["bored", "9", "calm", "calm"])),
                 header=["image", "expression"])  # fmt: skip
    table = read(path, expressions=("Bored=other", "9=Fear", "calm=-"))
    assert expressions(table) == [7, 3, None, None]
    assert table.unlabelled == {"calm": 2}


# ---------------------------------------------------------------------------------------------------------- AffectNet


def affectnet(path: Path, count: int = 22, *, header: bool = True) -> Path:
    rows = []
    for i in range(count):
        va = ["-2", "-2.000"] if i % 11 > 8 else ["0.5", str(i / 100)]
        rows.append([f"{i // 5}/{i}.jpg", "1", "1", "9", "9", "1.5;2.5", str(i % 11), *va])
    return write(path, *rows, header=AFFECTNET_HEADER) if header else write(path, *rows[1:], header=rows[0])


def test_affectnet_codes_are_mapped_by_name(tmp_path):
    table = read(affectnet(tmp_path / "training.csv", 11), table_format="affectnet")
    by_name = ["Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger"]
    assert expressions(table) == [EXPRESSIONS.index(name) for name in by_name] + [None] * 4
    assert table.annotations.va_mask.tolist() == [True] * 9 + [False] * 2
    assert not table.annotations.au_mask.any()
    assert table.unlabelled == {"Contempt (7)": 1, "None (8)": 1, "Uncertain (9)": 1, "No-Face (10)": 1}


@pytest.mark.parametrize("pair", ["Contempt=Other", "contempt = other", "7=Other"])
def test_affectnet_contempt_becomes_other_when_told(tmp_path, pair):
    table = read(affectnet(tmp_path / "t.csv", 11), table_format="affectnet", expressions=(pair,))
    assert expressions(table)[7:] == [7, None, None, None]
    assert "Contempt (7)" not in table.unlabelled


def test_affectnets_two_lists_are_train_and_val(tmp_path):
    train, val = affectnet(tmp_path / "training.csv"), affectnet(tmp_path / "validation.csv", 11)
    val.write_text(val.read_text().replace(".jpg", ".png"))  # other pictures
    source = split(train, TableOptions(table_format="affectnet", val_table=str(val)))
    assert {name: len(part.row) for name, part in source.splits.items()} == {"train": 22, "val": 11}
    assert source.unlabelled["None (8)"] == 3


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n\n"], ids=["plain", "byte order mark", "empty lines"])
@pytest.mark.parametrize("count", [1, 22])
def test_an_affectnet_list_without_a_header_is_the_same_table(tmp_path, count, start):
    with_header = affectnet(tmp_path / "training.csv", count)
    without = affectnet(tmp_path / "validation.csv", count, header=False)
    without.write_bytes(start + without.read_bytes())
    expected, found = (read(path, table_format="affectnet") for path in (with_header, without))
    assert found.annotations.row.tolist() == list(range(count))
    assert found.annotations.images == expected.annotations.images
    assert found.columns == expected.columns
    assert found.unlabelled == expected.unlabelled
    for name in ("va", "expr", "au", "va_mask", "expr_mask", "au_mask"):
        np.testing.assert_array_equal(getattr(found.annotations, name), getattr(expected.annotations, name), name)
    without.write_bytes(without.read_bytes().replace(b".jpg", b".png"))  # other pictures
    source = split(with_header, TableOptions(table_format="affectnet", val_table=str(without)))
    assert {name: len(part.row) for name, part in source.splits.items()} == {"train": count, "val": count}


ROW = ["1/a.jpg", "1", "1", "9", "9", "1.5;2.5", "3", "0.5", "0.25"]


@pytest.mark.parametrize(
    "first_line",
    [ROW[:8], [*ROW, "1"], [*ROW[:7], "high", "0.25"], ["", *ROW[1:]], [*ROW[:6], "", "0.5", "0.25"], ["x"] * 9],
    ids=repr,
)
def test_an_affectnet_list_that_has_neither_header_nor_layout_is_one_message(tmp_path, first_line):
    path = write(tmp_path / "t.csv", ROW, header=first_line)
    with pytest.raises(InputError) as error:
        read(path, table_format="affectnet")
    for word in (f"{path} begins with", ",".join(first_line), f"{len(first_line)} cells", ",".join(AFFECTNET_HEADER)):
        assert word in str(error.value)


def test_a_bad_row_of_a_list_without_a_header_is_named_by_its_place(tmp_path):
    path = write(tmp_path / "t.csv", ROW, [*ROW[:7], "7", "0"], header=ROW)
    with pytest.raises(InputError, match=r"row 2 \(from 0\), line 3: valence is '7'"):
        read(path, table_format="affectnet")
    path = write(tmp_path / "t.csv", ROW, ROW[:8], header=ROW)
    with pytest.raises(InputError, match="Row #3: Expected 9 columns, got 8"):
        read(path, table_format="affectnet")
    with pytest.raises(InputError, match=r"no column 'path' \(--columns\.image\)"):
        read(path, table_format="affectnet", columns=Columns(image="path"))


def test_a_plain_table_without_a_header_is_refused(tmp_path):
    with pytest.raises(InputError, match="no column 'image' in its first line"):
        read(write(tmp_path / "t.csv", header=["1/a.jpg", "1", "2", "9", "8", "1.5;2.5", "3", "0.5", "0.25"]))


def test_affectnets_codes_are_not_taken_for_ours(tmp_path):
    path = affectnet(tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"--columns\.image, or say --table-format affectnet"):
        read(path)
    with pytest.raises(InputError, match=r"row 9 .*valence is '-2'"):
        read(path, columns=Columns(image="subDirectory_filePath"))


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (changed(1, "1.7"), ["valence is '1.7'", "-1 to 1, or -5 or nothing"]),
        (changed(2, "-1.001"), ["arousal is '-1.001'"]),
        (changed(2, "inf"), ["arousal is 'inf'"]),
        (changed(1, "-2"), ["valence is '-2'"]),
        (changed(1, ""), ["arousal is '-0.25'", "both or neither"]),
        (changed(2, "-5"), ["valence is '0.5'", "both or neither of 'valence' and 'arousal'"]),
        (changed(1, "high"), ["valence is 'high'", "a number"]),
        (changed(3, "8"), ["expression is '8'", "Neutral, Anger", "0 to 7", "--expressions '8=Other'"]),
        (changed(3, "-2"), ["expression is '-2'"]),
        (changed(3, "2.5"), ["expression is '2.5'"]),
        (changed(3, "bored"), ["expression is 'bored'", "'bored=-' for no label"]),
        (changed(3, "Contempt"), ["expression is 'Contempt'"]),
        (changed(4, "2"), ["AU1 is '2'", "0, 1, or -1 or nothing"]),
        (changed(15, "0.5"), ["AU26 is '0.5'"]),
        (changed(9, "yes"), [f"AU{AUS[5]} is 'yes'"]),
        (changed(0, ""), ["image is empty", "a relative path"]),
        *[(changed(0, name), [f"image is {name!r}", "no '..'"])
          for name in ("/etc/x.jpg", "../x.jpg", "a/../b.jpg", "a\\b.jpg", "a//b.jpg", "a/./b.jpg", "a/", "a/\x1b.jpg",
                       "b" * 256)],
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_bad_row_is_refused_with_file_row_value_and_expectation(tmp_path, row, words, kind):
    path = write(tmp_path / "t.csv", GOOD, GOOD, row, row, GOOD)
    if kind == "parquet":
        path = tmp_path / "t.parquet"
        columns = dict(zip(HEADER, map(list, zip(GOOD, GOOD, row, row, GOOD))))
        parquet.write_table(pa.table(columns), path)
    with pytest.raises(InputError) as error:
        read(path)
    for word in (f"{path}, row 2 (from 0)", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("header", "columns", "words"),
    [
        (HEADER, {"valence": "valense"}, ["no column 'valense' (--columns.valence)", "did you mean 'valence'?"]),
        (HEADER, {"split": "part"}, ["no column 'part' (--columns.split)", "known: AU1"]),
        (HEADER, {"person": "x"}, ["--columns.person"]),
        (["path", *HEADER[1:]], {}, ["no column 'image' in its first line", "known:", "path", "--columns.image"]),
        (["imagee", *HEADER[1:]], {}, ["did you mean 'imagee'?"]),
        (["image", "Valence", "VALENCE", "arousal"], {}, ["'Valence', 'VALENCE'", "--columns.valence"]),
        (["image", "valance", "arousal", "expression"], {}, ["would be dropped", "--columns.valence 'valance'"]),
        ([*HEADER, "person_id"], {}, ["'person_id', which would be dropped", "--columns.person ''"]),
        ([*HEADER, "videos"], {}, ["'videos', which would be dropped", "if not --columns.video ''"]),
        ([*HEADER[:-1], "AU26_c"], {}, ["'AU26_c'", "AU{:02}_c", "leave out what is not named so"]),
        (["image", *(f"AU{n:02}" for n in AUS)], {"au": "AU{}"}, ["'AU01', 'AU02', 'AU04'", "would be dropped"]),
        (["image", "AU01", "au1", "AU_1"], {}, ["'AU01', 'au1', 'AU_1'", "--columns.au"]),
        (["image", "valence"], {}, ["has valence (column 'valence') and no arousal", "--columns.arousal"]),
        (["image", "v"], {}, ["has no labels", "known: image, v", "--columns.valence"]),
        (["image", "v"], {"valence": "v"}, ["has valence (column 'v') and no arousal"]),
        (HEADER, {"au": "au_{}"}, ["no column 'au_1', 'au_2', ... (--columns.au au_{})"]),
        (["image", "image", "valence"], {}, ["several columns 'image'"]),
        (["image", "expression", " expression"], {}, ["several columns 'expression'"]),
        (["image;valence;arousal"], {}, ["known: image;valence;arousal"]),
    ],
    ids=repr,
)
def test_a_column_that_is_not_there_is_named_with_what_is(tmp_path, header, columns, words):
    path = write(tmp_path / "t.csv", ["1"] * len(header), header=header)
    with pytest.raises(InputError) as error:
        read(path, columns=Columns(**columns))
    for word in (str(path), *words):
        assert word in str(error.value)


@pytest.mark.parametrize("pattern", ["AU", "AU{x}", "AU{", "AU{}{}"])
def test_a_pattern_without_one_place_for_the_number_is_refused(tmp_path, pattern):
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "t.csv", GOOD), columns=Columns(au=pattern))
    assert f"--columns.au is '{pattern}'; expected a pattern with {{}} for the number" in str(error.value)


def test_a_table_of_many_columns_does_not_fill_the_screen(tmp_path):
    path = write(tmp_path / "t.csv", ["0"] * 700, header=[f"p_{number}" for number in range(700)])
    with pytest.raises(InputError) as error:
        read(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"\n\n", "is empty"),
        ("t.csv", ",".join([*HEADER, "x\n"]).encode(), "no rows"),
        ("t.csv", b"image,expression\n1.jpg,1\n2.jpg\n", "Row #3: Expected 2 columns, got 1"),
        ("t.csv", b"image,expression\n\xff\xfe.jpg,1\n", "expected comma-separated UTF-8 text"),
        ("t.csv", "image,expression\n1.jpg,1\n".encode("utf-16"), "expected comma-separated UTF-8 text"),
        ("t.parquet", b"image,expression\n1.jpg,1\n", "expected a Parquet file"),
        ("t.parquet", b"", "expected a Parquet file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert words in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_parquet_column_that_is_no_value_is_refused(tmp_path):
    parquet.write_table(pa.table({"image": ["1.jpg"], "expression": [[1, 2]]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["absent.csv", "absent.parquet"])
def test_a_table_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("pair", ["Contempt", "Contempt=", "=Other", "Contempt=Bored", ""])
def test_a_meaning_that_is_none_is_refused(tmp_path, pair):
    with pytest.raises(InputError, match="expected NAME=CLASS with a class of Neutral, Anger"):
        read(write(tmp_path / "t.csv", GOOD), expressions=(pair,))


@given(st.text("ab./\\ \0é\u2028", max_size=12), st.sampled_from([None, 1, 2]))
@settings(max_examples=400, deadline=None)
def test_names_are_judged_alike_one_by_one_and_all_at_once(name, num_parts):
    found = find_bad_name(pa.array(["ok/1.jpg"] * (num_parts in (None, 2)) + [name]), num_parts=num_parts)
    assert (found is None) == is_image_name(name, num_parts=num_parts)


# ------------------------------------------------------------------------------------------------------------- splits

SPLIT_HEADER = ["image", "expression", "person", "split"]


def test_a_column_of_splits_parts_the_rows_and_others_are_counted(tmp_path):
    names = ["Train", "val", "test", "training", "validation", "", "valid", "test"]
    rows = [[f"v{i}/1.jpg", "hidden" if name == "test" else "1", "", name] for i, name in enumerate(names)]
    source = split(write(tmp_path / "t.csv", *rows, header=SPLIT_HEADER))
    assert {name: part.row.tolist() for name, part in source.splits.items()} == {"train": [0, 3], "val": [1, 4, 6]}
    assert source.left_out == {"split 'test'": 2, "no split": 1}
    assert source.num_videos == {"train": 2, "val": 3}
    assert source.splits["val"].images == ["v1/1.jpg", "v4/1.jpg", "v6/1.jpg"]


@pytest.mark.whole
def test_pictures_of_no_video_belong_to_their_persons_and_are_no_film(tmp_path):
    """A directory of several people's pictures was one video: nothing to draw, nothing to fit, and smoothed over."""
    rows = [[f"{'photos' if i < 16 else 'film'}/{i:04d}.jpg", str(i % 8), f"p{i // 4}" if i < 16 else "p9", "val"]
            for i in range(20)]  # fmt: skip
    rows += [["train/1.jpg", "0", "q", "train"], ["train/2.jpg", "1", "", "train"]]
    for row in rows:
        (tmp_path / row[0]).parent.mkdir(exist_ok=True)
        (tmp_path / row[0]).write_bytes(encode_jpeg(np.full((16, 16, 3), 99, np.uint8)))
    path = write(tmp_path / "t.csv", *rows, header=["image", "expression", "person", "split"])
    shards.main(["create", str(path), str(tmp_path / "set"), "--views", "cropped", "--jobs", "1"])
    for part, videos in (("train", ["train"] * 2), ("val", [f"person: p{i // 4}" for i in range(16)] + ["film"] * 4)):
        uri = f"{tmp_path}/set/cropped/{part}"
        shards.main(["verify", uri, "--jobs", "1"])
        names = row_names(Member("run", SimpleNamespace(config=Config()), read_sets([uri])))
        assert names.videos == videos
    assert number_videos(names.videos).tolist() == [i // 4 for i in range(20)]
    values, timeline = np.arange(20.0)[:, None], make_timeline(names.images, names.videos)
    smoothed = smooth(values, timeline, np.array([50]))[:, 0]
    assert smoothed.tolist() == [*range(16), 17.5, 17.5, 17.5, 17.5]


def test_a_picture_of_nobody_known_is_no_film_where_several_persons_are(tmp_path):
    persons = {"photos": ["a", "a", "b", "", "", ""], "film": ["c", "", "c"], "others": ["", ""]}
    rows = [[f"{directory}/{i:04d}.jpg", "1", person] for directory, people in persons.items()
            for i, person in enumerate(people)]  # fmt: skip
    rows += [["1.jpg", "1", ""], ["2.jpg", "1", "a"]]
    found = read(write(tmp_path / "t.csv", *rows, header=["image", "expression", "person"])).annotations
    a, b = "person: a", "person: b"
    alone = [f"photos/{i:04d}.jpg" for i in (3, 4, 5)]
    assert found.videos == [a, a, b, *alone, *["film"] * 3, *["others"] * 2, "1.jpg", a]
    values, timeline = np.arange(13.0)[:, None], make_timeline(found.images, found.videos)
    assert smooth(values, timeline, np.array([50]))[:, 0].tolist() == [*range(6), *[7] * 3, *[9.5] * 2, 11, 12]


@pytest.mark.whole
def test_videos_that_a_table_names_are_in_the_shards_and_part_what_is_scored(tmp_path):
    """Of images without directories: else every image would be a video, and weights fitted on its neighbours."""
    rows = [[f"{i:04d}.jpg", str(i % 8), "" if i == 7 else f"vidéo {i // 5}", "val" if i >= 20 else "train"]
            for i in range(40)]  # fmt: skip
    for row in rows:
        (tmp_path / row[0]).write_bytes(encode_jpeg(np.full((16, 16, 3), 99, np.uint8)))
    path = write(tmp_path / "t.csv", *rows, header=["image", "expression", "video", "split"])
    shards.main(
        ["create", str(path), str(tmp_path / "set"), "--views", "cropped", "--frames-per-shard", "8", "--jobs", "1"]
    )
    for part, first, count in (("train", 0, 20), ("val", 20, 20)):
        uri = f"{tmp_path}/set/cropped/{part}"
        shards.main(["verify", uri, "--jobs", "1"])
        names = row_names(Member("run", SimpleNamespace(config=Config()), read_sets([uri])))
        assert names.images == [row[0] for row in rows[first : first + count]]
        assert names.videos == [row[2] or row[0] for row in rows[first : first + count]]
    assert number_videos(names.videos).tolist() == [i // 5 for i in range(20)]
    with tarfile.open(tmp_path / "set/cropped/val/shard-000000.tar") as tar:
        label = json.load(tar.extractfile(tar.getmembers()[1]))
    assert label["video"] == f"vidéo {label['row'] // 5}"
    bad = write(tmp_path / "bad.csv", ["3.jpg", "1", "a\tb", "val"], header=["image", "expression", "video", "split"])
    with pytest.raises(InputError, match=r"row 0 \(from 0\), line 2: video is 'a\\tb' .*; expected printable"):
        read(bad)


def test_a_person_or_video_on_both_sides_is_an_error_with_its_way_out(tmp_path):
    rows = [[f"{i}.jpg", "1", f"p{i % 7}", "val" if i > 20 else "train"] for i in range(30)]
    path = write(tmp_path / "t.csv", *rows, header=SPLIT_HEADER)
    with pytest.raises(
        InputError, match=r"7 persons are in train and in val: p0, p1.* and 2 more.*--columns.person ''"
    ):
        split(path)
    assert len(split(path, TableOptions(columns=Columns(person=""))).splits["val"].row) == 9
    with pytest.raises(InputError, match=r"7 videos are in train and in val"):
        split(path, TableOptions(columns=Columns(person="", video="person")))
    header = SPLIT_HEADER[:3]
    train, val = (write(tmp_path / f"{name}.csv", *([name + row[0], *row[1:3]] for row in rows), header=header)
                  for name in ("a", "b"))  # fmt: skip
    with pytest.raises(InputError, match=r"a\.csv and .*b\.csv: 7 persons are in train and in val"):
        split(train, TableOptions(val_table=str(val)))


def test_a_row_is_named_by_its_line_too_and_a_name_with_its_likely_fault(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('image,expression,note\n\na/1.jpg,1,"two\nlines"\n./a/2.jpg,2,x\na/3.jpg,9,x\n')
    with pytest.raises(InputError, match=r"row 2 \(from 0\), line 6: expression is '9'"):
        read(path)
    path.write_text(path.read_text().replace(",9,", ",3,"))
    assert read(path).annotations.images == ["a/1.jpg", "a/2.jpg", "a/3.jpg"]
    for name, why in (
        ("https://x.org/1.jpg", "a URL is not fetched"),
        ("/a/1.jpg", "an absolute path"),
        ("a\\1.jpg", "by '/'"),
    ):
        with pytest.raises(InputError, match=rf"line 2: image is .*\({why}" if why != "by '/'" else "separated by '/'"):
            read(write(path, [name, "1"], header=["image", "expression"]))
    with pytest.raises(InputError, match=r"no validation part \(column 'split' has train and split 'test'\)"):
        split(write(path, ["1.jpg", "1", "train"], ["2.jpg", "1", "test"], header=["image", "expression", "split"]))


def test_one_picture_on_both_sides_is_an_error_and_one_directory_a_note(tmp_path):
    rows = [[f"{i % 3}/{i}.jpg", "1", f"p{i}", "val" if i > 6 else "train"] for i in range(9)]
    path = write(tmp_path / "t.csv", *rows, header=SPLIT_HEADER)
    assert split(path).notes[1].startswith("note: 2 directories have images of train and of val: 1, 2; if a directory")
    assert len(split(path, val_fraction=0.3, options=TableOptions(columns=Columns(split=""))).notes) == 1
    path = write(tmp_path / "t.csv", *rows, ["0/3.jpg", "1", "p9", "val"], header=SPLIT_HEADER)
    with pytest.raises(InputError, match=r"t\.csv: 1 images are in train and in val: 0/3\.jpg; .* by heart"):
        split(path)
    flat = [[f"{i}.jpg", *row[1:]] for i, row in enumerate(rows)]
    assert len(split(write(tmp_path / "t.csv", *flat, header=SPLIT_HEADER)).notes) == 1


def test_one_table_or_one_text_for_both_parts_is_an_error(tmp_path):
    path = write(tmp_path / "t.csv", GOOD)
    with pytest.raises(InputError, match=r"t\.csv, of the training rows, and .*t\.csv, .*, are the same file"):
        split(path, TableOptions(val_table=str(path)))
    copy = tmp_path / "copy.csv"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="are equal, byte for byte; expected other rows"):
        split(path, TableOptions(val_table=str(copy)))
    texts = [tmp_path / name for name in FILES.values()]
    lines = [ANNOTATIONS_HEADER, *(f"v{i}/1.jpg,-5,-5,1" + ",-1" * 12 for i in range(3))]
    for text in texts:
        text.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"training_set_annotations\.txt, .*, are equal, byte for byte"):
        split(tmp_path)
    texts[1].write_text("\n".join(lines[:2]))
    with pytest.raises(InputError, match=r"1 images are in train and in val: v0/1\.jpg"):
        split(tmp_path)
    texts[1].write_text("\n".join(lines[:2]).replace("1.jpg", "2.jpg"))
    assert [note.partition(";")[0] for note in split(tmp_path).notes] == ["note: 1 videos are in train and in val: v0"]


@pytest.mark.parametrize(
    ("names", "fraction", "with_val_table", "words"),
    [
        (["train", "val"], 0.5, False, "has rows of val; leave the option out"),
        (["val", "test"], None, False, "no rows of train (it has split 'test')"),
        (["test", "test"], 0.5, False, "no rows of train"),
        (["train", "test"], None, False, "no validation part"),
        (["train", "val"], None, True, "--val-table is given, but"),
        (None, 0.5, True, "--val-table and --val-fraction are given"),
        (None, None, False, "--columns.split, a second table with --val-table, or part the rows by video"),
        (None, 0.0, False, "--val-fraction is 0; expected more than 0"),
        (None, 1.5, False, "--val-fraction is 1.5"),
        (None, float("nan"), False, "--val-fraction is nan"),
    ],
)
def test_a_validation_part_is_given_exactly_once(tmp_path, names, fraction, with_val_table, words):
    rows = [["v/1.jpg", "1"], ["w/2.jpg", "2"]]
    if names:
        rows = [[*row, name] for row, name in zip(rows, names)]
    path = write(tmp_path / "t.csv", *rows, header=["image", "expression", "split"][: len(rows[0])])
    other = write(tmp_path / "other.csv", ["x/1.jpg", "1"], header=["image", "expression"])
    with pytest.raises(InputError) as error:
        split(path, TableOptions(val_table=str(other) if with_val_table else None), val_fraction=fraction)
    assert words in str(error.value)


def test_rows_of_train_alone_can_be_parted_by_fraction(tmp_path):
    rows = [[f"v{i // 2}/{i}.jpg", "1", "", "test" if i % 5 == 4 else "train"] for i in range(20)]
    source = split(write(tmp_path / "t.csv", *rows, header=SPLIT_HEADER), val_fraction=0.25)
    assert sorted([*source.splits["train"].row, *source.splits["val"].row]) == [i for i in range(20) if i % 5 != 4]
    assert source.left_out == {"split 'test'": 4}


def test_one_video_cannot_be_parted(tmp_path):
    path = write(tmp_path / "t.csv", *([f"images/{i}.jpg", "1"] for i in range(5)), header=["image", "expression"])
    with pytest.raises(InputError, match=r"all 5 rows are of one video or person \('images'\).*--columns.video"):
        split(path, val_fraction=0.2)
    assert len(split(path, TableOptions(columns=Columns(video="image")), val_fraction=0.2).splits["val"].row) == 1


def test_what_was_chosen_is_part_of_the_identity(tmp_path):
    path = write(tmp_path / "t.csv", *([f"v{i}/1.jpg", *GOOD[1:]] for i in range(9)))

    def identity(fraction: float = 0.3, seed: int = 0, **options) -> str:
        return read_source(path, TableOptions(**options), val_fraction=fraction, seed=seed).splits["val"].sha256

    same = [identity(), identity(columns=Columns(valence="valence")), identity(images=tmp_path)]
    others = [
        identity(fraction=0.4),
        identity(seed=1),
        identity(columns=Columns(au="")),
        identity(expressions=("a=-",)),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 5


@st.composite
def people(draw):
    """Videos and persons (None: unknown) of some rows."""
    num_rows = draw(st.integers(2, 80))
    videos = draw(st.lists(st.sampled_from([f"v{i}{end}" for i in range(12) for end in ("", "_left", "_right")]),
                           min_size=num_rows, max_size=num_rows))  # fmt: skip
    persons = draw(st.lists(st.sampled_from([None, *(f"p{i}" for i in range(30))]),
                            min_size=num_rows, max_size=num_rows))  # fmt: skip
    return videos, draw(st.sampled_from([None, persons]))


def reference_groups(videos, persons) -> list[str]:
    """Follow every link until nothing changes, the slow way."""
    label = {row: row for row in range(len(videos))}
    keys = [
        {("v", video.removesuffix("_left").removesuffix("_right")), ("p", person) if person else ("row", row)}
        for row, (video, person) in enumerate(zip(videos, persons or [None] * len(videos)))
    ]
    is_changed = True
    while is_changed:
        is_changed = False
        for a in label:
            for b in label:
                if keys[a] & keys[b] and label[a] != label[b]:
                    label[a] = label[b] = min(label[a], label[b])
                    is_changed = True
    return list(label.values())


def arrays(videos, persons):
    return pa.array(videos), None if persons is None else pa.array(persons, pa.string())


@given(people())
@settings(max_examples=150, deadline=None)
def test_rows_of_one_video_or_person_are_one_group(drawn):
    found, expected = group_rows(*arrays(*drawn)).tolist(), reference_groups(*drawn)
    assert len(set(zip(found, expected))) == len(set(found)) == len(set(expected))


@pytest.mark.whole
@given(people(), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_a_split_is_apart_whole_repeatable_and_near_the_fraction(drawn, fraction, seed):
    group = group_rows(*arrays(*drawn))
    if len(set(group.tolist())) < 2:
        with pytest.raises(InputError, match="of one video or person"):
            split_by_video(*arrays(*drawn), fraction=fraction, seed=seed)
        return
    is_val = split_by_video(*arrays(*drawn), fraction=fraction, seed=seed)
    assert is_val.shape == group.shape
    assert is_val.any()
    assert not is_val.all()
    assert not set(group[is_val]) & set(group[~is_val])
    assert abs(is_val.sum() - fraction * len(group)) <= np.bincount(group).max()
    np.testing.assert_array_equal(is_val, split_by_video(*arrays(*drawn), fraction=fraction, seed=seed))


def test_a_split_of_many_videos_is_as_large_as_asked_for_and_another_with_another_seed():
    videos = pa.array([f"v{i // 10}" for i in range(5000)])
    parts = [split_by_video(videos, None, fraction=0.1, seed=seed) for seed in (0, 1)]
    assert [part.sum() for part in parts] == [500, 500]
    assert (parts[0] != parts[1]).any()


def test_a_long_chain_of_videos_and_persons_is_one_group():
    links = list(pairwise(range(3000)))
    videos = pa.array([f"v{i}" for link in links for i in link])
    persons = pa.array([f"p{number}" for number, link in enumerate(links) for _ in link])
    assert set(group_rows(videos, persons).tolist()) == {0}


def test_a_video_is_the_directory_of_its_images():
    names = ["a/1.jpg", "a/b/1.jpg", "1.jpg", "ä/x.y/z"]
    assert video_of(pa.array(names)).to_pylist() == ["a", "a/b", "", "ä/x.y"]
