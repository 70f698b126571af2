"""Ranks killed at every phase of a step and a save: no row lost, none twice, and bit-identical weights in the end."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from mtl_dist import storage
from mtl_dist.errors import InputError
from mtl_dist.runs.checkpoint import committed, find_damage
from mtl_dist.runs.lives import Stale, Superseded, begin_life, read_lives
from mtl_dist.sections import CheckpointConfig
from mtl_dist.training.audit import read_audit
from mtl_dist.training.saving import Saver
from mtl_dist.training.watchdog import EXIT_CODE
from tests.conftest import REPO, run_module
from tests.dying import PHASES
from tests.test_training import STEPS_PER_EPOCH, train_args

pytestmark = pytest.mark.whole

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
    assert (report.samples_lost, report.samples_twice) == (0, 0)


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


@pytest.mark.parametrize("ends", ["pass", "sys.exit(3)"])
def test_a_rank_of_torchrun_leaves_with_its_exit_code_and_tears_nothing_down(ends):
    script = f"""
import atexit, os, sys
from mtl_dist.training.restarts import leaving_standing

atexit.register(os._exit, 77)  # as gloo's threads abort now and then
with leaving_standing():
    print("said")
    {ends}
"""
    for environment, codes in ({"TORCHELASTIC_RUN_ID": "one"}, (0, 3)), ({}, (77, 77)):
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, cwd=REPO, capture_output=True, text=True
        )
        assert done.returncode == codes[ends != "pass"], done.stderr
        assert done.stdout == "said\n" or not environment


def test_torchrun_is_one_command_through_restarts_and_another_at_every_launch(alone, tmp_path):
    """With static rendezvous: id, address and port are the same each time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run, damaged = tmp_path / "run", tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "lives.json").write_text('{"life": 1}')
    args = ["--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=2", "--max-restarts=1"]
    args += ["--monitor-interval=0.1", "-m", "tests.starting", str(run), str(damaged), str(tmp_path / "failed")]
    printed = run_module("torch.distributed.run", *args).stdout
    first, again = read_lives(str(run))
    assert first["command"] == again["command"]
    for rank in (0, 1):
        assert printed.count(f"rank {rank}: {damaged}/lives.json is damaged") == 2, "every rank learns of it"
    begin_life(str(run), launcher="another", num_ranks=1)
    assert "taken over" not in run_module("torch.distributed.run", *args).stdout
    *_, another, later = read_lives(str(run))
    assert len({first["command"], another["command"], later["command"]}) == 3


# ------------------------------------------------------------------------------------------------------------ the saver


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(saver: Saver, step: int, records: dict[str, list[bytes]] | None = None, **scores: float) -> None:
    tensors = {"weight": torch.full((4,), float(step))}
    state = {"step": step, "scores": {}}
    saver.save(tensors, {}, begun=time.monotonic(), state=state, scores=scores, records=records or {})


def open_saver(run: Path, command: str = "one", **settings) -> Saver:
    return Saver(str(run), CheckpointConfig(**settings), life=begin_life(str(run), launcher=command, num_ranks=1))


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
        save(saver, 2, records={"notes": [b"of ", b"step 2"]})
        saver.wait()
        assert "checkpoint of step 2 was not stored" in capsys.readouterr().out
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "away").rename(tmp_path / "checkpoints")
        save(saver, 3)
    assert [checkpoint.step for checkpoint in committed(str(tmp_path))[0]] == [1, 3]
    assert (tmp_path / "notes").read_bytes() == b"of step 2", "records are handed over once, and stored"


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


LISTS = {
    "deleted": None,
    "cut": '[{"life": "',
    "an object": '{"life": 1}',
    "a word": '"x"',
    "nothing": "null",
    "numbers": "[1]",
    "starts without a host": '[{"life": "00000000", "started": "", "step": 0, "num_ranks": 1, "command": ""}]',
    "a command that is a number": '[{"life": "00000000", "started": "", "step": 0, "num_ranks": 1, "host": "a", '
    '"command": "", "typed": 1}]',
    "too deep": "[" * 10**5,
}


def damage_lives(run: Path, text: str | None) -> None:
    (run / "lives.json").unlink(missing_ok=True)
    if text is not None:
        (run / "lives.json").write_text(text)


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_a_run_under_way_writes_a_damaged_list_of_starts_again(text, alone, tmp_path, capsys):
    open_saver(tmp_path)
    with open_saver(tmp_path, keep_last=1) as saver:
        before = read_lives(str(tmp_path))
        for step in (1, 2):
            damage_lives(tmp_path, text)
            save(saver, step)
            saver.wait()
        assert [checkpoint.step for checkpoint in committed(str(tmp_path))[0]] == [2]
        assert read_lives(str(tmp_path)) == before
        damage_lives(tmp_path, text)
        saver.life.note_step(3)
        assert [life["step"] for life in read_lives(str(tmp_path))] == [None, 3]
        assert "was deleted or damaged: written again" in capsys.readouterr().out
        damage_lives(tmp_path, None)
        open_saver(tmp_path, "another")
        save(saver, 4)
        with pytest.raises(Superseded):
            saver.wait()


