"""Whole runs with real DeepSpeed: in one process, under torchrun, killed and continued."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mtl_dist.config import build_config
from mtl_dist.presets import CommandConfig, config_of, parse_command
from mtl_dist.runs.checkpoint import best, committed, find_damage
from mtl_dist.runs.lives import read_lives
from mtl_dist.training.tracking import read_records
from tests.conftest import REPO, assert_one_message, run_here, run_module

pytestmark = pytest.mark.whole

STEPS_PER_EPOCH = 5  # 40 rows in batches of 8


def train_args(shards: Path, storage: Path, name: str, *more: str) -> list[str]:
    return [
        "mtl_dist.train", "--local", "--preset", "small", "--data.train", f"{shards}/cropped/train",
        "--data.val", f"{shards}/cropped/val", "--run.storage", str(storage), "--run.name", name,
        "--train.global-batch", "8", "--train.epochs", "2", "--data.image-size", "80", "--engine.threads", "1",
        "--optim.warmup-steps", "2", *more,
    ]  # fmt: skip


def train(shards: Path, storage: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    done = run_here(*train_args(shards, storage, name, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(num_ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    args = [arg for arg in args if arg != "--local"]  # torchrun's own parser takes it for one of its flags
    done = run_module("torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def fork_ranks(num_ranks: int, args: list[str]) -> None:
    """Train what the command line says on so many ranks, without torchrun and its seconds of imports."""
    from tests.test_recipes import run_ranks

    flags = [arg for arg in args[1:] if arg != "--local"]
    config = config_of(parse_command(CommandConfig, flags, prog="test", description=""))
    run_ranks(num_ranks, [(config, None)], Path(config.run.storage))


def losses(storage: Path, name: str) -> list[dict[str, float]]:
    return [record["loss"] for record in read_records(f"{storage}/{name}") if record["kind"] == "step"]


def final_weights(storage: Path, name: str) -> dict:
    return load_file(f"{committed(f'{storage}/{name}')[0][-1].uri}/model.safetensors")


def assert_same_losses(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == 2 * STEPS_PER_EPOCH
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    """A run in a process of its own that nothing happened to; returns its storage."""
    storage = tmp_path_factory.mktemp("undisturbed")
    done = run_module(*train_args(shards, storage, "run", "--checkpoint.every-steps", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    return storage


@pytest.fixture(scope="module")
def frozen(shards, tmp_path_factory) -> Path:
    """A run in one process whose BatchNorm is frozen, so that the split of a batch cannot matter."""
    storage = tmp_path_factory.mktemp("frozen")
    train(shards, storage, "run", "--engine.batchnorm", "frozen")
    return storage


def test_a_run_leaves_these_files_and_scores_and_nothing_else(undisturbed):
    step = STEPS_PER_EPOCH
    found = {
        path.relative_to(undisturbed / "run").as_posix() for path in (undisturbed / "run").rglob("*") if path.is_file()
    }
    files = {"COMMIT.json", "state.json", "model.safetensors", "train.safetensors"}
    kept = {path.split("/")[1] for path in found if path.startswith("checkpoints/")}
    assert [one for one in kept if one.startswith(f"step_{2 * step:09d}_")]
    boards = {path for path in found if path.startswith("tensorboard/events")}
    assert len(boards) == 1
    assert len(kept) <= 2  # the last, and the best of each score, which was found at the end of either epoch
    assert found == {"config.yaml", "metrics.jsonl", "lives.json", *boards} | {
        f"checkpoints/{one}/{name}" for one in kept for name in files
    }
    records = read_records(str(undisturbed / "run"))
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 2 * step + 1))
    assert [record["step"] for record in records if record["kind"] == "eval"] == [step, 2 * step]
    assert best(committed(str(undisturbed / "run"))[0]).score == max(
        r["scores"]["p"] for r in records if r["kind"] == "eval"
    )


def test_a_killed_run_started_again_ends_with_bit_identical_weights(undisturbed, shards, tmp_path):
    """kill -9 as soon as a checkpoint in mid-epoch is committed; what was done after it is done again."""
    args = train_args(shards, tmp_path, "run", "--checkpoint.every-steps", "2")
    with subprocess.Popen(
        [sys.executable, "-m", *args], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/*/COMMIT.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert len(committed(str(tmp_path / "run"))[0]) == 1
    again = train(shards, tmp_path, "run", "--checkpoint.every-steps", "2")
    assert "continuing from" in again.stdout
    mine, theirs = final_weights(tmp_path, "run"), final_weights(undisturbed, "run")
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].tobytes() == theirs[name].tobytes(), name
    assert losses(tmp_path, "run") == losses(undisturbed, "run")


def test_sigterm_saves_and_the_same_command_continues(undisturbed, shards, tmp_path):
    args = train_args(shards, tmp_path, "run", "--checkpoint.every-steps", "2")
    with subprocess.Popen([sys.executable, "-m", *args], cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("run/checkpoints/*/COMMIT.json")):
            assert process.poll() is None
            time.sleep(0.002)
        process.terminate()
        printed, _ = process.communicate(timeout=60)
    assert "the same command continues" in printed
    train(shards, tmp_path, "run", "--checkpoint.every-steps", "2")
    mine, theirs = final_weights(tmp_path, "run"), final_weights(undisturbed, "run")
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_a_damaged_newest_checkpoint_is_passed_over_with_the_reason(shards, tmp_path):
    train(shards, tmp_path, "run", "--checkpoint.keep-last", "2", "--train.eval-every", "1")
    found, _ = committed(str(tmp_path / "run"))
    assert [c.step for c in found] == [5, 10]
    weights = Path(found[-1].uri) / "train.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    again = train(shards, tmp_path, "run", "--checkpoint.keep-last", "2", "--train.eval-every", "1")
    assert "passed over" in again.stdout
    assert "sha256" in again.stdout
    assert f"continuing from {found[0].uri}" in again.stdout
    assert len(losses(tmp_path, "run")) == 10


def test_two_and_three_ranks_have_the_losses_of_one(frozen, shards, tmp_path):
    """3 ranks do not divide the 8 streams: their batches are unequal."""
    two, three = (train_args(shards, tmp_path, name, "--engine.batchnorm", "frozen") for name in ("two", "three"))
    fork_ranks(2, two)
    torchrun(3, *three)
    for name in ("two", "three"):
        assert_same_losses(losses(tmp_path, name), losses(frozen, "run"))


def test_accumulation_has_the_losses_of_one_batch(frozen, shards, tmp_path):
    train(shards, tmp_path, "run", "--engine.batchnorm", "frozen", "--train.accumulation", "3")
    assert_same_losses(losses(tmp_path, "run"), losses(frozen, "run"))


def test_zero_2_trains_and_continues_on_two_ranks(frozen, shards, tmp_path):
    """Bit-identically. ZeRO 1 is in the test below."""
    args = train_args(shards, tmp_path, "run", "--engine.batchnorm", "frozen", "--engine.zero-stage", "2")
    args += ["--train.eval-every", "1", "--checkpoint.keep-last", "2"]
    fork_ranks(2, args)
    assert_same_losses(losses(tmp_path, "run"), losses(frozen, "run"))
    expected = final_weights(tmp_path, "run")
    cut_back(tmp_path, "run", STEPS_PER_EPOCH)
    fork_ranks(2, args)
    assert [life["step"] for life in read_lives(f"{tmp_path}/run")] == [0, STEPS_PER_EPOCH]
    found = final_weights(tmp_path, "run")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def cut_back(storage: Path, name: str, step: int) -> None:
    """Make a run what a kill after `step` would have left: later checkpoints are not committed."""
    for checkpoint in committed(f"{storage}/{name}")[0]:
        if checkpoint.step > step:
            (Path(checkpoint.uri) / "COMMIT.json").unlink()


def test_a_run_goes_on_at_other_numbers_of_ranks_and_zero_stages(frozen, shards, tmp_path):
    """2 ranks at ZeRO 1, one at 2, three at 2, two at 0: the losses and weights are those of one undisturbed rank."""
    args = train_args(shards, tmp_path, "run", "--engine.batchnorm", "frozen")
    args += ["--checkpoint.every-steps", "1", "--checkpoint.keep-last", "99"]
    for num_ranks, stage, step in ((2, 1, 3), (1, 2, 6), (3, 2, 8), (2, 0, 10)):
        fork_ranks(num_ranks, [*args, "--engine.zero-stage", str(stage)])
        cut_back(tmp_path, "run", step)
    assert_same_losses(losses(tmp_path, "run"), losses(frozen, "run"))
    mine, theirs = final_weights(tmp_path, "run"), final_weights(frozen, "run")
    for name in theirs:  # to the noise that Adam makes of small gradients
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-3, err_msg=name)
    lives = read_lives(f"{tmp_path}/run")
    assert [(life["step"], life["num_ranks"]) for life in lives] == [(0, 2), (3, 1), (6, 3), (8, 2)]


@pytest.mark.parametrize("optimizer", [(), ("--optim.name", "sgd", "--optim.lr", "0.01")])
def test_averaged_weights_and_uncertainty_go_on_bit_identically(optimizer, shards, tmp_path):
    more = ("--train.ema", "0.9", "--loss.balancing", "uncertainty", "--checkpoint.every-steps", "1", *optimizer)
    train(shards, tmp_path, "run", *more, "--checkpoint.keep-last", "99")
    expected, expected_losses = final_weights(tmp_path, "run"), losses(tmp_path, "run")
    cut_back(tmp_path, "run", 4)
    assert "continuing from" in train(shards, tmp_path, "run", *more).stdout
    found = final_weights(tmp_path, "run")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    assert losses(tmp_path, "run") == expected_losses
    last = load_file(f"{committed(f'{tmp_path}/run')[0][-1].uri}/train.safetensors")
    assert [name for name in last if name.startswith("module/balancer")]
    raw = {name: tensor for name, tensor in last.items() if name.startswith("module/model.")}
    assert any(not np.array_equal(raw[f"module/model.{name}"], found[name]) for name in found), "no average"


def test_backbone_weights_come_from_a_file_in_the_store(s3, shards, tmp_path):
    """The same weights as those of the seed give the same run; the file's name is what decides, not its place."""
    from mtl_dist import storage
    from mtl_dist.models import build_model
    from mtl_dist.presets import load_preset

    config = build_config(load_preset("small")).model
    save_file(build_model(config, seed=0).backbone.state_dict(), tmp_path / "backbone.safetensors")
    storage.upload(tmp_path / "backbone.safetensors", "s3://mtl/weights/backbone.safetensors")
    train(shards, tmp_path, "stored", "--train.epochs", "1", "--model.weights", "s3://mtl/weights/backbone.safetensors")
    train(shards, tmp_path, "random", "--train.epochs", "1")
    assert losses(tmp_path, "stored") == losses(tmp_path, "random")
    done = run_here(*train_args(shards, tmp_path, "gone", "--model.weights", "s3://mtl/weights/gone.safetensors"))
    assert_one_message(done, "s3://mtl/weights/gone.safetensors", "model.weights")


