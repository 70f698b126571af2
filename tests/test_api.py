"""Predictions from Python: as the command predicts, of arrays, images and paths; what is refused, in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mtl_dist
from mtl_dist.faces.align import align, crop
from mtl_dist.faces.face import Face
from mtl_dist.predict import __main__ as predict
from mtl_dist.tasks import AUS, EXPRESSIONS, VIEWS
from tests.conftest import run_module
from tests.test_ensemble import rewrite_state


@pytest.fixture(scope="module")
def paths(dataset) -> list[str]:
    return sorted(map(str, (dataset / "cropped" / "v0").iterdir()))


@pytest.fixture(scope="module")
def model(run) -> mtl_dist.Model:
    return mtl_dist.load(run, device="cpu")


def matrix(result: mtl_dist.Prediction) -> np.ndarray:
    return np.column_stack([result.valence, result.arousal, result.expression, result.au])


def command(tmp_path: Path, runs: list[Path], *args: Path | str) -> np.ndarray:
    """(n, 22): what the command says."""
    out = tmp_path / "out.parquet"
    predict.main(["--runs", *map(str, runs), *map(str, args), "--out", str(out)])
    table = pq.read_table(out)
    names = ["valence", "arousal", *(f"p_{name}" for name in EXPRESSIONS), *(f"p_AU{number}" for number in AUS)]
    return np.column_stack([table[name].to_numpy() for name in names])


def test_the_package_alone_imports_nothing_heavy():
    done = run_module(
        "timeit", "-n1", "-r1", "import mtl_dist, sys; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert done.stdout.startswith("[]"), done.stdout + done.stderr
    with pytest.raises(AttributeError, match="'mtl_dist' has no attribute 'lode'"):
        _ = mtl_dist.lode


def test_paths_arrays_and_images_are_predicted_as_the_command_predicts_files(model, run, paths, dataset, tmp_path):
    expected = command(tmp_path, [run], "--input", dataset / "cropped" / "v0")
    result = model.predict(paths)
    np.testing.assert_array_equal(matrix(result), expected)
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    for given in (images, arrays, np.stack(arrays), [Path(paths[0]), *images[1:3], *arrays[3:]]):
        np.testing.assert_allclose(matrix(model.predict(given)), expected, atol=1e-5)
    for given in (paths[0], images[0], arrays[0]):
        np.testing.assert_allclose(matrix(model.predict(given)), expected[:1], atol=1e-5)
    np.testing.assert_allclose(matrix(model.predict(arrays, batch=3)), expected, atol=1e-5)
    assert len(result) == len(paths)
    assert result.most_probable == [result.expression_names[number] for number in expected[:, 2:10].argmax(1)]
    assert result.table().column_names[:4] == ["valence", "arousal", "expression", "p_Neutral"]


def test_a_picture_is_seen_upright_and_on_black_as_its_file_would_be(model, tmp_path):
    """By EXIF, with transparent parts, in shades of grey: what Pillow knows of a picture, an array does not tell."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 255, (60, 90, 4), np.uint8), "RGBA").save(tmp_path / "0.png")
    Image.fromarray(rng.integers(0, 255, (60, 60), np.uint8), "L").save(tmp_path / "1.png")
    Image.fromarray(rng.integers(0, 255, (90, 60, 3), np.uint8)).save(tmp_path / "2.png", exif=exif)
    files = sorted(map(str, tmp_path.glob("*.png")))
    found, expected = model.predict([Image.open(file) for file in files]), model.predict(files)
    np.testing.assert_array_equal(matrix(found), matrix(expected))


def test_both_views_are_given_by_name_and_averaged_as_the_command_does(runs, dataset, tmp_path):
    for view in VIEWS:
        shutil.copytree(dataset / view / "v0", tmp_path / "both" / view / "v0")
    both = mtl_dist.load([runs / view for view in VIEWS], device="cpu")
    assert both.views == VIEWS
    given = {view: sorted((tmp_path / "both" / view / "v0").iterdir()) for view in VIEWS}
    expected = command(tmp_path, [runs / view for view in VIEWS], "--input", tmp_path / "both")
    np.testing.assert_array_equal(matrix(both.predict(**given)), expected)
    with pytest.raises(mtl_dist.InputError, match=r"images was given; expected predict\(cropped=\.\.\., cropped_al"):
        both.predict(given["cropped"])
    with pytest.raises(mtl_dist.InputError, match=r"and cropped was given; expected predict\(cropped="):
        both.predict(cropped=given["cropped"])
    with pytest.raises(mtl_dist.InputError, match=r"views hold \{'cropped': 7, 'cropped_aligned': 8\} pictures"):
        both.predict(cropped=given["cropped"][1:], cropped_aligned=given["cropped_aligned"])


