"""A run that starts from the backbone of another, and keeps it frozen; what cannot be started from."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_dist import storage
from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.export import __main__ as export
from mtl_dist.presets import load_preset, read_config_file
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.start import _place_of_weights, build_pretrained
from mtl_dist.training import checks
from mtl_dist.training.learner import check_start
from mtl_dist.training.plan import plan_run
from tests.conftest import assert_one_message, run_here
from tests.test_training import fork_ranks

pytestmark = pytest.mark.whole


def train_args(shards, runs, name, *more):
    return [
        "mtl_dist.train", "--preset", "small-baseline", "--data.train", f"{shards}/cropped/train",
        "--data.val", f"{shards}/cropped/val", "--run.storage", str(runs), "--run.name", name,
        "--train.global-batch", "8", "--train.epochs", "1", "--data.image-size", "64", "--engine.threads", "1", *more,
    ]  # fmt: skip


def last_weights(runs, name):
    return load_file(f"{committed(f'{runs}/{name}')[0][-1].uri}/model.safetensors")


def config_from(weights, **changes):
    return build_config(load_preset("small-baseline"), {"model": {"weights": str(weights), **changes}})


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Holds `faces`, a run of the laptop's baseline that trained its convolutions."""
    runs = tmp_path_factory.mktemp("runs")
    done = run_here(*train_args(shards, runs, "faces", "--local", "--model.no-freeze-backbone"))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def frozen(runs, shards, tmp_path_factory):
    """A run from the weights of `faces`, which are gone: on two ranks, with an average of the weights."""
    weights = tmp_path_factory.mktemp("gone") / "weights.safetensors"
    shutil.copy(f"{committed(f'{runs}/faces')[0][-1].uri}/model.safetensors", weights)
    args = train_args(shards, runs, "frozen", "--model.weights", str(weights), "--train.ema", "0.5")
    args += ["--engine.zero-stage", "1"]
    fork_ranks(2, args)
    weights.unlink()
    return runs / "frozen"


def test_a_frozen_backbone_of_another_run_comes_out_as_it_went_in(frozen, runs):
    """Not a bit of it moves, and it has no state of the optimizer."""
    given, found = last_weights(runs, "faces"), last_weights(runs, "frozen")
    for key, value in found.items():
        assert torch.equal(value, given[key]) == key.startswith("backbone."), key
    optimizer = load_file(f"{committed(str(frozen))[0][-1].uri}/train.safetensors")
    stepped = {key.rpartition("/")[2] for key in optimizer if key.startswith("optimizer/")}
    assert stepped == {f"model.{key}" for key in found if not key.startswith("backbone.")}


def test_a_run_its_checkpoint_its_export_and_its_file_are_the_same_weights_local_and_in_the_store(runs, s3, tmp_path):
    (checkpoint,), _ = committed(f"{runs}/faces")
    for name, _ in storage.list_objects(f"{runs}/faces/checkpoints"):
        storage.upload(runs / "faces" / "checkpoints" / name, f"s3://mtl/pretrained/faces/checkpoints/{name}")
    stored = checkpoint.uri.replace(str(runs), "s3://mtl/pretrained")
    for out in (f"{tmp_path}/exported", "s3://mtl/pretrained/exported"):
        export.main([f"{runs}/faces", "--out", out, "--formats", "safetensors"])
    given = last_weights(runs, "faces")
    for uri in (
        f"{runs}/faces", checkpoint.uri, f"{checkpoint.uri}/model.safetensors", f"{tmp_path}/exported/",
        "s3://mtl/pretrained/faces", f"{stored}/", f"{stored}/model.safetensors", "s3://mtl/pretrained/exported",
    ):  # fmt: skip
        found = build_pretrained(config_from(uri)).backbone.state_dict()
        assert all(torch.equal(value, given[f"backbone.{key}"]) for key, value in found.items()), uri


def test_what_rank_0_tells_of_weights_holds_on_nodes_that_have_them_elsewhere(runs, monkeypatch):
    (checkpoint,), _ = committed(f"{runs}/faces")
    place, sha256 = _place_of_weights(f"{runs}/faces/")
    assert place == f"/checkpoints/{Path(checkpoint.uri).name}/model.safetensors"
    assert sha256 == checkpoint.files["model.safetensors"]["sha256"]
    assert _place_of_weights(checkpoint.uri) == ("/model.safetensors", sha256)
    monkeypatch.chdir(runs)
    assert _place_of_weights("faces") == (place, sha256)
    assert _place_of_weights(f"./faces/checkpoints/{Path(checkpoint.uri).name}/") == ("/model.safetensors", sha256)