def test_bf16_and_uncertainty_train_and_a_run_says_what_it_begins_with_and_what_it_ends_with(shards, tmp_path):
    more = ("--engine.autocast", "bf16", "--loss.balancing", "uncertainty", "--train.epochs", "1")
    said = train(shards, tmp_path, "run", *more).stdout
    assert len(losses(tmp_path, "run")) == STEPS_PER_EPOCH
    assert f"run     {tmp_path}/run, begins\n" in said
    assert re.search(r"^train   .*: 40 rows of cropped, labelled va \d+, expr \d+, au \d+, ", said, re.MULTILINE)
    assert re.search(
        r"^start   1 rank on \w+.*, 1 thread each, bf16; 1,3\d\d,\d{3} parameters, all trained$", said, re.MULTILINE
    )
    (checkpoint,) = committed(str(tmp_path / "run"))[0]
    assert f"best    {checkpoint.uri} (P {checkpoint.score:.4f})" in said
    for command in ("predict --runs", "report", "ensemble --runs"):
        assert f"python -m mtl_dist.{command} {tmp_path}/run " in said


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(shards, tmp_path):
    """A learning rate that takes some steps to diverge, a checkpoint after each."""
    diverging = (
        "--optim.name",
        "sgd",
        "--optim.lr",
        "300",
        "--optim.clip-norm",
        "1e30",
        "--checkpoint.every-steps",
        "1",
    )
    done = run_here(*train_args(shards, tmp_path, "run", *diverging, "--train.epochs", "20"))
    step = int(re.search(r"error: step (\d+): the loss is not finite", done.stderr)[1])
    found, _ = committed(str(tmp_path / "run"))
    last = f"The last checkpoint is of step {found[-1].step} ({found[-1].uri}): its weights are finite, but may have"
    assert_one_message(done, last, "lower optim.lr", "under another --run.name")
    assert 1 <= found[-1].step < step
    assert find_damage(found[-1]) is None
    assert all(np.isfinite(tensor).all() for tensor in final_weights(tmp_path, "run").values())