PICTURE = np.zeros((50, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], r"there are no pictures: the list is empty; expected RGB"),
        (np.zeros((0, 40, 40, 3), np.uint8), r"without a pixel"),
        (PICTURE / 255, r"the array is float64 of shape \(50, 40, 3\); expected uint8, 0 to 255: .*\* 255"),
        ([PICTURE, PICTURE / 255], r"picture 1 of the list is float64"),
        (PICTURE[..., 0], r"in shades of grey; .*np\.repeat"),
        (PICTURE[..., :1], r"in shades of grey"),
        (np.moveaxis(PICTURE, -1, 0), r"shape \(3, 50, 40\), its channels before height and width; .*np\.moveaxis"),
        (np.zeros((7, 3, 40, 40), np.uint8), r"its channels before"),
        (np.zeros((50, 40, 4), np.uint8), r"shape \(50, 40, 4\); expected RGB"),
        ([np.zeros((2, 40, 40, 3), np.uint8)], r"picture 0 of the list is uint8 of shape \(2, 40, 40, 3\); expected"),
        (Image.new("F", (40, 40)), r"Pillow's mode F; expected 8 bits a channel: convert\('RGB'\)"),
        (iter([PICTURE]), r"of type builtins\.list_iterator; expected RGB"),
        ([3], r"picture 0 of the list is of type builtins\.int"),
        (None, r"read cropped, and nothing was given; expected predict\(images\)"),
        ("gone.jpg", r"image gone\.jpg does not exist"),
        (".", r"\. is a directory; give the paths of its pictures"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence_that_says_what_to_do(model, given, words):
    with pytest.raises(mtl_dist.InputError, match=words) as error:
        model.predict(given)
    assert isinstance(error.value, ValueError)


def test_what_is_no_model_or_device_is_refused(run, tmp_path):
    for given in ([], None, [run, 3]):
        with pytest.raises(mtl_dist.InputError, match="expected a path or URI of a run, checkpoint or export"):
            mtl_dist.load(given)
    with pytest.raises(mtl_dist.InputError, match="has no committed checkpoint"):
        mtl_dist.load(tmp_path / "none")
    with pytest.raises(mtl_dist.InputError, match="device is 'tpu'; expected auto, cpu or cuda"):
        mtl_dist.load(run, device="tpu")
    with pytest.raises(mtl_dist.InputError, match="batch is 0; expected"):
        mtl_dist.load(run).predict(PICTURE, batch=0)


class Marked:
    """A detector of a user's own: finds faces where a picture is marked, one for each 50 of its first pixel's red."""

    name = "marked"

    def __call__(self, picture: np.ndarray) -> list[Face]:
        return [marked_face(number) for number in range(picture[0, 0, 0] // 50)]


def marked_face(number: int) -> Face:
    points = np.array([(38, 51), (73, 51), (56, 71), (41, 92), (70, 92)], np.float32) / 2 + [20 + 30 * number, 30]
    box = np.array([30 + 30 * number, 35, 70 + 30 * number, 85], np.float32)
    return Face(box, points.astype(np.float32), 0.9 - 0.3 * number)


def test_faces_of_whole_pictures_are_predicted_as_they_are_cut_out(runs):
    pictures = np.random.default_rng(1).integers(0, 255, (4, 120, 160, 3), np.uint8)
    pictures[:, 0, 0, 0] = (100, 0, 50, 100)
    where = [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1)]
    faces = [(pictures[number], marked_face(own)) for number, own in where]
    views = {
        "cropped": [crop(picture, face.box) for picture, face in faces],
        "cropped_aligned": [align(picture, face.points) for picture, face in faces],
    }
    for names in (["cropped"], ["cropped_aligned"], list(VIEWS)):
        own = mtl_dist.load([runs / view for view in names], device="cpu")
        found = own.predict_faces(list(pictures), detector=Marked(), batch=2)
        expected = own.predict(**{view: views[view] for view in names}, batch=2)
        np.testing.assert_array_equal(matrix(found), matrix(expected))
        assert found.picture.tolist() == [number for number, _ in where]
        np.testing.assert_array_equal(found.box, [face.box for _, face in faces])
        np.testing.assert_array_equal(found.points, [face.points for _, face in faces])
        assert found.num_pictures == 4
    assert found.table().column_names[:7] == ["picture", "left", "top", "right", "bottom", "confidence", "valence"]
    assert found.table()["picture"].to_pylist() == [0, 0, 2, 3, 3]
    assert own.predict_faces(pictures, detector=Marked(), min_confidence=0.8).picture.tolist() == [0, 2, 3]
    nothing = own.predict_faces(pictures[1], detector=Marked())
    assert (len(nothing), nothing.au.shape, nothing.num_pictures) == (0, (0, 12), 1)


def test_a_model_that_tells_no_view_cuts_no_faces(run, tmp_path):
    shutil.copytree(run, tmp_path / "old")
    rewrite_state(tmp_path / "old", view=None)
    with pytest.raises(mtl_dist.InputError, match="old do not say on which view they were trained"):
        mtl_dist.load(tmp_path / "old").predict_faces(PICTURE, detector=Marked())
