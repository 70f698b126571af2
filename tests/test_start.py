"""A run that begins with the backbone, the model or everything of another; what cannot be begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.presets import load_preset
from mtl_dist.runs.checkpoint import committed
from mtl_dist.runs.start import build_started, find_start, load_everything
from mtl_dist.training.plan import open_data, plan_run
from tests.conftest import assert_one_message, run_here
from tests.test_recipes import run_ranks, weights_of
from tests.test_training import final_weights, losses

pytestmark = pytest.mark.whole
# What a schedule over all epochs would make of two halves is not the same: here it is flat.
FLAT = {"optim": {"warmup_steps": 0, "final_lr": 1.0}}
KINDS = {  # of state that goes on with everything
    "adamw": {"loss": {"balancing": "dwa"}, "train": {"ema": 0.5}},
    "sgd": {
        "optim": {"name": "sgd", "lr": 0.02},
        "loss": {"balancing": "uncertainty"},
        "data": {"epoch_fraction": 0.5},
    },
}


def config_of(shards: Path, storage: Path, name: str, *layers: dict) -> Config:
    tiny = {
        "run": {"name": name, "storage": str(storage)},
        "data": {"train": f"{shards}/cropped/train", "val": f"{shards}/cropped/val", "image_size": 80, "workers": 0},
        "train": {"global_batch": 8, "epochs": 2},
        "engine": {"threads": 1, "device": "cpu"},
    }
    return build_config(load_preset("small"), tiny, FLAT, *layers)


def start_from(run: Path | str, start_with: str, **more) -> dict:
    return {"run": {"start": str(run), "start_with": start_with}, **more}


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """Of each kind a run of four epochs, one of two, and one that begins with everything of it and has four."""
    storage, longer = tmp_path_factory.mktemp("runs"), {"train": {"epochs": 4}}
    jobs = []
    for kind, layer in KINDS.items():
        jobs += [config_of(shards, storage, f"{kind}-4", layer, longer), config_of(shards, storage, f"{kind}-2", layer)]
        start = start_from(storage / f"{kind}-2", "everything")
        jobs.append(config_of(shards, storage, f"{kind}-2-2", layer, longer, start))
    run_ranks(1, [(job, None) for job in jobs], storage)
    return storage


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_and_two_more_of_a_run_that_begins_with_everything_are_four_bit_for_bit(kind, runs):
    one, other = final_weights(runs, f"{kind}-4"), final_weights(runs, f"{kind}-2-2")
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    whole, half = losses(runs, f"{kind}-4"), losses(runs, f"{kind}-2")
    assert whole == half + losses(runs, f"{kind}-2-2")
    assert len(whole) == 2 * len(half)
    assert weights_of(runs, f"{kind}-4") == weights_of(runs, f"{kind}-2") + weights_of(runs, f"{kind}-2-2")
    states = [load_file(f"{committed(f'{runs}/{kind}-{n}')[0][-1].uri}/train.safetensors") for n in ("4", "2-2")]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_where_a_run_began_is_in_its_state_and_its_status_also_after_it_went_on(runs, shards, tmp_path):
    begun = committed(f"{runs}/sgd-2")[0][-1]
    expected = {
        "with": "everything",
        "uri": begun.uri,
        "step": begun.step,
        "sha256": begun.files["model.safetensors"]["sha256"],
    }
    shutil.copytree(runs / "sgd-2-2", tmp_path / "sgd-2-2")
    shutil.rmtree(committed(f"{tmp_path}/sgd-2-2")[0][-1].uri)  # the best is left, or none: then it begins anew
    config = config_of(
        shards, tmp_path, "sgd-2-2", KINDS["sgd"], {"train": {"epochs": 4}}, start_from(runs / "sgd-2", "everything")
    )
    run_ranks(1, [(config, None)], tmp_path)
    state = json.loads(Path(committed(config.run.uri)[0][-1].uri, "state.json").read_text())
    assert state["began_from"] == expected
    printed = " ".join(run_here("mtl_dist.train", "--status", config.run.uri).stdout.split())
    assert f"began with everything of {begun.uri}, step {begun.step}" in printed
    assert "began with" not in run_here("mtl_dist.train", "--status", f"{runs}/sgd-2").stdout


def test_the_plan_says_what_a_run_begins_with_and_where(runs, shards, tmp_path):
    begun = committed(f"{runs}/adamw-2")[0][-1]
    config = config_of(
        shards, tmp_path, "longer", KINDS["adamw"], {"train": {"epochs": 3}}, start_from(runs / "adamw-2", "everything")
    )
    plan = plan_run(config)
    assert f"longer, begins after step {begun.step}" in plan.text
    assert f"it begins with everything of {begun.uri}, step {begun.step}" in plan.text
    with pytest.raises(InputError, match=r"has had 10 steps, and train\.epochs 2 are 10: give more epochs"):
        plan_run(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})}))


def test_the_model_of_another_run_is_all_its_weights_and_nothing_else(runs, shards, tmp_path):
    config = config_of(shards, tmp_path, "new", {"optim": {"name": "sgd"}}, start_from(runs / "adamw-4", "model"))
    start = find_start(config, open_data(config).identity(), verifies=True)
    model, given = build_started(config, start), load_file(f"{start.uri}/model.safetensors")
    found = model.state_dict()
    assert found.keys() == given.keys()
    assert all((found[name] == given[name]).all() for name in given)
    assert "new, begins\n" in plan_run(config).text
    backbone = config_of(shards, tmp_path, "new", {"model": {"name": "b"}}, start_from(runs / "adamw-4", "backbone"))
    found = build_started(backbone, find_start(backbone, {})).state_dict()
    of_backbone = [name for name in found if name.startswith("backbone.")]
    assert all((found[name] == given[name]).all() for name in of_backbone)
    rest = found.keys() & given.keys() - {*of_backbone}
    assert any(found[name].shape != given[name].shape or (found[name] != given[name]).any() for name in rest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "b"}}, r"model\.name is 'a' there and 'b' here"),
        ({"optim": {"name": "sgd"}}, r"optim\.name is 'adamw' there and 'sgd' here"),
        ({"loss": {"balancing": "famo"}}, r"loss\.balancing is 'dwa' there and 'famo' here"),
        ({"train": {"global_batch": 4}}, r"train\.global_batch is 8 there and 4 here"),
        ({"run": {"seed": 1}}, r"run\.seed is 0 there and 1 here"),
        ({"data": {"train": "{shards}/cropped_aligned/train"}}, "was trained on another training set"),
    ],
)  # fmt: skip
def test_everything_of_a_run_whose_state_or_order_would_be_another_is_refused(changes, words, runs, shards, tmp_path):
    start = start_from(runs / "adamw-2", "everything")
    config = config_of(shards, tmp_path, "longer", KINDS["adamw"], {"train": {"epochs": 4}}, start)
    identity = open_data(config).identity() | ({"training set": "0" * 64} if "data" in changes else {})
    found = find_start(config, identity if "data" not in changes else open_data(config).identity())
    state = load_everything(found).state
    assert state.pop("config")["engine.autocast"] == "none"  # which auto goes on with
    assert state == {"step": 10, "order": 2, "scores": {}}
    changes = {} if "data" in changes else changes
    with pytest.raises(InputError, match=f"{words}.*--run.start-with model"):
        find_start(build_config(config.model_dump(mode="json"), changes), identity)


def test_what_may_be_another_in_a_run_that_begins_with_everything(runs, shards, tmp_path):
    changes = {
        "optim": {"lr": 0.1, "weight_decay": 0.0}, "loss": {"va": 2.0}, "model": {"dropout": 0.5},
        "augment": {"rotation": 1.0}, "train": {"accumulation": 2}, "engine": {"threads": 2},
    }  # fmt: skip
    config = config_of(shards, tmp_path, "x", KINDS["adamw"], changes, start_from(runs / "adamw-2", "everything"))
    assert find_start(config, open_data(config).identity()).state["step"] == 10


def test_a_damaged_checkpoint_is_passed_over_and_none_is_one_message(runs, shards, tmp_path, capsys):
    shutil.copytree(runs / "adamw-4", tmp_path / "one")
    newest = committed(f"{tmp_path}/one")[0][-1]
    layers = KINDS["adamw"], start_from(tmp_path / "one", "everything")
    config = config_of(shards, tmp_path, "x", *layers)
    weights = Path(newest.uri, "train.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    left = committed(f"{tmp_path}/one")[0][:-1]
    if left:
        assert find_start(config, {}, verifies=True).uri == left[-1].uri
    else:
        with pytest.raises(InputError, match="has no whole checkpoint; everything is of a run"):
            find_start(config, {}, verifies=True)
    assert "train.safetensors is damaged" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train\.safetensors is damaged.*give another checkpoint"):
        find_start(
            config_of(shards, tmp_path, "x", KINDS["adamw"], start_from(newest.uri, "everything")), {}, verifies=True
        )


def test_a_model_of_other_tensors_is_refused_with_the_first_and_with_what_differs(runs, shards, tmp_path):
    config = config_of(shards, tmp_path, "new", {"model": {"name": "b"}}, start_from(runs / "adamw-2", "model"))
    words = r"has another model: .* and so are \d+ more \(model\.name 'a' there, 'b' here\).*--run\.start-with backbone"
    with pytest.raises(InputError, match=words):
        build_started(config, find_start(config, {}))


@pytest.mark.parametrize("start_with", ["backbone", "model", "everything"])
def test_nothing_to_begin_with_is_one_message(start_with, shards, tmp_path):
    flags = [
        "--preset",
        "small",
        "--local",
        "--dry-run",
        "--run.storage",
        tmp_path / "runs",
        "--train.global-batch",
        "8",
    ]
    flags += [f"--data.{split}={shards}/cropped/{split}" for split in ("train", "val")]
    flags += ["--run.start", tmp_path / "nothing", "--run.start-with", start_with]
    assert_one_message(run_here("mtl_dist.train", *flags), "nothing")
    assert_one_message(
        run_here("mtl_dist.train", *flags, "--model.weights", "faces.pth"), "model.weights is 'faces.pth'"
    )
    assert_one_message(run_here("mtl_dist.train", *flags[:-4], "--run.start-with", "backbone"), "it is for run.start")