def test_predictions_that_are_not_finite_end_the_evaluation_and_nothing_is_stored(shards, tmp_path):
    """One step makes weights whose loss nobody has seen yet, and the scores of NaN are those of 'always Neutral'."""
    diverging = ("--optim.lr", "1000", "--optim.warmup-steps", "0", "--train.global-batch", "40")
    done = run_here(*train_args(shards, tmp_path, "run", *diverging))
    words = ("evaluation after step 1: predictions of 20 row(s) are not finite: 0, 1, 2, 3,", "has no checkpoint")
    assert_one_message(done, *words, "lower optim.lr")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "lives.json"}


def test_the_status_of_a_run_is_told_from_its_storage(shards, tmp_path):
    train(shards, tmp_path, "run", "--checkpoint.keep-last", "2")
    found, _ = committed(str(tmp_path / "run"))
    (Path(found[0].uri) / "COMMIT.json").unlink()
    damaged = Path(found[1].uri) / "train.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    lives = read_lives(f"{tmp_path}/run")
    lives[-1] |= {"typed": "python \x1b]0;a title\x07 [/red]", "host": "[/red]\x1b[2J"}  # a stranger's
    (tmp_path / "run" / "lives.json").write_text(json.dumps(lives))
    done = run_here("mtl_dist.train", "--status", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "[/red]\\x1b[2J" in done.stdout
    for words in (
        "step 10 of 10",
        "finished",
        "0 restarts",
        "train.safetensors is damaged",
        "no COMMIT.json",
        "epoch 2",
    ):
        assert words in " ".join(done.stdout.split()), words
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    done = run_here("mtl_dist.train", "--status", str(tmp_path / "nothing"))
    assert_one_message(done, "no run at", "nothing")


def test_a_run_name_that_belongs_to_another_model_is_refused(undisturbed, shards):
    done = run_here(*train_args(shards, undisturbed, "run", "--model.name", "b"))
    assert_one_message(done, "run 'run' has a checkpoint with model.name 'a'", "'b'", "--run.name")


def test_a_run_name_that_belongs_to_other_data_is_refused(undisturbed, shards):
    args = train_args(shards, undisturbed, "run", "--checkpoint.every-steps", "2")
    args = [arg.replace("/cropped/", "/cropped_aligned/") for arg in args]
    assert_one_message(run_here(*args), "another training set", "sha256")


def test_dry_run_prints_the_plan_and_leaves_nothing(shards, tmp_path):
    done = run_here(*train_args(shards, tmp_path, "run", "--dry-run"))
    assert done.returncode == 0
    assert "5 an epoch, 10 in all" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ranks_that_torchrun_starts_again_after_bad_input_end_at_once(tmp_path):
    """torchrun starts ranks again whatever ended them: the second and third start only repeat what the first found."""
    args = train_args(tmp_path / "nowhere", tmp_path, "run")
    args.remove("--local")
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=2", "-m", *args)
    done = run_module(*command)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    (first,) = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    assert "nowhere" in first
    assert [line for line in lines if line.startswith("error, as before: ")] == 2 * [f"error, as before: {first}"]