@pytest.mark.parametrize("text", [text for text in LISTS.values() if text], ids=[name for name in LISTS if LISTS[name]])
def test_a_start_with_a_damaged_list_of_starts_is_one_message(text, alone, tmp_path):
    damage_lives(tmp_path, text)
    with pytest.raises(InputError, match=r"lives\.json is damaged .*delete it: only the list of starts is lost"):
        open_saver(tmp_path)
    damage_lives(tmp_path, None)
    open_saver(tmp_path)


def test_a_checkpoint_that_may_not_be_deleted_is_named_once_and_the_run_goes_on(alone, tmp_path, monkeypatch, capsys):
    unlink = os.unlink

    def refuse(path, *args, **options):
        if "step_000000001_" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, *args, **options)

    with open_saver(tmp_path, keep_last=1) as saver:
        save(saver, 1)
        saver.wait()
        monkeypatch.setattr(os, "unlink", refuse)
        for step in (2, 3, 4):
            save(saver, step)
    assert [checkpoint.step for checkpoint in committed(str(tmp_path))[0]] == [1, 4]
    printed = capsys.readouterr().out
    assert "not stored" not in printed
    assert printed.count("not deleted, and kept") == 1


def test_the_checkpoint_of_the_later_start_counts_whatever_the_clocks_say(alone, tmp_path):
    """The first one's host is a day ahead, its checkpoint was damaged, and the list of starts was deleted."""
    ahead = open_saver(tmp_path)
    ahead.clock = lambda: time.time() + 24 * 3600
    with ahead:
        save(ahead, 7)
    (damaged,), _ = committed(str(tmp_path))
    Path(damaged.uri, "model.safetensors").write_bytes(bytes(Path(damaged.uri, "model.safetensors").stat().st_size))
    damage_lives(tmp_path, None)
    with open_saver(tmp_path, keep_last=1) as saver:
        save(saver, 7)
        saver.wait()
        assert committed(str(tmp_path))[0] == [saver.saved]
        assert find_damage(saver.saved) is None


def test_what_was_just_committed_is_never_deleted(alone, tmp_path):
    """Beside one of the same step and start that a clock calls the newer."""
    with open_saver(tmp_path, keep_last=1) as saver:
        saver.clock = lambda: time.time() + 24 * 3600
        save(saver, 7)
        saver.wait()
        shutil.move(saver.saved.uri, f"{saver.saved.uri[:-8]}ffffffff")
        saver.clock = time.time
        save(saver, 7)
        saver.wait()
        assert saver.saved in committed(str(tmp_path))[0]


def test_what_was_killed_in_the_first_file_of_a_save_is_removed(alone, tmp_path):
    with open_saver(tmp_path) as killed:
        torn = tmp_path / "checkpoints" / f"step_000000001_{killed.life.name}"
        torn.mkdir(parents=True)
        (torn / f"{storage.PART_PREFIX}host-abc").write_bytes(b"half")
    with open_saver(tmp_path) as saver:
        save(saver, 2)
    assert [path.name[:14] for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000002"]


def test_files_reach_the_disk_before_their_commit_and_the_commit_before_anything_is_deleted(
    alone, tmp_path, monkeypatch
):
    """What is asked of the operating system, in its order: nothing else decides what a power cut leaves."""
    with open_saver(tmp_path, keep_last=1) as saver:
        save(saver, 1)
        saver.wait()
        calls, known = [], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

        def note(name: str, path: Path) -> None:
            path = path.relative_to(tmp_path) if path.is_relative_to(tmp_path) else path
            calls.append((name, str(path)))

        def fsync(handle: int) -> None:
            note("fsync", Path(f"/proc/self/fd/{handle}").readlink())
            known["fsync"](handle)

        def replace(source, target) -> None:
            note(f"{Path(source).relative_to(tmp_path)} becomes", Path(target))
            known["replace"](source, target)

        def unlink(path, *args, **options) -> None:
            note("unlink", Path(path))
            known["unlink"](path, *args, **options)

        for name, noting in (("fsync", fsync), ("replace", replace), ("unlink", unlink)):
            monkeypatch.setattr(os, name, noting)
        save(saver, 2)
        saver.wait()
        monkeypatch.undo()
    directory = f"checkpoints/step_000000002_{saver.life.name}"
    files = [f"{directory}/{name}" for name in ("model.safetensors", "train.safetensors", "state.json", "COMMIT.json")]
    named = [next(place for place, (what, path) in enumerate(calls) if path == file) for file in files]
    synced = [place for place, call in enumerate(calls) if call == ("fsync", directory)]
    assert named == sorted(named)
    for place in named:
        part = calls[place][0].removesuffix(" becomes")
        assert ("fsync", part) in calls[:place], "the bytes first, and then their name"
    last = next(place for place in synced if place > named[-1])
    assert any(named[-2] < place < named[-1] for place in synced), "the names of the files, before their COMMIT"
    assert ("fsync", "checkpoints") in calls[: named[-1]], "and that of their directory"
    deleted = [place for place, (what, path) in enumerate(calls) if what == "unlink" and "/step_000000001_" in path]
    assert deleted
    assert min(deleted) > last
    assert calls[deleted[0]][1].endswith("COMMIT.json")
