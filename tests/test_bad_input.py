"""Bad input ends with one message that says what, where and what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import INDEX_NAME, read_index, read_sets
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.sidecar import parse_sidecar
from mtl_dist.errors import InputError
from mtl_dist.objective.labelled import note_labels
from mtl_dist.predicting.inputs import open_frames
from mtl_dist.sections import LossConfig
from mtl_dist.shards.__main__ import create, inspect, synth, verify
from mtl_dist.shards.annotations import FILES, read_annotations
from mtl_dist.shards.columns import Columns, TableOptions
from mtl_dist.train import main as train_main
from mtl_dist.training import launch, same_disk
from tests.conftest import assert_one_message, run_here, run_module
from tests.s3_server import free_port
from tune.trial import check_seen

SAMPLES = 40


def jpeg(side: int = 48) -> bytes:
    return simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))


def picture_bomb() -> bytes:
    """A small file whose header claims 60000 x 60000 pixels: 10 GB decoded."""
    data = bytearray(jpeg())
    size = data.index(b"\xff\xc0") + 5  # SOF0: marker, length, precision, then height and width
    data[size : size + 4] = (60_000).to_bytes(2, "big") * 2
    return bytes(data)


def picture(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = image or Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    image.save(file, kind, **options)
    return file.getvalue()


BAD_IMAGES = {
    "missing": (None, ["do not exist", "restore"]),
    "empty": (b"", ["are empty"]),
    "truncated": (jpeg()[:-400], ["truncated", "whole JPEG"]),
    "cut in its header": (jpeg()[:200], ["expected a whole JPEG"]),
    "a web page": (b"<html>not found</html>", ["no picture (it begins with b'<html>not found"]),
    "a picture bomb": (picture_bomb(), ["60000 x 60000 pixels", "at most 4096"]),
    "a truncated PNG": (picture("PNG")[:-400], ["damaged or truncated PNG"]),
    "a PNG without its header": (picture("PNG")[:8] + bytes(99), ["damaged or truncated PNG (its header)"]),
}
# Whole pictures that are not taken: never left out as bad ones are.
FOREIGN_PICTURES = {
    "a HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "a HEIC, which is not read; convert it"),
    "a JPEG XL": (b"\xff\x0a" + bytes(99), "a JPEG XL, which is not read; convert it"),
    "two pages": (picture("TIFF", save_all=True, append_images=[Image.new("RGB", (48, 48))]), "2 moving pictures"),
    "16 bits": (picture("PNG", Image.fromarray(np.zeros((4, 4), np.uint16))), "PNG of mode I;16; expected 8 bits"),
    "moving": (picture("WEBP", save_all=True, append_images=[Image.new("RGB", (48, 48))]), "2 moving pictures"),
    "a bomb": (picture("PNG", Image.new("L", (20_000, 4))), "20000 x 4 pixels; at most 4096"),
    "a huge bomb": (picture("PNG", Image.new("1", (15_000, 15_000))), "too many pixels"),
}


@pytest.fixture
def source(dataset, tmp_path) -> Path:
    """A copy of the data set that a test may spoil."""
    return Path(shutil.copytree(dataset, tmp_path / "source"))


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copied"))


def spoil(source: Path, content: bytes | None, *, row: int = 33) -> Path:
    path = source / "cropped" / read_annotations(source / FILES["train"]).images[row]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return path


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


# --------------------------------------------------------------------------------------------------------- the images


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_with_its_row_and_no_set_is_written(source, tmp_path, kind):
    content, words = BAD_IMAGES[kind]
    path = spoil(source, content)
    with pytest.raises(InputError) as error:
        create(str(source), str(tmp_path / "dest"), frames_per_shard=3, jobs=1)
    for word in (str(path), "row 33", *words):
        assert word in str(error.value)
    assert_whole_shards_only(tmp_path / "dest")


@pytest.mark.whole
@pytest.mark.parametrize("kind", FOREIGN_PICTURES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_whole_picture_that_is_not_taken_is_named_and_never_skipped(source, tmp_path, kind, skip):
    content, words = FOREIGN_PICTURES[kind]
    path = spoil(source, content)
    with pytest.raises(InputError) as error:
        create(str(source), str(tmp_path / "dest"), jobs=1, skip_bad_images=skip)
    assert f"image {path}" in str(error.value)
    assert words in str(error.value)
    assert not (tmp_path / "dest" / "skipped.csv").exists()


def assert_whole_shards_only(root: Path) -> None:
    """No index, and every file one of a finished shard."""
    files = {path.name for path in files_below(root)}
    assert not [name for name in files if not name.startswith("shard-")]
    assert {name.removesuffix(".tar") for name in files if name.endswith(".tar")} == {
        name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")
    }


@pytest.mark.whole
def test_a_bad_image_at_the_command_line_with_several_processes(source, tmp_path):
    path = spoil(source, BAD_IMAGES["truncated"][0])
    done = run_module(
        "mtl_dist.shards", "create", str(source), str(tmp_path / "dest"), "--frames-per-shard", "2", "--jobs", "2"
    )
    assert_one_message(done, str(path), "row 33", "truncated")
    assert_whole_shards_only(tmp_path / "dest")
    finished = {path: path.stat().st_mtime_ns for path in files_below(tmp_path / "dest")}
    assert finished
    spoil(source, jpeg())  # mended, the same command continues after what is finished
    create(str(source), str(tmp_path / "dest"), frames_per_shard=2, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    create(str(source), str(tmp_path / "undisturbed"), frames_per_shard=2, jobs=1)
    for path in files_below(tmp_path / "undisturbed"):
        assert path.read_bytes() == (tmp_path / "dest" / path.relative_to(tmp_path / "undisturbed")).read_bytes()


def test_many_missing_images_are_counted_and_a_few_named(source, tmp_path):
    shutil.rmtree(source / "cropped" / "t1")
    with pytest.raises(InputError, match=r"8 of 40 listed images do not exist: .*and 3 more") as error:
        create(str(source), str(tmp_path / "dest"), jobs=1)
    assert str(error.value).count(".jpg") == 5


def test_a_file_whose_name_differs_in_unicode_form_only_is_told(tmp_path):
    (tmp_path / "jos\u00e9.jpg").write_bytes(jpeg())
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "b.jpg").write_bytes(jpeg())
    (tmp_path / "t.csv").write_text("image,expression\njose\u0301.jpg,1\nv/b.jpg,1\n")
    (tmp_path / "list.txt").write_text("image\njose\u0301.jpg\n")
    with pytest.raises(InputError, match=r"is there in another Unicode form \(NFC\)"):
        create(str(tmp_path / "t.csv"), str(tmp_path / "dest"), views=("cropped",), val_fraction=0.5, jobs=1)
    with pytest.raises(InputError, match=r"\(the first in line 2\).*in another Unicode form \(NFC\)"):
        open_frames(str(tmp_path / "list.txt"), scratch=tmp_path)
    (tmp_path / "list.txt").write_text("https://x.org/1.jpg\n")
    with pytest.raises(InputError, match=r"list\.txt:1: .* is no image path: a URL is not fetched"):
        open_frames(str(tmp_path / "list.txt"), scratch=tmp_path)


def test_a_directory_in_the_place_of_an_image_is_named(source, tmp_path):
    path = spoil(source, None)
    path.mkdir()
    with pytest.raises(InputError, match=path.name):
        create(str(source), str(tmp_path / "dest"), frames_per_shard=3, jobs=1)
    assert_whole_shards_only(tmp_path / "dest")


def test_a_bad_annotation_is_found_before_anything_is_written(source, tmp_path):
    path = source / FILES["val"]
    path.write_text(path.read_text().replace(",-1,", ",9,", 1))
    with pytest.raises(InputError, match=r"validation_set_annotations\.txt:\d+: .*9"):
        create(str(source), str(tmp_path / "dest"), jobs=1)
    assert files_below(tmp_path / "dest") == []


def test_a_source_that_is_no_data_set_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        create(str(tmp_path / "absent"), str(tmp_path / "dest"), jobs=1)
    with pytest.raises(InputError, match=r"training_set_annotations\.txt cannot be read"):
        create(str(tmp_path), str(tmp_path / "dest"), jobs=1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["table.csv is of one view", "--views cropped or --views cropped_aligned", "with other pictures"]),
        (
            ["--views", "cropped", "--expressions", "bored=-"],
            ["has no validation part", "--columns.split", "--val-table", "--val-fraction 0.1"],
        ),
        (["--views", "cropped", "--columns.valence", "valense"], ["'valense'", "did you mean 'valence'?"]),
        (["--views", "cropped", "--images", "/absent"], ["--images /absent is not a directory"]),
        (["--views", "cropped", "--val-fraction", "0.5"], ["table.csv, row 1 (from 0), line 3: expression is 'bored'"]),
        (["--views", "cropped", "--expressions", "bored"], ["'bored'", "expected NAME=CLASS"]),
        (["--views", "cropped", "--val-fraction", "0.5", "--expressions", "bored=-"], ["listed images do not exist"]),
    ],
)
def test_a_table_that_does_not_fit_ends_with_one_message(tmp_path, args, words):
    table = tmp_path / "table.csv"
    table.write_text("image,valence,arousal,expression\na/1.jpg,0,0,Happy\nb/2.jpg,0,0,bored\n")
    done = run_here("mtl_dist.shards", "create", str(table), str(tmp_path / "dest"), *args)
    assert_one_message(done, *words)
    assert files_below(tmp_path) == [table]


def test_options_that_would_have_no_effect_are_refused(dataset, tmp_path):
    for options, words in (
        ({"table": TableOptions(images=tmp_path)}, "--images describes a table"),
        ({"table": TableOptions(table_format="affectnet")}, "--table-format describes a table"),
        ({"table": TableOptions(columns=Columns(image="x"))}, "--columns describes a table"),
        ({"val_fraction": 0.1}, r"--val-fraction is given, but .*validation_set_annotations\.txt exists"),
        ({"views": ("cropped", "cropped")}, "--views is cropped cropped; expected every view once"),
    ):
        with pytest.raises(InputError, match=words):
            create(str(dataset), str(tmp_path / "dest"), jobs=1, **options)
    assert files_below(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- the destination


@pytest.mark.parametrize("place", ["below a file", "/proc/mtl_dist", "a file"])
def test_a_destination_that_cannot_be_written_is_named(dataset, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    dest = {"below a file": tmp_path / "file" / "dest", "a file": tmp_path / "file"}.get(place, Path(place))
    with pytest.raises(InputError, match=f"{dest}(.* cannot be written|, which is a file)"):
        create(str(dataset), str(dest), jobs=1)
    with pytest.raises(InputError, match=f"{dest}(.* cannot be written|, which is a file)"):
        synth(dest, num_train=2, num_val=2, jobs=1)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_unwritable_destination_at_the_command_line(dataset):
    done = run_here("mtl_dist.shards", "create", str(dataset), "/proc/mtl_dist")
    assert_one_message(done, "/proc/mtl_dist", "cannot be written")


@pytest.mark.parametrize("change", ["frames_per_shard", "seed", "annotations"])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_destination_with_other_shards_is_left_alone(source, copied, change, has_index):
    if not has_index:
        for path in copied.rglob(INDEX_NAME):
            path.unlink()
    before = {path: path.read_bytes() for path in files_below(copied)}
    settings = {"frames_per_shard": 7, "seed": 0} | ({change: 5} if change != "annotations" else {})
    if change == "annotations":
        path = source / FILES["train"]
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match=f"{copied}/cropped/train holds (other shards|'shard-)"):
        create(str(source), str(copied), jobs=1, **settings)
    assert {path: path.read_bytes() for path in files_below(copied)} == before


def test_a_destination_with_other_files_is_left_alone(dataset, tmp_path):
    (tmp_path / "cropped" / "train").mkdir(parents=True)
    (tmp_path / "cropped" / "train" / "thesis.docx").write_text("x")
    with pytest.raises(InputError, match=r"holds 'thesis\.docx'"):
        create(str(dataset), str(tmp_path), jobs=1)
    assert [path.name for path in files_below(tmp_path)] == ["thesis.docx"]


@pytest.mark.parametrize("flag", ["frames_per_shard", "jobs"])
def test_counts_below_one_are_refused(dataset, tmp_path, flag):
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} is 0; expected 1 or more"):
        create(str(dataset), str(tmp_path), **{flag: 0})


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", "s3:///x", "s3:/bucket/x"])
def test_an_address_of_another_kind_is_refused(dataset, uri):
    with pytest.raises(InputError, match=r"expected (a local path or )?s3://bucket/prefix"):
        create(str(dataset), uri, jobs=1)
    with pytest.raises(InputError, match=r"expected (a local path or )?s3://bucket/prefix"):
        verify(uri, jobs=1)


# ----------------------------------------------------------------------------------------------------------- the store


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, ["refuses these credentials", "AWS_SECRET_ACCESS_KEY"]),
        ({"AWS_ACCESS_KEY_ID": "nobody-knows-me"}, ["refuses these credentials", "AWS_ACCESS_KEY_ID"]),
    ],
)
def test_wrong_s3_credentials_are_named(dataset, s3, wrong, words):
    done = run_module("mtl_dist.shards", "create", str(dataset), "s3://mtl/refused", "--jobs", "1", env=wrong)
    assert_one_message(done, "s3://mtl/refused", s3.endpoint, *words)
    assert not s3.stored("refused").exists()


def test_missing_s3_credentials_are_named(s3, tmp_path):
    nowhere = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    nowhere["AWS_EC2_METADATA_DISABLED"] = "true"
    done = run_module("mtl_dist.shards", "inspect", "s3://mtl/x", env=nowhere)
    assert_one_message(done, "s3://mtl/x", "no S3 credentials", "AWS_ACCESS_KEY_ID")


def test_a_missing_bucket_is_named_when_reading_and_when_writing(dataset, s3):
    with pytest.raises(InputError, match="bucket 'absent' does not exist"):
        create(str(dataset), "s3://absent/x", jobs=1)
    with pytest.raises(InputError, match="bucket 'absent' does not exist"):
        read_index("s3://absent/x")
    done = run_here("mtl_dist.shards", "inspect", "s3://absent/x")
    assert_one_message(done, "s3://absent/x", "bucket 'absent' does not exist")


@pytest.mark.whole
def test_a_server_that_does_not_answer_is_named_in_bounded_time(dataset):
    endpoint = f"http://127.0.0.1:{free_port()}"
    nobody = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    began = time.monotonic()
    done = run_module(
        "mtl_dist.shards", "create", str(dataset), "s3://mtl/x", env={**nobody, "AWS_MAX_ATTEMPTS": "2"}, timeout=60
    )
    assert_one_message(done, "s3://mtl/x", "no S3 server answers at", endpoint, "AWS_ENDPOINT_URL")
    assert time.monotonic() - began < 20  # two attempts; with the default of six it is about 16 s


def test_an_object_that_is_not_there_is_no_set(s3):
    with pytest.raises(InputError, match="no shard set at 's3://mtl/nothing'"):
        read_index("s3://mtl/nothing")


# --------------------------------------------------------------------------------------------------- the configuration


def train(shards: Path, tmp_path: Path, *args: str) -> None:
    train_main([*arguments(shards, tmp_path), *args])


def arguments(shards: Path, tmp_path: Path) -> list[str]:
    data = [f"--data.{split}={shards / 'cropped' / split}" for split in ("train", "val")]
    return ["--dry-run", "--preset", "small", f"--run.storage={tmp_path / 'runs'}", "--train.global-batch=32", *data]


def test_the_good_case_of_these_tests_is_good(shards, tmp_path, capsys):
    train(shards, tmp_path)
    assert "40 rows of cropped" in capsys.readouterr().out


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  lrr: 0.1\n")
    done = run_here("mtl_dist.train", "--local", "--config", str(path))
    assert_one_message(done, "unknown configuration key 'optim.lrr'", "did you mean 'optim.lr'?")


def test_an_unknown_flag_names_the_nearest():
    assert_one_message(run_here("mtl_dist.train", "--local", "--optim.lrr", "0.1"), "--optim.lrr", "--optim.lr FLOAT")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: 3", "section 'optim' is 3"),
        ("optim:", "section 'optim' is None"),
        ("optim: 3\noptim.lr: x", "optim.lr is 'x'"),
        ("- optim", "holds a list"),
        ("optim: {lr: [}", "is not YAML"),
        ("\x00\x01", "is not YAML"),
        ("optim: {lr: -1}", "lr is -1"),
        ("optim: {name: adam}", "name is 'adam'"),
        ("data: {cache_gib: lots}", "cache_gib is 'lots'"),
        ("run: {name: ../../etc}", "a name is letters"),
    ],
)
def test_a_wrong_file_is_refused_with_key_value_and_expectation(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        train_main(["--config", str(path)])
    assert words in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match=f"configuration {path} cannot be read"):
            train_main(["--config", str(path)])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="unknown preset 'smal': did you mean 'small'"):
        train_main(["--preset", "smal"])


@pytest.mark.parametrize("flag", ["--preset", "--config"])
def test_a_flag_without_its_value_is_named(flag):
    with pytest.raises(InputError, match=f"{flag}: expected one argument"):
        train_main([flag])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.streams", "7"], ["data.streams 7 does not divide", "train.global_batch 32", "[1, 2, 4, 8, 16, 32]"]),
        (["--ray.num-ranks", "1", "64"], ["up to 64", "32 streams"]),
        (["--ray.num-ranks", "3", "2"], ["not 3 2"]),
        (["--engine.zero-stage", "3"], ["--engine.zero-stage", "'3'", "('0', '1', '2')"]),
        (["--optim.lr", "fast"], ["--optim.lr", "fast"]),
        (["--optim.lr=-1"], ["lr is -1", "greater than 0"]),
        (["--data.image-size", "0"], ["image_size is 0"]),
        (["--run.name", "a/b"], ["a name is letters"]),
    ],
)
def test_wrong_flags_are_refused_with_value_and_expectation(shards, tmp_path, args, words):
    with pytest.raises(InputError) as error:
        train(shards, tmp_path, *args)
    for word in words:
        assert word in str(error.value)


# ------------------------------------------------------------------------------------------------------------ the sets


def test_training_without_data_says_which_flag(tmp_path):
    with pytest.raises(InputError, match=r"--data\.train is not given"):
        train_main(["--preset", "small"])
    with pytest.raises(InputError, match=r"no shard set at .*absent.*create"):
        train_main([f"--data.train={tmp_path / 'absent'}", f"--data.val={tmp_path}"])


def test_sets_of_two_views_are_refused_at_the_command_line(shards, tmp_path):
    done = run_here(
        "mtl_dist.train", "--local", "--preset", "small", f"--run.storage={tmp_path / 'runs'}",
        f"--data.train={shards / 'cropped' / 'train'}", f"--data.val={shards / 'cropped_aligned' / 'val'}",
    )  # fmt: skip
    assert_one_message(done, "'cropped'", "'cropped_aligned'", "expected both of one view")
    assert files_below(tmp_path) == []


def test_a_split_in_the_place_of_the_other_is_refused(shards, tmp_path):
    train_set, val_set = (str(shards / "cropped" / split) for split in ("train", "val"))
    with pytest.raises(InputError, match=r"data\.train is an index of split 'val'; expected 'train'"):
        train(shards, tmp_path, f"--data.train={val_set}")
    with pytest.raises(InputError, match=r"data\.val is an index of split 'train'; expected 'val'"):
        train(shards, tmp_path, f"--data.val={train_set}")


def test_a_batch_larger_than_the_set_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"train\.global_batch is 64, but .* has 40 rows"):
        train(shards, tmp_path, "--train.global-batch", "64")


def make_sets(dest: Path, *, train: str = "a", val: str = "a", shared: int = 0) -> list[str]:
    """Write shards of a table; return the arguments of a dry run with them.

    Its parts have labels of all tasks (a), one (v, e, u) or none; `shared` of 10 validation pictures are training
    pictures.
    """
    labels = {"a": "0.1,0.2,3,1", "v": "0.1,0.2,,", "e": ",,3,", "u": ",,,0", "": ",,,"}
    rng = np.random.default_rng(0)
    pictures = [simplejpeg.encode_jpeg(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(30)]
    parts = {"train": pictures[:20], "val": pictures[20 - shared : 30 - shared]}
    lines = ["image,valence,arousal,expression,AU1,split"]
    for split, kind in (("train", train), ("val", val)):
        (dest / split).mkdir(parents=True)
        for number, data in enumerate(parts[split]):
            (dest / split / f"{number}.jpg").write_bytes(data)
            lines.append(f"{split}/{number}.jpg,{labels[kind]},{split}")
    (dest / "t.csv").write_text("\n".join(lines) + "\n")
    create(str(dest / "t.csv"), str(dest / "set"), views=("cropped",), jobs=1)
    sets = ["--data.train", f"{dest}/set/cropped/train", "--data.val", f"{dest}/set/cropped/val"]
    return ["--dry-run", "--preset=small", "--train.global-batch=8", f"--run.storage={dest}", *sets]


@pytest.mark.parametrize(
    ("train", "val", "flags", "words"),
    [
        ("", "a", [], "set/cropped/train has labels of no task, and the weights of losses are loss.va 1, loss.expr 1"),
        ("v", "a", ["--loss.va", "0"], "set/cropped/train has labels of va, and the weights of losses are loss.va 0"),
        ("a", "", [], "set/cropped/val has labels of no task, and trained are va, expr, au: nothing of it would be"),
        ("u", "e", [], "set/cropped/val has labels of expr, and trained are au: nothing of it would be scored"),
    ],
)
def test_sets_that_nothing_could_be_learnt_from_or_scored_on_are_refused(tmp_path, train, val, flags, words):
    with pytest.raises(InputError) as error:
        train_main([*make_sets(tmp_path, train=train, val=val), *flags])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("train", "val", "flags", "notes"),
    [
        ("a", "a", [], []),
        ("a", "a", ["--loss.expr", "0"], ["expr is scored and not trained: its loss has weight 0"]),
        ("e", "e", [], [f"{task} is not trained: the training set has no labels of it" for task in ("va", "au")]),
        ("e", "a", [], [f"{task} is scored and not trained: the training set has no labels" for task in ("va", "au")]),
        ("a", "e", [], [f"{task} is trained and not scored: the validation set has no" for task in ("va", "au")]),
    ],
)
def test_what_is_trained_and_not_scored_or_the_other_way_is_said(tmp_path, capsys, train, val, flags, notes):
    train_main([*make_sets(tmp_path, train=train, val=val), *flags])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note    ")]
    assert len(said) == len(notes)
    for line, note in zip(said, notes):
        assert line.startswith(f"note    {note}")


def test_an_action_unit_that_only_one_set_has_labels_of_is_said(shards):
    train, val = (read_sets([str(shards / "cropped" / split)]) for split in ("train", "val"))

    def without(sets, unit: int):
        return sets.labels.model_copy(update={"au": [n * (place != unit) for place, n in enumerate(sets.labels.au)]})

    assert note_labels(LossConfig(), without(train, 0), without(val, 2)) == [
        "AU4: trained and not scored, for want of labels", "AU1: scored and not trained, for want of labels"
    ]  # fmt: skip


def test_a_validation_set_of_training_pictures_is_refused_and_a_part_of_them_counted(tmp_path, capsys):
    with pytest.raises(InputError, match=r"set/cropped/val has the pictures of .*/train: 10 of 10 validation pictures"):
        train_main(make_sets(tmp_path / "all", shared=10))
    train_main(make_sets(tmp_path / "some", shared=3))
    assert "note    3 of 10 validation pictures are training pictures too" in capsys.readouterr().out


def test_under_torchrun_the_first_rank_of_each_node_alone_reads_both_sets_for_shared_pictures(tmp_path, monkeypatch):
    args = [arg for arg in make_sets(tmp_path, shared=10) if arg != "--local"]
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(4):  # of two nodes
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        with contextlib.nullcontext() if rank % 2 else pytest.raises(InputError, match="10 of 10 validation pictures"):
            train_main(args)


@pytest.mark.parametrize("suffix", ["tar", "safetensors"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_is_gone_is_found_before_training(copied, tmp_path, split, suffix):
    path = copied / "cropped" / split / f"shard-000001.{suffix}"
    path.unlink()
    with pytest.raises(InputError, match=f"{path} is gone, but the index lists it.*verify.*create"):
        train(copied, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_shard_whose_size_changed_is_found_before_training(copied, tmp_path):
    path = copied / "cropped" / "train" / "shard-000002.tar"
    size = path.stat().st_size
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(InputError, match=f"{path} has {size + 512} bytes; the index says {size}"):
        train(copied, tmp_path)


def test_a_damaged_index_is_found_before_training(copied, tmp_path):
    path = copied / "cropped" / "train" / INDEX_NAME
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(InputError, match="its checksum does not match"):
        train(copied, tmp_path)


@pytest.mark.parametrize("what", ["image", "sidecar"])
def test_a_shard_whose_content_changed_at_the_same_size_is_found_when_it_is_read(copied, what):
    directory = copied / "cropped" / "train"
    path = directory / ("shard-000003.tar" if what == "image" else "shard-000003.safetensors")
    sidecar = parse_sidecar((directory / "shard-000003.safetensors").read_bytes())
    data = bytearray(path.read_bytes())
    data[int(sidecar.offset[4]) + 700 if what == "image" else -1] ^= 1
    path.write_bytes(data)
    reader = ShardReader(str(directory), read_index(str(directory)), Cache())
    good = np.array([i for i in range(SAMPLES) if i // 7 != 3])
    assert len(reader.read_batch(good, 48).rows) == len(good)
    where = f"{path}, row {sidecar.row[4]}: its bytes" if what == "image" else f"{path}: its bytes"
    with pytest.raises(InputError, match=f"{where} do not match their checksum.*verify"):
        reader.read_batch(np.array([3 * 7 + 4]), 48)


def test_a_shard_that_disappears_during_training_is_named(copied):
    directory = copied / "cropped" / "train"
    reader = ShardReader(str(directory), read_index(str(directory)), Cache())
    storage.delete(str(directory / "shard-000000.tar"))
    with pytest.raises(InputError, match=r"shard-000000\.tar is gone, but the index lists it"):
        reader.read_batch(np.array([0]), 48)


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mtl_dist.shards create", ["missing from python -m mtl_dist.shards create:", "SOURCE", "DEST"]),
        ("mtl_dist.shards create a b --jbos 3", ["--jbos", "in python -m mtl_dist.shards verify --help"]),
        ("mtl_dist.shards inspect nosuch", ["no shard set at 'nosuch'"]),
        ("mtl_dist.train --optm.lr 3", ["unrecognized options: --optm.lr", "--optim.lr FLOAT"]),
        ("mtl_dist.train --optim.lr -3", ["error: optim.lr is -3.0: "]),
        ("mtl_dist.train --optim.lr x", ["error: --optim.lr: could not convert"]),
        ("mtl_dist.train --data.streams 7", ["error: data.streams 7 does not divide train.global_batch 24: every"]),
        ("mtl_dist.train --model.name e", ["invalid choice 'e'", "'baseline'"]),
        ("mtl_dist.train --preset", ["argument --preset: expected one argument; see python -m mtl_dist.train --help"]),
        ("mtl_dist.train --model.backbone convnext_tiny", ["timm:convnext_tiny or torchvision:convnext_tiny"]),
        ("mtl_dist.predict --runs", ["missing from python -m mtl_dist.predict:", "--out"]),
        ("mtl_dist.export", ["missing from python -m mtl_dist.export:", "--out"]),
        ("mtl_dist.ensemble", ["missing from python -m mtl_dist.ensemble:", "--runs"]),
        ("mtl_dist.report", ["missing from python -m mtl_dist.report:", "--out"]),
        ("mtl_dist.soup", ["missing from python -m mtl_dist.soup:", "--out"]),
        ("tune.search --search.trials 0", ["error: search.trials is 0: "]),
        ("cluster.demo --dta x", ["unrecognized options: --dta, x", "python -m cluster.demo --help"]),
        ("cluster.local upp", ["unrecognized options: upp", "subcommands: up, down, status"]),
        ("cluster.local up --hosts 0", ["error: hosts is 0, expected 1 to 32"]),
        ("cluster.local exec 0", ["missing from python -m cluster.local exec:", "-- COMMAND"]),
    ],
)
def test_what_a_command_line_refuses_is_said_in_one_style(command, words):
    done = run_here(*command.split())
    assert_one_message(done, *words)
    assert done.stderr.startswith("error: ")
    assert not set(done.stderr) & set("│╭╰─|")


def test_what_does_not_start_leaves_no_directory(shards, tmp_path):
    """Neither a dry run, nor a run whose weights are not there, nor a set whose source is refused."""
    train = ["mtl_dist.train", "--local", "--preset", "small", "--data.train", f"{shards}/cropped/train"]
    train += ["--data.val", f"{shards}/cropped/val", "--run.storage", f"{tmp_path}/runs"]
    assert run_here(*train, "--dry-run").returncode == 0
    assert_one_message(run_here(*train, "--model.weights", f"{tmp_path}/no.pth"), "no.pth does not exist")
    done = run_here("mtl_dist.shards", "create", str(tmp_path / "no.csv"), str(tmp_path / "dest"), "--views", "cropped")
    assert_one_message(done, "no.csv")
    storage.check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- places that go with a Ray job


@pytest.fixture(params=["relative", "absolute"])
def throw_away(request, tmp_path, monkeypatch) -> str:
    """What a command in a job is given: a relative path, or one in Ray's copy of the working directory."""
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy if request.param == "absolute" else tmp_path)
    if request.param == "absolute":
        return f"{copy}/out"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as `ray job submit` does
    return "out"