def test_what_is_no_weights_is_refused_with_what_would_be(runs, s3, tmp_path):
    with pytest.raises(InputError, match=f"run {tmp_path} has no committed checkpoint with a score"):
        build_pretrained(config_from(tmp_path))
    with pytest.raises(InputError, match="run s3://mtl/pretrained/none has no committed checkpoint"):
        build_pretrained(config_from("s3://mtl/pretrained/none"))
    with pytest.raises(InputError, match=r"s3://mtl/none\.pth does not exist; give a state dict, a run or checkpoint"):
        build_pretrained(config_from("s3://mtl/none.pth"))
    wrong = r"faces \(a model of ours\): 'features\.0\.weight' has shape \(16, 3, 3, 3\), VGG16 needs .*backbone"
    with pytest.raises(InputError, match=wrong):
        build_pretrained(config_from(f"{runs}/faces", backbone="vgg16", hidden=8))


def test_weights_that_are_not_finite_are_refused_before_training_seems_to_diverge(runs, tmp_path):
    weights = last_weights(runs, "faces")
    wrong = "backbone.features.0.weight"
    save_file(weights | {wrong: weights[wrong] * float("nan")}, tmp_path / "faces.safetensors")
    with pytest.raises(InputError, match=rf"faces\.safetensors holds what is not finite \({wrong}\)"):
        build_pretrained(config_from(tmp_path / "faces.safetensors"))


def test_a_run_in_the_store_may_have_a_dot_in_its_name(runs, s3):
    for name, _ in storage.list_objects(f"{runs}/faces/checkpoints"):
        storage.upload(runs / "faces" / "checkpoints" / name, f"s3://mtl/pretrained/faces-0.1/checkpoints/{name}")
    given = last_weights(runs, "faces")
    found = build_pretrained(config_from("s3://mtl/pretrained/faces-0.1")).backbone.state_dict()
    assert all(torch.equal(value, given[f"backbone.{key}"]) for key, value in found.items())


def test_a_checkpoint_proves_itself_before_it_is_started_from(runs, tmp_path):
    (checkpoint,), _ = committed(f"{runs}/faces")
    copy = tmp_path / Path(checkpoint.uri).name
    shutil.copytree(checkpoint.uri, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="is damaged: its sha256 is not what its checkpoint says"):
        build_pretrained(config_from(copy))
    (copy / "COMMIT.json").write_text("{}")
    with pytest.raises(InputError, match=r"has a damaged COMMIT\.json"):
        build_pretrained(config_from(copy))
    (copy / "COMMIT.json").unlink()
    with pytest.raises(InputError, match=r"has no COMMIT\.json: its save did not finish"):
        build_pretrained(config_from(copy))


@pytest.mark.parametrize("name", ["half.pth", "text.pth", "half.safetensors", "empty.safetensors"])
def test_a_file_that_is_no_state_dict_is_one_message(name, s3, tmp_path):
    path = tmp_path / name
    state = {"features.0.weight": torch.zeros(64)}
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    kept = {"half": data[: len(data) // 2], "text": b"hello there", "empty": b""}[path.stem]
    path.write_bytes(kept)
    storage.upload(path, f"s3://mtl/broken/{name}")
    for weights in (str(path), f"s3://mtl/broken/{name}"):
        with pytest.raises(InputError, match=f"^{weights} (holds|is) no"):
            build_pretrained(config_from(weights))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"backbone": "timm:convnext_tyni"}, "unknown backbone timm:convnext_tyni: did you mean convnext_tiny"),
        ({"weights": "imagenet"}, "no ImageNet weights for VGGSmall"),
        ({"weights": "/nowhere/faces.safetensors"}, "model.weights /nowhere/faces.safetensors does not exist"),
        ({"weights": "s3://mtl/nowhere.pth"}, "model.weights s3://mtl/nowhere.pth does not exist"),
        ({"weights": "s3://mtl/nowhere"}, "run s3://mtl/nowhere has no committed checkpoint"),
    ],
)
def test_the_plan_of_a_run_that_begins_names_a_backbone_or_weights_that_are_not_there(
    model, words, runs, shards, s3, tmp_path
):
    def config_of(name, storage_dir, **model):
        sets = {part: f"{shards}/cropped/{part}" for part in ("train", "val")}
        layer = {"run": {"name": name, "storage": str(storage_dir)}, "data": sets | {"image_size": 64}, "model": model}
        return build_config(load_preset("small-baseline"), {"train": {"global_batch": 8}}, layer)

    with pytest.raises(InputError, match=words):
        plan_run(config_of("new", tmp_path, **model))
    assert "weights" in plan_run(config_of("new", tmp_path, weights=f"{runs}/faces")).text


