"""Jobs on a real Ray cluster whose ranks are killed, and that are stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cluster.processes import find_processes, read_command
from tests.conftest import REPO
from tests.integration.jobs import RUNS, read, run_args

pytestmark = pytest.mark.integration


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
            ranks = [
                pid for pid in find_processes(cluster.cluster_id) if "RayTrainWorker" in " ".join(read_command(pid))
            ]
            assert len(ranks) >= 2
            os.kill(ranks[-1], signal.SIGKILL)
        printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed[-3000:]
    assert "continuing from s3://mtl/runs/killed/checkpoints/step_" in printed
    assert re.search(r"ranks failed often, but step \d+ is stored: failures are counted anew", printed)
    records = [json.loads(line) for line in read(cluster, f"{RUNS}/killed/metrics.jsonl").splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 61))


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
