"""Exports: the ONNX graph beside torch on faces, the model card's code, the round trip, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file, save

from mtl_dist import storage
from mtl_dist.data.augment import ImagePreparation
from mtl_dist.data.decode import decode
from mtl_dist.data.unlabelled import unlabelled
from mtl_dist.errors import Damaged, InputError
from mtl_dist.export import __main__ as export
from mtl_dist.export import job
from mtl_dist.export.card import write_card
from mtl_dist.export.graph import PixelModel, largest_difference, resize_matrix, run_onnx, write_onnx
from mtl_dist.model_config import ModelConfig
from mtl_dist.models import build_model
from mtl_dist.predict import __main__ as predict
from mtl_dist.predicting.evaluate import predict as predict_batches
from mtl_dist.runs.checkpoint import best, committed
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.sealed import seal, unseal
from mtl_dist.sections import AugmentConfig
from mtl_dist.synthetic.render import write_synthetic
from tests.conftest import LONDON
from tests.test_checkpoint import flips
from tests.test_ensemble import rewrite
from tests.test_predict import read_rows

SIZE = 80  # of the images that the run was trained at


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    write_synthetic(root, num_train=16, num_val=2, frames_per_video=4)
    return root / "cropped"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """An export of the run, compared on its validation set."""
    out = tmp_path_factory.mktemp("exports") / "model"
    export.main([str(run), "--out", str(out)])
    return out


def read_pixels(paths: list[Path], size: int = SIZE) -> np.ndarray:
    """(n, 3, size, size) uint8."""
    return np.stack([decode(path.read_bytes(), size).transpose(2, 0, 1) for path in paths])


def run_torch(model: torch.nn.Module, images: np.ndarray, input_size: int):
    batch = unlabelled(images.transpose(0, 2, 3, 1), range(len(images)))
    return predict_batches(
        model, [batch], prepare=ImagePreparation(AugmentConfig(), input_size), device=torch.device("cpu")
    ).predictions


def test_an_export_holds_these_files_and_their_checksums(exported, run):
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "model.onnx", "config.json", "README.md"}
    about = json.loads((exported / "config.json").read_text())
    chosen = best(committed(str(run))[0])
    assert (about["step"], about["image_size"], about["scores"]) == (chosen.step, SIZE, chosen.scores)
    for name, file in about["files"].items():
        assert (exported / name).stat().st_size == file["bytes"]
    mine, theirs = load_file(exported / "model.safetensors"), load_file(f"{chosen.uri}/model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    loaded = onnx.load(exported / "model.onnx")
    assert {prop.key: prop.value for prop in loaded.metadata_props}["expressions"].startswith("Neutral,Anger,Disgust")
    assert str(run.parent) not in "".join((exported / name).read_text() for name in ("config.json", "README.md"))


def test_onnxruntime_answers_as_torch_does_on_rendered_faces(exported, run, faces):
    images = read_pixels(sorted(faces.rglob("*.jpg")))
    reference = run_torch(load_weights(open_weights(str(run))), images, SIZE)
    assert largest_difference(run_onnx(exported / "model.onnx", images, batch=7), reference) < 1e-5
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["va", "expr", "au"]
    assert session.get_inputs()[0].shape[1:] == [3, SIZE, SIZE]
    np.testing.assert_allclose(session.run(["expr"], {"images": images})[0].sum(-1), 1, atol=1e-5)


@pytest.mark.skipif(not LONDON.exists(), reason="needs the photographs of the Face Research Lab London Set")
def test_onnxruntime_answers_as_torch_does_on_photographs(exported, run):
    images = read_pixels(sorted(LONDON.glob("cropped/**/*.jpg"))[:40])
    assert len(images) == 40
    reference = run_torch(load_weights(open_weights(str(run))), images, SIZE)
    found = run_onnx(exported / "model.onnx", images, batch=16)
    assert largest_difference(found, reference) < 1e-5
    assert np.ptp(found.va, axis=0).min() > 1e-4  # it tells photographs apart


def test_an_export_predicts_the_same_bytes_as_its_run(exported, run, faces, tmp_path):
    for name, source in (("run", run), ("export", exported)):
        predict.main(["--runs", str(source), "--input", str(faces), "--out", str(tmp_path / f"{name}.csv")])
    assert len(read_rows(tmp_path / "run.csv")) == 18
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "export.csv").read_bytes()


def test_an_export_tells_its_view_and_one_of_before_opens_without(exported, run, runs, tmp_path):
    about = json.loads((exported / "config.json").read_text())
    assert (about["view"], open_weights(str(exported)).view) == ("cropped", "cropped")
    assert "one face as those of view `cropped` are: the face and" in (exported / "README.md").read_text()
    aligned = tmp_path / "aligned"
    export.main([str(runs / "cropped_aligned"), "--out", str(aligned), "--formats", "safetensors"])
    assert "view `cropped_aligned` are: the face alone" in (aligned / "README.md").read_text()
    plain = tmp_path / "plain"  # pictures, but no directory for each view
    plain.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(plain / "a.png")
    names = rf"--runs names {exported}, of view 'cropped', and {aligned}, of view 'cropped_aligned'; expected of"
    with pytest.raises(
        InputError, match=rf"{names} --input {plain} the same pictures in cropped/ and cropped_aligned/ below"
    ):
        predict.main(["--runs", str(exported), str(aligned), "--input", str(plain), "--out", str(tmp_path / "out.csv")])
    del about["view"], about["sha256"]
    (aligned / "config.json").write_text(json.dumps(about))
    assert open_weights(str(aligned)).view is None
    older = open_weights(str(run))._replace(view=None)
    assert "cut to one face.\n" in write_card(older, files={}, constant=None, checked=None)


def test_the_model_cards_code_runs_and_its_scores_stand_beside_the_constant_predictors(
    exported, run, faces, tmp_path, monkeypatch
):
    card = (exported / "README.md").read_text()
    score = best(committed(str(run))[0]).scores["p"]
    assert re.search(r"^\| constant predictor \| 0\.0000 \|.*\|$", card, re.MULTILINE)
    assert re.search(rf"^\| this model \|.*\| {score:.4f} \|$", card, re.MULTILINE)
    for sha256 in open_weights(str(run)).state["identity"].values():
        assert sha256 in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exif = Image.Exif()
    exif[0x112] = 6  # as a phone held upright writes it
    Image.open(next(faces.rglob("*.jpg"))).resize((SIZE, SIZE)).save(tmp_path / "face.jpg", exif=exif)
    for name in ("config.json", "model.safetensors", "model.onnx"):
        shutil.copy(exported / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch_names, onnx_names = {}, {}
    for code, names in zip(snippets, (torch_names, onnx_names), strict=True):
        exec(code, names)
    # PIL decodes a JPEG a grey level differently here and there.
    np.testing.assert_allclose(torch_names["outputs"].va[0], onnx_names["va"], atol=1e-3)


@pytest.mark.parametrize(("size", "to_size"), [(112, 299), (120, 80), (80, 96)])
def test_two_matrix_products_are_torchs_resize(size, to_size):
    images = torch.rand(2, 3, size, size)
    matrix = resize_matrix(size, to_size)
    resized = F.interpolate(images, size=(to_size, to_size), mode="bilinear", antialias=True)
    torch.testing.assert_close(matrix @ images @ matrix.T, resized, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(80, 80), (80, 96), (120, 80)])
def test_the_graphs_pixels_in_probabilities_out_are_those_of_predict(sizes):
    image_size, input_size = sizes
    model = build_model(ModelConfig(name="a", backbone="small", weights="none"), input_size=input_size).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, image_size, image_size), np.uint8)
    with torch.no_grad():
        found = PixelModel(model, image_size=image_size, input_size=input_size)(torch.from_numpy(images))
    reference = run_torch(model, images, input_size)
    for mine, theirs in zip(found, reference, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "backbone", "sizes"),
    [
        ("baseline", "vgg_small", (96, 80)),
        ("d", "small", (96, 80)),
        pytest.param("b", "small", (80, 80), marks=pytest.mark.slow),
        pytest.param("a", "inception_v3", (112, 299), marks=pytest.mark.slow),
        pytest.param("b", "inception_v3", (112, 112), marks=pytest.mark.slow),
        pytest.param("baseline", "vgg16", (112, 112), marks=pytest.mark.slow),
        pytest.param("a", "torchvision:resnet18", (112, 112), marks=pytest.mark.slow),
        pytest.param("a", "timm:convnext_atto", (112, 128), marks=pytest.mark.slow),
    ],
)
def test_models_become_graphs_that_answer_alike(tmp_path, name, backbone, sizes):
    image_size, input_size = sizes
    config = ModelConfig(name=name, backbone=backbone, weights="none", hidden=64)
    model = build_model(config, input_size=input_size).eval()
    write_onnx(model, tmp_path / "model.onnx", image_size=image_size, input_size=input_size)
    images = np.random.default_rng(1).integers(0, 256, (3, 3, image_size, image_size), np.uint8)
    found = run_onnx(tmp_path / "model.onnx", images, batch=2)
    assert largest_difference(found, run_torch(model, images, input_size)) < 1e-4


def test_a_graph_that_answers_otherwise_is_an_error_and_nothing_is_left(run, exported, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "TOLERANCE", 0.0)  # which no two runtimes keep to
    monkeypatch.setattr(job, "write_onnx", lambda model, path, **sizes: shutil.copy(exported / "model.onnx", path))
    with pytest.raises(SystemExit, match=r"^error: the ONNX graph of .* does not answer as torch does") as ended:
        export.main([str(run), "--out", str(tmp_path / "out"), "--images", str(faces)])
    assert isinstance(ended.value.code, str)  # printed to stderr, exit code 1
    assert list(tmp_path.iterdir()) == []


def test_the_weights_alone_need_no_onnx_and_replace_an_earlier_export(run, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_text("of other weights")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what makes Python say that there is no such module
    with pytest.raises(InputError, match=r"needs onnxruntime.*pip install 'mtl_dist\[export\]'"):
        export.main([str(run), "--out", str(tmp_path)])
    assert (tmp_path / "model.onnx").exists()
    export.main([str(run), "--out", str(tmp_path), "--formats", "safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    with pytest.raises(InputError, match="is an export already"):
        export.main([str(tmp_path), "--out", str(tmp_path / "again"), "--formats", "safetensors"])


def test_a_validation_set_that_has_moved_is_named_with_what_to_give_instead(run, tmp_path):
    val = run.parent / "shards" / "cropped" / "val"
    val.rename(tmp_path / "val")
    try:
        with pytest.raises(InputError, match=rf"validation set.*{val}.*--images"):
            export.main([str(run), "--out", str(tmp_path / "out")])
        export.main([str(run), "--out", str(tmp_path / "weights"), "--formats", "safetensors"])
        (run / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
        export.main([str(run), "--out", str(tmp_path / "old"), "--formats", "safetensors"])
    finally:
        (tmp_path / "val").rename(val)
        (tmp_path / "metrics.jsonl").rename(run / "metrics.jsonl")
    assert not (tmp_path / "out").exists()
    card, of_before_it_was_recorded = ((tmp_path / name / "README.md").read_text() for name in ("weights", "old"))
    assert re.search(r"^\| RMSE valence, lower is better \| 0\.\d{4} \| 0\.\d{4} \|$", card, re.MULTILINE)
    assert "the validation set was not reachable" in of_before_it_was_recorded


def test_a_run_without_a_finished_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing has no committed checkpoint"):
        export.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load_weights", lambda found: pytest.fail("begun"))
    (tmp_path / "file").touch()
    (tmp_path / "earlier").mkdir()
    real = os.open

    def open_file(path, flags, *args, **options):
        if flags & os.O_ACCMODE and "earlier" in Path(path).parts:  # read-only, for everyone but root
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_file)
    with pytest.raises(InputError, match=rf"--out is {tmp_path}/file, which is a file; expected a directory"):
        export.main([str(run), "--out", f"{tmp_path}/file"])
    with pytest.raises(InputError, match=rf"{tmp_path}/earlier cannot be written: Permission denied"):
        export.main([str(run), "--out", f"{tmp_path}/earlier/"])
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "earlier"}


def test_what_cannot_be_deleted_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/config\.json cannot be deleted: Not a directory; choose a directory"):
        storage.delete(f"{tmp_path}/file/config.json")
    storage.delete(f"{tmp_path}/gone")


def test_an_export_into_another_run_which_would_then_predict_with_this_ones_weights_is_refused(run, runs):
    other = runs / "cropped_aligned"
    before = sorted(other.rglob("*"))
    with pytest.raises(InputError, match=f"--out is {other}/, which is a run; name another directory"):
        export.main([str(run), "--out", f"{other}/", "--formats", "safetensors"])
    assert sorted(other.rglob("*")) == before


def test_an_export_into_the_run_itself_is_refused(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for out in (run, f"{run}/", best(committed(str(run))[0]).uri, run / "checkpoints"):
        with pytest.raises(InputError, match="where the run itself keeps its files"):
            export.main([str(run), "--out", str(out), "--formats", "safetensors"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_an_export_into_the_copy_of_a_checkpoint_that_it_is_made_of_is_refused(run, tmp_path):
    chosen = best(committed(str(run))[0]).uri
    copy = shutil.copytree(chosen, tmp_path / Path(chosen).name)
    with pytest.raises(InputError, match="where the run itself keeps its files"):
        export.main([str(copy), "--out", f"{copy}/", "--formats", "safetensors"])
    assert (copy / "model.safetensors").is_file()


def test_exports_of_other_classes_or_damaged_are_refused_by_name(exported, faces, tmp_path):
    about = unseal((exported / "config.json").read_bytes())
    weights = (exported / "model.safetensors").read_bytes()
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    expressions = ["Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Other"]
    cases = {
        "classes": (about | {"expressions": expressions}, weights, r"classes/config\.json has other classes"),
        "aus": (about | {"aus": about["aus"][::-1]}, weights, r"aus/config\.json has other classes"),
        "format": (about | {"format": "mtl_dist-export-9"}, weights, r"has format 'mtl_dist-export-9'; this version"),
        "mean": (about | {"mean": [0.5, 0.5, 0.5]}, weights, r"another normalisation"),
        "key": (about | {"surprise": 1}, weights, r"is not what mtl_dist\.export writes: surprise"),
        "damaged": (about, bytes(flipped), r"damaged/model\.safetensors is damaged"),
        "alone": (about, None, r"holds no model\.safetensors"),
    }
    for name, (config, content, pattern) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(seal(config))
        if content:
            (tmp_path / name / "model.safetensors").write_bytes(content)
        args = ["--input", str(faces), "--out", str(tmp_path / "out.csv")]
        with pytest.raises(InputError, match=pattern):
            predict.main(["--runs", str(exported), str(tmp_path / name), *args])
    assert not (tmp_path / "out.csv").exists()


def test_every_flipped_bit_of_an_exports_config_is_found_or_changes_nothing(exported, tmp_path):
    sealed = (exported / "config.json").read_bytes()
    content = unseal(sealed)
    for flipped in flips(sealed):
        with contextlib.suppress(Damaged):
            assert unseal(flipped, unsealed=content) == content, flipped
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    unsealed = json.dumps(content).encode()  # of before they were sealed: no traceback, but not all are found
    for data in (sealed, unsealed):
        (tmp_path / "config.json").write_bytes(data)
        whole = open_weights(str(tmp_path))
        for flipped in itertools.islice(flips(data), 0, None, 37):
            (tmp_path / "config.json").write_bytes(flipped)
            with contextlib.suppress(InputError):
                assert open_weights(str(tmp_path)) == whole or data == unsealed, flipped


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, r"has weights that are not finite \("),
        (1e38, r"gives values that are not finite for \d+ of \d+ images, such as number \d+ of the faces"),
    ],
)
def test_a_model_that_overflows_is_no_export(value, words, run, tmp_path):
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    weights = load_file(f"{best(committed(str(broken))[0]).uri}/model.safetensors")
    spoilt = {n: np.full_like(v, value) if v.dtype == np.float32 and v.ndim > 1 else v for n, v in weights.items()}
    rewrite(broken, "model.safetensors", save(spoilt))
    with pytest.raises(InputError, match=words):
        export.main([str(broken), "--out", f"{tmp_path}/out"])
    assert not list(Path(tmp_path).glob("out/*"))
