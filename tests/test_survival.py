"""Ranks killed at every phase of a step and a save: no row lost, none twice, and bit-identical weights in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from mtl_dist.config import CheckpointConfig
from mtl_dist.errors import InputError
from mtl_dist.runtime.audit import read_audit
from mtl_dist.runtime.checkpoint import committed
from mtl_dist.runtime.saving import Saver, Stale, Superseded, begin_life, read_lives
from mtl_dist.runtime.watchdog import EXIT_CODE
from tests.conftest import REPO, run_module
from tests.dying import PHASES
from tests.test_training import STEPS_PER_EPOCH, train_args

NUM_STEPS = 2 * STEPS_PER_EPOCH
FAST = [("in a step", 4, 1), ("before COMMIT", 4, 0)]
slow = pytest.mark.slow
CASES = [
    pytest.param(phase, step, rank, marks=() if (phase, step, rank) in FAST else slow, id=f"{phase}, rank {rank}")
    for phase in PHASES
    for rank in (0, 1)
    for step in (STEPS_PER_EPOCH if phase == "in evaluation" else 4,)
    # Only rank 0 writes.
    if rank == 0 or phase in ("between steps", "in a step", "before the save", "in evaluation")
]


def survival_args(shards: Path, storage: Path, name: str) -> list[str]:
    args = train_args(shards, storage, name, "--checkpoint.every-steps", "2", "--run.audit-dir", f"{storage}/audit")
    return [arg for arg in args[1:] if arg != "--local"]  # under torchrun this goes without saying


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1")
    done = run_module("torch.distributed.run", *options, "-m", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(storage: Path, name: str) -> dict:
    return load_file(f"{committed(f'{storage}/{name}')[0][-1].uri}/model.safetensors")


def assert_exact(storage: Path, name: str) -> None:
    report = read_audit(storage / "audit", name, global_batch=8, num_steps=NUM_STEPS)
    assert (report.rows_lost, report.rows_twice) == (0, 0)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    torchrun("mtl_dist.train", *survival_args(shards, storage, "run"))
    assert_exact(storage, "run")
    return storage


@pytest.mark.parametrize(("phase", "step", "rank"), CASES)
def test_a_rank_killed_at_any_moment_costs_nothing(phase, step, rank, undisturbed, shards, tmp_path):
    marker = tmp_path / "died"
    done = torchrun(
        "tests.dying", phase, str(step), str(rank), str(marker), "--", *survival_args(shards, tmp_path, "run")
    )
    assert marker.exists(), "it was never killed"
    assert "continuing from" in done.stdout
    assert_exact(tmp_path, "run")
    mine, theirs = weights(tmp_path, "run"), weights(undisturbed, "run")
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert len(read_lives(f"{tmp_path}/run")) == 2
    whole, torn = committed(f"{tmp_path}/run")
    assert whole[-1].step == NUM_STEPS
    assert torn == [], "what the killed save left is gone"
    assert not list((tmp_path / "run").rglob(".part-*"))


@slow  # torchrun gives a stopped process 30 s to end
def test_a_rank_that_hangs_is_named_and_ended(shards, tmp_path):
    args = ["mtl_dist.train", *survival_args(shards, tmp_path, "run"), "--engine.hang-s", "8", "--train.epochs", "400"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *args]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            audit = tmp_path / "audit" / "run"
            while not (files := list(audit.glob("*-00001-*"))) or files[0].stat().st_size < 1000:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.05)
            (pid,) = (int(path.stem.rpartition("-")[2]) for path in files)
            os.kill(pid, signal.SIGSTOP)
            stopped = time.monotonic()
            printed, _ = process.communicate(timeout=150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - stopped < 100, "8 s, 9 s to name it, and what torchrun waits for a stopped process"
    assert process.returncode != 0
    assert "rank 0 has not moved for" in printed
    assert "Stopped or gone: rank 1" in printed
    assert f"exitcode  : {EXIT_CODE}" in printed


# ------------------------------------------------------------------------------------------------------------ the saver


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(saver: Saver, step: int, **scores: float) -> None:
    tensors = {"weight": torch.full((4,), float(step))}
    state = {"step": step, "scores": {}}
    saver.save(tensors, {}, begun=time.monotonic(), state=state, scores=scores, records={})


def open_saver(run: Path, command: str = "one", **settings) -> Saver:
    return Saver(str(run), CheckpointConfig(**settings), life=begin_life(str(run), command=command, num_ranks=1))


def test_what_is_saved_is_the_moment_of_the_save(alone, tmp_path):
    weight = torch.zeros(1000)
    with open_saver(tmp_path) as saver:
        saver.save({"weight": weight}, {}, begun=0.0, state={"step": 1}, scores={}, records={})
        weight += 1  # training goes on
    (found,), _ = committed(str(tmp_path))
    assert not load_file(f"{found.uri}/model.safetensors")["weight"].any()


def test_a_store_that_fails_costs_the_checkpoint_and_not_the_run(alone, tmp_path, capsys):
    with open_saver(tmp_path) as saver:
        save(saver, 1)
        saver.wait()
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        (tmp_path / "checkpoints").write_text("in the way")
        save(saver, 2)
        saver.wait()
        assert "checkpoint of step 2 was not stored" in capsys.readouterr().out
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "away").rename(tmp_path / "checkpoints")
        save(saver, 3)
    assert [checkpoint.step for checkpoint in committed(str(tmp_path))[0]] == [1, 3]


def test_the_last_checkpoint_must_be_stored(alone, tmp_path):
    saver = open_saver(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"), saver:
        save(saver, 1)


@pytest.mark.parametrize(("command", "error"), [("one", Stale), ("another", Superseded)])
def test_a_process_that_was_believed_dead_ends_when_it_wakes_up(command, error, alone, tmp_path):
    sleeper = open_saver(tmp_path, keep_last=9)
    save(sleeper, 1)
    sleeper.wait()
    with open_saver(tmp_path, command, keep_last=9) as successor:
        save(successor, 2)
    save(sleeper, 3)
    with pytest.raises(error, match=r"started again|taken over"):
        sleeper.wait()
    found, _ = committed(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [1, 2]


def test_of_two_commands_that_train_one_run_the_first_ends_for_good(alone, tmp_path):
    open_saver(tmp_path, "one")
    open_saver(tmp_path, "one")
    open_saver(tmp_path, "another")
    with pytest.raises(Superseded, match="two commands train one run"):
        open_saver(tmp_path, "one")
    open_saver(tmp_path, "another")


def test_retention_leaves_what_a_later_life_is_writing(alone, tmp_path):
    with open_saver(tmp_path) as saver:
        for name in ("step_000000001_ffffffff", "notes"):  # a life that is not known yet, a user's own
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
            (tmp_path / "checkpoints" / name / "file").touch()
        save(saver, 2)
        saver.wait()
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"step_000000001_ffffffff", "notes"}


def test_two_lives_that_save_one_step_do_not_share_a_file(alone, tmp_path):
    for _ in range(2):
        with open_saver(tmp_path, keep_last=3) as saver:
            save(saver, 7)
    found, _ = committed(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [7], "the older of the two is given up"
