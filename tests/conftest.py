"""Fixtures that several test files share: small annotated data sets, their shards, and a real S3 server."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Before torch is imported, for processes that tests start too: on some processors sums depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import simplejpeg

from mtl_dist.errors import run_command
from mtl_dist.shards.annotations import HEADER

REPO = Path(__file__).parent.parent
LONDON = REPO.parent / "shared" / "data" / "london_faces"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what starts from trained runs or the S3 server out of `make quick`."""
    for item in items:
        if {"runs", "s3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("whole")


def write_dataset(root: Path, *, num_train: int = 40, num_val: int = 20, size: int = 48, seed: int = 0) -> Path:
    """Write a labelled set of noise images in the s-Aff-Wild2 layout, with duplicates and missing labels."""
    rng = np.random.default_rng(seed)
    for split, name, count in (("t", "training", num_train), ("v", "validation", num_val)):
        lines = [HEADER]
        for number in range(count):
            # Every tenth row repeats the image before it: rows, not images, are samples.
            image = f"{split}{number // 8}/{number - (number % 10 == 9):05d}.jpg"
            va = rng.uniform(-1, 1, 2).round(3) if rng.random() < 0.7 else (-5.0, -5.0)
            expr = rng.integers(8) if rng.random() < 0.6 else -1
            au = rng.integers(0, 2, 12) if rng.random() < 0.7 else [-1] * 12
            lines.append(",".join(map(str, [image, *va, expr, *au])))
            for view in ("cropped", "cropped_aligned"):
                path = root / view / image
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 255, (size, size, 3), np.uint8)
                path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=80))
        (root / f"{name}_set_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def run_module(*args: str, env: dict[str, str] | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` as a user would and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        env={**os.environ, **(env or {})},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_here(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` in this process: the same code and exit codes, without seconds of imports.

    Not for what a process of its own shows: its environment, signals, what it leaves behind.
    """
    found, code = importlib.import_module(module), 0
    main = (importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_command(lambda: main([*map(str, args)]))
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess([module, *args], code, out.getvalue(), err.getvalue())


def assert_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Bad input: exit code 2, no traceback, and a message that holds every word."""
    printed = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in printed, (word, printed)


@contextlib.contextmanager
def within(seconds: float):
    """Fail if the block takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def shards(dataset, tmp_path_factory) -> Path:
    """Shards of both views and splits of `dataset`."""
    from mtl_dist.shards.__main__ import create

    root = tmp_path_factory.mktemp("shards")
    create(str(dataset), str(root), frames_per_shard=7, jobs=1)
    return root


@pytest.fixture(scope="session")
def runs(shards, tmp_path_factory) -> Path:
    """Trained runs named after their views, and a copy of their shards: read only, for all files that start from runs.

    cropped has two checkpoints and two evaluations, cropped_aligned one of each.
    """
    from mtl_dist.tasks import VIEWS
    from tests.test_training import train_args

    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(shards, root / "shards")
    for view, epochs in zip(VIEWS, "21"):
        args = [arg.replace("/cropped/", f"/{view}/") for arg in train_args(root / "shards", root, view)]
        done = run_module(*args, "--train.epochs", epochs, "--checkpoint.keep-last", "2", env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def run(runs) -> Path:
    """A trained run of two checkpoints."""
    return runs / "cropped"


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server (rclone's) with a bucket 'mtl'; its environment is set for this process and its children."""
    from tests.s3_server import S3Server

    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server
