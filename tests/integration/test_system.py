"""The whole system on a real Ray cluster of two nodes and a real S3 server: shards, search, training, ensemble."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.local import LocalCluster
from cluster.processes import find_processes
from mtl_dist.config import build_config
from mtl_dist.errors import StorageError, run_command
from mtl_dist.tasks import VIEWS
from tests.conftest import REPO, run_module

pytestmark = pytest.mark.integration
RUNS = "s3://mtl/runs"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, dataset):
    """A cluster with shards of `dataset` in its store."""
    with LocalCluster(tmp_path_factory.mktemp("cluster"), hosts=2, cpus_per_host=3) as state:
        args = ("mtl_dist.shards", "create", str(dataset), "s3://mtl/faces", "--frames-per-shard", "7")
        done = run_module(*args, env=state.client_env())
        assert done.returncode == 0, done.stderr
        yield state


def submit(cluster, *args: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit -- python -m ...`, as a user does it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--", "python", "-m"]
    env = {**os.environ, **cluster.client_env()}
    return subprocess.run([*command, *args], cwd=REPO, env=env, capture_output=True, text=True, timeout=240)


def run_args(view: str, name: str, *more: str) -> list[str]:
    return [
        "--preset", "small", "--run.name", name, "--run.storage", RUNS, "--data.train", f"s3://mtl/faces/{view}/train",
        "--data.val", f"s3://mtl/faces/{view}/val", "--train.global-batch", "8", "--train.epochs", "2",
        "--data.image-size", "80", "--optim.warmup-steps", "2", *more,
    ]  # fmt: skip


def read(cluster, uri: str) -> bytes:
    script = "import sys; from mtl_dist import storage; sys.stdout.buffer.write(storage.read_bytes(sys.argv[1]))"
    env = {**os.environ, **cluster.client_env()}
    return subprocess.run(
        [sys.executable, "-c", script, uri], cwd=REPO, env=env, capture_output=True, check=True
    ).stdout


def test_search_train_and_ensemble_run_as_jobs(cluster):
    # The search: two trials, its best configuration is one that training takes.
    search = ["--search.name", "weights", "--search.trials", "2", "--search.grace-epochs", "1"]
    done = submit(cluster, "tune.search", *run_args("cropped", "unused"), *search)
    assert done.returncode == 0, done.stdout[-3000:]
    best = yaml.safe_load(read(cluster, f"{RUNS}/weights/best.yaml"))
    assert set(best["loss"]) >= {"va", "expr", "au"}
    trials = read(cluster, f"{RUNS}/weights/trials.csv").decode().splitlines()
    assert trials[0] == "trial,loss.au,loss.expr,loss.va,optim.lr,epochs,best P,last P,end"
    assert len(trials) == 3

    # Training of both views on two ranks, with that configuration.
    for view in VIEWS:
        ranks = ["--ray.num-ranks", "2", "2", "--ray.placement", "SPREAD"]
        done = submit(cluster, "mtl_dist.train", "--config", f"{RUNS}/weights/best.yaml", *run_args(view, view, *ranks))
        assert done.returncode == 0, done.stdout[-3000:]
        assert "constant predictor" in done.stdout
    for view in VIEWS:
        assert list((cluster.dir / "s3" / "mtl" / "runs" / view).glob("checkpoints/step_000000010_*/COMMIT.json"))

    # The final job.
    runs = [f"{RUNS}/{view}" for view in VIEWS]
    done = submit(cluster, "mtl_dist.ensemble", "--runs", *runs, "--out", f"{RUNS}/ensemble")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "predicting 2 member(s) over the cluster: cropped, cropped_aligned" in done.stdout
    score = json.loads(read(cluster, f"{RUNS}/ensemble/score.json"))
    assert set(score["scores"]) == {"constant predictor", *VIEWS, "ensemble"}

    # Again: the finished search and run are recognised, nothing is trained twice.
    done = submit(cluster, "tune.search", *run_args("cropped", "unused"), *search)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "continuing the search" in done.stdout
    assert not re.search(r"trial \S+  epoch", done.stdout), "a trial was run a second time"
    assert read(cluster, f"{RUNS}/weights/trials.csv").decode().splitlines() == trials


def test_a_search_beside_another_ray_runs_one_trial_at_a_time_and_takes_one_that_diverged_for_a_result(
    cluster, shards, tmp_path
):
    """Without RAY_ADDRESS the search starts a Ray of its own; the cluster's is the other one on this machine."""
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {choice: [6.0e-4, 1000.0]}\n")
    args = [arg.replace("s3://mtl/faces", str(shards)) for arg in run_args("cropped", "unused")]
    args[args.index(RUNS)] = str(tmp_path)
    args += ["--search.trials", "2", "--search.concurrent", "1", "--search.space", str(space), "--run.seed", "2"]
    args += ["--search.metric", "rmse_v"]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    command = [sys.executable, "-m", "tune.search", *args, "--train.epochs", "1"]
    done = subprocess.run(
        command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:]
    trials = list(csv.DictReader((tmp_path / "search" / "trials.csv").open()))
    assert [(row["end"], row["optim.lr"]) for row in trials] == [("finished", "0.0006"), ("diverged", "1000")]
    assert yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())["optim"]["lr"] == 6e-4
    finished = tmp_path / "search" / "trials" / f"trial-{trials[0]['trial']}"
    assert list(finished.glob("checkpoints/step_000000005_*/COMMIT.json")), "ASHA stopped it at its last evaluation"
    assert 0 < float(trials[0]["best RMSE V"]) < 2
    assert "ignored" not in done.stdout
    assert "TensorBoard" not in done.stdout
    first = done.stdout.index(f"trial {trials[1]['trial']} diverged: ")
    assert first < done.stdout.index(f"trial {trials[0]['trial']}  epoch 1"), "two trials ran at once"


