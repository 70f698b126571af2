"""Jobs of a user on a cluster, and what they leave in its store."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import REPO

RUNS = "s3://mtl/runs"


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
