"""A run that starts from the backbone of another, and keeps it frozen; what cannot be started from."""

import pytest
import torch
from safetensors.torch import load_file

from mtl_dist import storage
from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.presets import load_preset
from mtl_dist.runtime.checkpoint import committed
from mtl_dist.runtime.pretrained import build_pretrained
from tests.conftest import run_module


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
    done = run_module(*train_args(shards, runs, "faces", "--local", "--model.no-freeze-backbone"))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


def test_a_frozen_backbone_of_another_run_comes_out_as_it_went_in(runs, shards):
    """On two ranks, with an average of the weights: not a bit of it moves, and it has no state of the optimizer."""
    name = "frozen"
    args = train_args(shards, runs, name, "--model.weights", f"{runs}/faces", "--train.ema", "0.5")
    args += ["--engine.zero-stage", "1"]
    done = run_module("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    given, found = last_weights(runs, "faces"), last_weights(runs, name)
    for key, value in found.items():
        assert torch.equal(value, given[key]) == key.startswith("backbone."), key
    optimizer = load_file(f"{committed(f'{runs}/{name}')[0][-1].uri}/train.safetensors")
    stepped = {key.rpartition("/")[2] for key in optimizer if key.startswith("optimizer/")}
    assert stepped == {f"model.{key}" for key in found if not key.startswith("backbone.")}


def test_a_run_its_checkpoint_and_its_file_are_the_same_weights_local_and_in_the_store(runs, s3):
    (checkpoint,), _ = committed(f"{runs}/faces")
    for name, _ in storage.list_objects(f"{runs}/faces/checkpoints"):
        storage.upload(runs / "faces" / "checkpoints" / name, f"s3://mtl/pretrained/faces/checkpoints/{name}")
    stored = checkpoint.uri.replace(str(runs), "s3://mtl/pretrained")
    given = last_weights(runs, "faces")
    for uri in (
        f"{runs}/faces", checkpoint.uri, f"{checkpoint.uri}/model.safetensors",
        "s3://mtl/pretrained/faces", f"{stored}/", f"{stored}/model.safetensors",
    ):  # fmt: skip
        found = build_pretrained(config_from(uri)).backbone.state_dict()
        assert all(torch.equal(value, given[f"backbone.{key}"]) for key, value in found.items()), uri


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