def test_two_ray_ranks_have_the_losses_of_one_process(cluster):
    """BatchNorm frozen, so that the split of a batch cannot matter."""
    frozen = ["--engine.batchnorm", "frozen"]
    done = submit(cluster, "mtl_dist.train", *run_args("cropped", "by-ray", *frozen, "--ray.num-ranks", "2", "2"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("start   2 ranks on cpu") == 1, "what a rank prints comes once"
    done = run_module("mtl_dist.train", "--local", *run_args("cropped", "by-hand", *frozen), env=cluster.client_env())
    assert done.returncode == 0, done.stderr
    steps = []
    for name in ("by-ray", "by-hand"):
        records = [json.loads(line) for line in read(cluster, f"{RUNS}/{name}/metrics.jsonl").splitlines()]
        steps.append([record["loss"] for record in records if record["kind"] == "step"])
    assert len(steps[0]) == len(steps[1]) == 10
    for mine, theirs in zip(*steps):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


def test_more_ranks_than_the_cluster_has_are_refused_with_exit_code_2(cluster):
    done = submit(cluster, "mtl_dist.train", *run_args("cropped", "many", "--ray.num-ranks", "8", "8"))
    assert done.returncode != 0
    assert "ray.num_ranks 8 with 1 CPU each need 8 CPU; the cluster has 6" in done.stdout
    assert "exit code 2" in done.stdout.replace("exit_code", "exit code")
    assert "Traceback" not in done.stdout


def test_a_changed_shard_is_named_by_the_job_without_a_traceback(cluster, dataset):
    """The size is right and the content is not: only a rank can find that, and its message reaches the user."""
    create = ("mtl_dist.shards", "create", str(dataset), "s3://mtl/damaged", "--frames-per-shard", "7")
    done = run_module(*create, env=cluster.client_env())
    assert done.returncode == 0, done.stderr
    path = cluster.dir / "s3" / "mtl" / "damaged" / "cropped" / "train" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    args = [arg.replace("s3://mtl/faces", "s3://mtl/damaged") for arg in run_args("cropped", "damaged")]
    done = submit(cluster, "mtl_dist.train", *args)
    assert done.returncode != 0
    assert "error: s3://mtl/damaged/cropped/train/shard-000001.tar" in done.stdout
    lives = json.loads(read(cluster, f"{RUNS}/damaged/lives.json"))["starts"]
    assert len(lives) == 1, "an error that no retry mends was retried"


def test_ranks_that_are_killed_again_and_again_are_restarted_while_the_run_comes_further(cluster):
    """kill -9 of a rank, twice where Ray allows one: every step is recorded once."""
    more = ["--ray.num-ranks", "2", "2", "--train.epochs", "12", "--checkpoint.every-steps", "3"]
    more += ["--ray.max-failures", "1"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--", "python", "-m"]
    with subprocess.Popen(
        [*command, "mtl_dist.train", *run_args("cropped", "killed", *more)],
        cwd=REPO,
        env={**os.environ, **cluster.client_env()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        run, lives = cluster.dir / "s3" / "mtl" / "runs" / "killed", set()
        for _ in range(2):
            while not (saved := {path.parent.name[-8:] for path in run.glob("checkpoints/*/COMMIT.json")} - lives):
                assert job.poll() is None, job.stdout.read()
                time.sleep(0.01)
            lives |= saved
            ranks = [pid for pid in find_processes(cluster.cluster_id) if "RayTrainWorker" in read_command(pid)]
            assert len(ranks) >= 2
            os.kill(ranks[-1], signal.SIGKILL)
        printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed[-3000:]
    assert "continuing from s3://mtl/runs/killed/checkpoints/step_" in printed
    assert re.search(r"ranks failed often, but step \d+ is stored: failures are counted anew", printed)
    records = [json.loads(line) for line in read(cluster, f"{RUNS}/killed/metrics.jsonl").splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 61))


def test_ranks_that_fail_without_end_end_in_one_message_that_names_them(capsys):
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    from mtl_dist.training.launch import _gave_up

    config = build_config({"run": {"name": "x", "storage": "runs"}})
    for failure, code, words in (
        (RayActorError(error_msg="The actor died.\nmore"), 1, "rank 1: RayActorError: The actor died. (MTL_"),
        (StorageError("s3://b/k: SlowDown"), 3, "rank 1: StorageError: s3://b/k: SlowDown (MTL_"),
    ):
        error = _gave_up(config, WorkerGroupError("Traceback ...", {1: failure}), reached=197)

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_command(fail)
        message = capsys.readouterr().err
        assert ended.value.code == code
        assert message.startswith("error: run runs/x failed more often than ray.max_failures 3 without getting further")
        assert words in message
        assert message.count("\n") == 1


def test_a_job_that_is_stopped_saves_and_says_how_to_continue(cluster):
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    env = {**os.environ, **cluster.client_env()}
    options = {"cwd": REPO, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    args = run_args("cropped", "stopped", "--train.epochs", "2000", "--ray.num-ranks", "2", "2")
    args += ["--train.eval-every", "2000", "--checkpoint.every-steps", "10"]
    submit = [*ray, "submit", "--submission-id", "stopped", "--working-dir", ".", "--"]
    run = cluster.dir / "s3" / "mtl" / "runs" / "stopped"
    with subprocess.Popen([*submit, "python", "-m", "mtl_dist.train", *args], **options) as job:
        while not list(run.glob("checkpoints/*/COMMIT.json")):
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.1)
        stopped = subprocess.run([*ray, "stop", "stopped"], **options, timeout=120)
        printed, _ = job.communicate(timeout=120)
    assert stopped.returncode == 0, stopped.stdout
    (at,) = set(re.findall(r"stopped at step (\d+) of 10000, saved; the same command continues", printed))
    assert list(run.glob(f"checkpoints/step_{int(at):09d}_*/COMMIT.json")), printed[-3000:]
    assert "Traceback" not in printed


def read_command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""