def test_a_run_that_goes_on_needs_its_first_weights_no_more(frozen):
    config = build_config(read_config_file(f"{frozen}/config.yaml"))
    assert not Path(config.model.weights).exists()
    assert "is finished (step 5 of 5): nothing is left to do" in plan_run(config).text
    again = config.model_copy(update={"run": config.run.model_copy(update={"name": "another"})})
    with pytest.raises(InputError, match=r"weights\.safetensors does not exist"):
        plan_run(again)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine.device", "cuda"], "engine.device is cuda, but this rank has no GPU"),
        (["--engine.batchnorm", "sync"], "torch has on GPUs only"),
        (["--model.weights", "{tmp}/text.pth"], "text.pth holds no state dict of plain tensors"),
        (
            ["--model.weights", "{tmp}/other.safetensors"],
            "other.safetensors has no tensor that VGGSmall has: it begins with",
        ),
        (["--model.backbone", "vgg16", "--model.weights", "imagenet"], "could not download the ImageNet weights"),
        (["--run.audit-dir", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_a_dry_run_refuses_what_would_not_start(flags, words, shards, tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("hello there")
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing is downloaded, whatever this machine could
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    done = run_here(*train_args(shards, tmp_path / "runs", "new", "--local", "--dry-run", *flags))
    assert_one_message(done, words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"model": {"freeze_backbone": True}}, 4),  # of bytes a parameter: all weights
        ({}, 4),  # SGD's momentum
        ({"optim": {"momentum": 0.0}}, 4),
        ({"train": {"ema": 0.5}}, 8),  # the raw weights beside averages, and the momentum
        ({"optim": {"name": "adamw"}}, 8),
        ({"optim": {"name": "adamw"}, "train": {"ema": 0.5}}, 12),
    ],
)
def test_a_model_whose_checkpoints_would_be_too_large_to_continue_from_is_refused_at_the_start(
    changes, size, monkeypatch
):
    model, optim = {"weights": "none", "freeze_backbone": False}, {"name": "sgd", "momentum": 0.9}
    config = build_config(load_preset("small-baseline"), {"model": model, "optim": optim}, changes)
    about = {"has_gpu": False, "num_ranks": (1, 1), "begins": True}
    count = int(re.search(r"([\d,]+) parameters", check_start(config, **about))[1].replace(",", ""))
    monkeypatch.setattr(checks, "MAX_TENSOR_BYTES", count * size + 10_000)  # and BatchNorm's statistics
    check_start(config, **about)
    monkeypatch.setattr(checks, "MAX_TENSOR_BYTES", count * size - 1)
    with pytest.raises(InputError, match=r"a file of [\d,]+ bytes, and no run continues .* smaller model"):
        check_start(config, **about)


def test_a_dry_run_under_ray_has_the_device_and_the_ranks_that_ray_will_give(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    args = train_args(shards, tmp_path / "runs", "new", "--dry-run", "--data.streams", "4")
    assert_one_message(run_here(*args, "--engine.device", "cuda"), "under Ray: ray.gpus_per_rank")
    done = run_here(*args, "--ray.num-ranks", "1", "4")
    assert done.returncode == 0, done.stderr
    for words in ("new, begins", "labelled va ", "batch   8 over 1 to 4 ranks", "start   on cpu; ", " parameters, "):
        assert words in done.stdout


def test_a_dry_run_of_a_search_refuses_what_its_trials_would(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    args = ["tune.search", *train_args(shards, tmp_path / "runs", "new", "--dry-run")[1:]]
    assert_one_message(run_here(*args, "--engine.device", "cuda"), "engine.device is cuda")
    assert "start   on cpu; " in run_here(*args).stdout
    assert not (tmp_path / "runs").exists()
