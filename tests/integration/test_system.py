"""The whole system on a real Ray cluster of two nodes and a real S3 server: shards, search, training, ensemble."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from mtl_dist.config import build_config
from mtl_dist.errors import StorageError, run_command
from mtl_dist.tasks import VIEWS
from tests.conftest import REPO, run_module
from tests.integration.jobs import RUNS, read, run_args, submit

pytestmark = pytest.mark.integration


def best_args(view: str, name: str) -> list[str]:
    """The best configuration of the search, but where the split of a batch cannot matter: BatchNorm frozen."""
    alike = ["--engine.batchnorm", "frozen", "--optim.lr", "6e-4"]
    return ["--config", f"{RUNS}/weights/best.yaml", *run_args(view, name, *alike)]


def losses(cluster, name: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in read(cluster, f"{RUNS}/{name}/metrics.jsonl").splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.mark.timeout(600)
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
    ranks = ["--ray.num-ranks", "2", "2", "--ray.placement", "SPREAD"]
    for view in VIEWS:
        done = submit(cluster, "mtl_dist.train", *best_args(view, view), *ranks)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "constant predictor" in done.stdout
        assert done.stdout.count("start   2 ranks on cpu") == 1, "what a rank prints comes once"
    for view in VIEWS:
        assert list((cluster.dir / "s3" / "mtl" / "runs" / view).glob("checkpoints/step_000000010_*/COMMIT.json"))

    # The losses of two ranks under Ray are those of one process.
    alone = run_module("mtl_dist.train", "--local", *best_args("cropped", "by-hand"), env=cluster.client_env())
    assert alone.returncode == 0, alone.stderr
    mine, theirs = (losses(cluster, name) for name in ("cropped", "by-hand"))
    assert len(mine) == len(theirs) == 10
    for step, expected in zip(mine, theirs):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-5)

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
    assert "will be ignored" not in done.stdout, "Tune told of a setting of ours that it does not use"
    assert "TensorBoard" not in done.stdout
    first = done.stdout.index(f"trial {trials[1]['trial']} diverged: ")
    assert first < done.stdout.index(f"trial {trials[0]['trial']}  epoch 1"), "two trials ran at once"


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