def test_storage_that_goes_with_a_ray_job_is_refused(dataset, shards, throw_away, tmp_path):
    data = [f"--data.{split}={shards / 'cropped' / split}" for split in ("train", "val")]
    for call, flag in (
        (lambda: train_main(["--preset=small", "--dry-run", *data, f"--run.storage={throw_away}"]), "--run.storage"),
        (lambda: create(str(dataset), throw_away, jobs=1), "DEST"),
        (lambda: synth(Path(throw_away), num_train=1, num_val=1, jobs=1), "DEST"),
        (lambda: inspect(str(shards / "cropped/val"), sheet=Path(f"{throw_away}.png")), "--sheet"),
    ):
        with pytest.raises(InputError, match=rf"^{flag} is {throw_away}.*, inside the working directory of a Ray job"):
            call()
    assert not files_below(tmp_path)
    train_main(["--preset=small", "--dry-run", *data, f"--run.storage={tmp_path}", "--train.global-batch=8"])


def test_the_default_storage_is_refused_in_a_ray_job(shards, monkeypatch):
    data = [f"--data.{split}={shards / 'cropped' / split}" for split in ("train", "val")]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match=r"--run\.storage is runs, inside the working directory of a Ray job"):
        train_main(["--preset=small", "--dry-run", *data])


def test_a_rank_on_a_host_with_another_disk_of_the_same_path_says_so(tmp_path):
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    note = f"{tmp_path}/run/failed-0123.json"
    with same_disk.seen_by_all(note):
        same_disk.check_seen(note)
        assert [path.name for path in files_below(tmp_path)] == ["driver-0123.json"]
    assert not files_below(tmp_path)
    same_disk.check_seen("s3://bucket/runs/run/failed-0123.json")
    with pytest.raises(
        InputError, match=r"does not see .*/run of the host that started the run: --run\.storage"
    ) as error:
        launch._rank_main({"note": note})
    told = UserExceptionWithTraceback(error.value, "a traceback")  # it could not be noted in the storage
    assert launch._input_error_of(WorkerGroupError("failed", {0: RuntimeError(), 1: told})) is error.value
    assert launch._input_error_of(WorkerGroupError("failed", {0: RuntimeError()})) is None


def test_a_trial_on_a_host_with_another_disk_of_the_same_path_says_so(tmp_path):
    (tmp_path / "search.json").write_text("{}")
    check_seen(str(tmp_path))
    with pytest.raises(InputError, match=r"does not see .*/elsewhere of the host that started the search"):
        check_seen(str(tmp_path / "elsewhere"))
