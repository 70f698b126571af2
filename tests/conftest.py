"""Fixtures that several test files share: small annotated data sets, their shards, and a real S3 server."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import shutil
import signal
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
LONGEST = (
    "test_system", "test_interrupted", "test_golden", "test_training", "test_survival", "test_recipes", "test_features",
    "test_faults",
)  # fmt: skip
LONDON = REPO.parent / "shared" / "data" / "london_faces"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what starts from trained runs or the S3 server out of `make quick`, and begin with the longest files."""
    for item in items:
        if {"runs", "s3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("whole")
    # At the end one of them would keep a process busy while the others have nothing left.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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
    out, err = io.StringIO(), io.StringIO()
    with as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(lambda: main([*map(str, args)]))
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess([module, *args], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_it_was():
    """Take back what a command leaves in its process: handlers of signals, its environment, its group of ranks."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()


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
        done = run_here(*args, "--train.epochs", epochs, "--checkpoint.keep-last", "2")
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


def write_features(
    dest: Path,
    lengths: list[int],
    *,
    width: int = 6,
    split: str = "train",
    source: str = "a" * 64,
    extractor: str = "b" * 64,
    videos_per_shard: int = 3,
    seed: int = 0,
) -> Path:
    """Write a set of features of random numbers by hand: the format as it is documented, and none of our writer.

    Rows are numbered through; what a row has does not depend on the shards.
    """
    import hashlib
    import tarfile
    import zlib

    from safetensors.numpy import save

    from mtl_dist.data.index import FEATURES, Extractor, FeatureIndex, FeatureShard, dump_index
    from mtl_dist.data.sidecar import FeatureSidecar, dump_sidecar, pack_names
    from mtl_dist.shards.writer import count_labels
    from mtl_dist.tasks import AUS, EXPRESSIONS

    dest.mkdir(parents=True)
    rng, total = np.random.default_rng(seed), sum(lengths)
    features = np.random.default_rng([seed, width]).normal(size=(total, width)).astype(np.float16)
    masks = {"va_mask": rng.random(total) < 0.7, "expr_mask": rng.random(total) < 0.6}
    masks["au_mask"] = rng.random((total, 12)) < 0.8
    labels = {
        "va": rng.uniform(-1, 1, (total, 2)) * masks["va_mask"][:, None],
        "expr": rng.integers(0, 8, total) * masks["expr_mask"],
        "au": rng.integers(0, 2, (total, 12)) * masks["au_mask"],
    } | masks
    shards, every, ends = [], [], np.cumsum(lengths)
    for number in range(0, len(lengths), videos_per_shard):
        videos = list(range(len(lengths)))[number : number + videos_per_shard]
        name, begins, checksums = f"shard-{len(shards):06d}", [], []
        with tarfile.open(dest / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for video in videos:
                own = slice(ends[video] - lengths[video], ends[video])
                data = save({"feature": features[own]})
                member = tarfile.TarInfo(f"{video:09d}.safetensors")
                member.size = len(data)
                begins.append(tar.offset + 512 + 8 + int.from_bytes(data[:8], "little"))
                checksums.append(zlib.crc32(features[own].tobytes()))
                tar.addfile(member, io.BytesIO(data))
        own = slice(ends[videos[0]] - lengths[videos[0]], ends[videos[-1]])
        rows, of_videos = np.arange(total)[own], [lengths[video] for video in videos]
        frames = np.concatenate([np.arange(1, length + 1) for length in of_videos])
        names = [f"v{video}/{frame + 1:05d}.jpg" for video in videos for frame in range(lengths[video])]
        sidecar = FeatureSidecar(
            row=rows,
            frame=frames,
            image=pack_names(names),
            length=np.full(len(rows), 100),
            crc32=rows.astype(np.uint32) + {"train": 0, "val": 10**6}[split],
            **{key: array[own] for key, array in labels.items()},
            video=pack_names([f"v{video}" for video in videos]),
            num_rows=np.array(of_videos),
            begin=np.array(begins),
            checksum=np.array(checksums, np.uint32),
        )
        every.append(sidecar)
        data, tar_data = dump_sidecar(sidecar, {}), (dest / f"{name}.tar").read_bytes()
        (dest / f"{name}.safetensors").write_bytes(data)
        digests = {
            "tar_sha256": hashlib.sha256(tar_data).hexdigest(),
            "sidecar_sha256": hashlib.sha256(data).hexdigest(),
        }
        sizes = {"tar_bytes": len(tar_data), "sidecar_bytes": len(data)}
        shards.append(FeatureShard(name=name, rows=len(rows), videos=of_videos, **sizes, **digests))
    counts = functools.reduce(lambda one, other: one.plus(other), map(count_labels, every))
    index = FeatureIndex(
        format=FEATURES,
        view="cropped_aligned",
        split=split,
        rows=total,
        frames_per_shard=None,
        shard_bytes=None,
        seed=0,
        source_sha256="c" * 64,
        expressions=list(EXPRESSIONS),
        aus=list(AUS),
        labels=counts,
        shards=shards,
        extractor=Extractor(name=f"random {width}", sha256=extractor, input_size=112, pool="mean", width=width),
        source_index_sha256=source,
        mean=[0.0] * width,
        std=[1.0] * width,
    )
    (dest / "index.json").write_bytes(dump_index(index))
    return dest
