"""The data path beside its limits: writing shards, the first pass from S3, the first batch of a resumed epoch, memory.

    python -m benchmarks.datapath [--images 10000] [--rounds 5] [--only memory create s3 resume]

create   images a second of the command `shards create`, its start and its index included, with 1 and 2 processes,
         against one process that reads, decodes and writes the same files once
s3       the first epoch from a real S3 server (rclone's, on this machine, on the same cores) with an empty cache,
         against the decoder alone on the same bytes and a plain parallel boto3 download of the same shards
resume   seconds to the first batch at the start and in the middle of an epoch of 1,000 shards, on disk and from S3
         with an empty cache
memory   a rank's memory at the quarters of two epochs: its own (anonymous), and the mapped shards beside it, which the
         kernel takes back when it needs to

Every figure is the median of rounds taken in turn; quartiles say how noisy the machine was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import simplejpeg
import torch
from botocore.config import Config

from benchmarks.loader import (
    BATCH,
    SHARD_ROWS,
    SIZE,
    VIEW,
    decode_alone,
    make_images,
    make_set,
    read_samples,
    write_results,
)
from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import lend, train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.processes import with_parent
from mtl_dist.shards.annotations import FILES, read_annotations
from tests.s3_server import BUCKET, S3Server

STREAMS, BLOCK_SHARDS, PREFETCH = 16, 4, 4
DOWNLOAD_THREADS = 8  # of the plain boto3 download
# Rows of an image, where a set should be larger than its images.
CREATE_REPEATS, S3_REPEATS = 20, 10
RESUME_SHARDS = 1000
PARTS = ("memory", "create", "s3", "resume")  # memory first, before others leave theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"create": bench_create, "s3": bench_s3, "resume": bench_resume, "memory": bench_memory}
    results = {}
    with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch:
        root = Path(scratch)
        source = make_images(root / "source", args.images)
        with S3Server(root / "server") as server:
            os.environ.update(server.env)
            for name in args.only:
                print(f"\n{name}")
                results[name] = parts[name](root / name, source, args.rounds)
    if args.out:
        write_results(args.out, results)


def in_turn(contenders: dict[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, list[float]]:
    """Measure every contender once a round; print and return (first quartile, median, third quartile) of each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first warms page cache and imports
        for name, measure in contenders.items():
            value = measure()
            if number:
                found[name].append(value)
    quartiles = {name: np.percentile(values, [25, 50, 75]).tolist() for name, values in found.items()}
    for name, (low, middle, high) in quartiles.items():
        print(f"  {name:46}{middle:>12,.3g} {unit}   ({low:,.3g} to {high:,.3g})")
    return quartiles


def print_ratio(what: str, value: float) -> float:
    print(f"  {what:46}{value:>12.2f}")
    return round(value, 3)


# ------------------------------------------------------------------------------------------------------ writing shards


def bench_create(root: Path, source: Path, rounds: int) -> dict:
    source = repeat_rows(root.with_suffix(".source"), source, CREATE_REPEATS)
    files = [f"{source}/{VIEW}/{name}" for name in read_annotations(source / FILES["train"]).images]

    def limit() -> float:
        begun = time.perf_counter()
        with open(root.with_suffix(".limit"), "wb", buffering=1 << 20) as out:
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    image = file.read()
                simplejpeg.decode_jpeg(image, "RGB")
                out.write(image)
        return len(files) / (time.perf_counter() - begun)

    def ours(jobs: int) -> float:
        shutil.rmtree(root, ignore_errors=True)
        command = [sys.executable, "-m", "mtl_dist.shards", "create", str(source), str(root), "--views", VIEW]
        begun = time.perf_counter()
        subprocess.run(with_parent([*command, "--jobs", str(jobs)]), check=True, stdout=subprocess.DEVNULL)
        return len(files) / (time.perf_counter() - begun)

    contenders = {"read, decode and write, 1 process": limit}
    contenders |= {f"shards create, {jobs} processes": lambda jobs=jobs: ours(jobs) for jobs in (1, 2)}
    speeds = in_turn(contenders, rounds, "images/s")
    least, one, two = (middle for _, middle, _ in speeds.values())
    return {
        "images_per_s": speeds,
        "one_process_of_limit": print_ratio("1 process, share of the limit", one / least),
        "two_processes_of_one": print_ratio("2 processes, times 1", two / one),
    }


# -------------------------------------------------------------------------------------------------- first pass from S3


def bench_s3(root: Path, source: Path, rounds: int) -> dict:
    samples = read_samples(
        make_set(root / "local", repeat_rows(root.with_suffix(".source"), source, S3_REPEATS), SHARD_ROWS)
    )
    uri = copy_up(root / "local")
    names = [found.name for found in storage.list_objects(uri)]

    def decoder() -> float:
        begun = time.perf_counter()
        images = sum(decode_alone(samples))
        return images / (time.perf_counter() - begun)

    client = boto3.client("s3", config=Config(max_pool_connections=64))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")

    def fetch(name: str, directory: str) -> None:
        client.download_file(bucket, f"{prefix}/{name}", f"{directory}/{name}")

    def download() -> float:
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            begun = time.perf_counter()
            with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
                list(pool.map(lambda name: fetch(name, scratch), names))
            return len(samples) / (time.perf_counter() - begun)

    def ours(workers: int) -> float:
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            begun = time.perf_counter()
            images = sum(len(batch.rows) for batch in epoch(uri, Path(scratch), workers=workers))
            return images / (time.perf_counter() - begun)

    contenders = {"decoder alone, 1 thread": decoder, "plain boto3 download": download}
    contenders |= {
        f"mtl_dist, empty cache, {workers} threads": lambda workers=workers: ours(workers) for workers in (1, 2)
    }
    speeds = in_turn(contenders, rounds, "images/s")
    middles = [middle for _, middle, _ in speeds.values()]
    slower = min(middles[:2])
    return {
        "images_per_s": speeds,
        "one_thread_of_slower": print_ratio("1 thread, share of the slower of the two", middles[2] / slower),
        "two_threads_of_slower": print_ratio("2 threads, share of the slower of the two", middles[3] / slower),
    }


# ------------------------------------------------------------------------------------------ the first batch of a resume


def bench_resume(root: Path, source: Path, rounds: int) -> dict:
    local = make_set(root / "local", source, max(1, count_rows(source) // RESUME_SHARDS))
    uri = copy_up(root / "local")

    def first_batch(place: str, at: float) -> float:
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            begun = time.perf_counter()
            batches = epoch(place, Path(scratch), workers=2, at=at)
            next(batches)
            took = time.perf_counter() - begun
            batches.close()
            return took

    contenders = {
        f"{where}, {what}": lambda place=place, at=at: first_batch(place, at)
        for where, place in (("on disk", str(local)), ("from S3", uri))
        for what, at in (("start", 0.0), ("middle", 0.5))
    }
    times = in_turn(contenders, rounds, "s")
    disk_start, disk_middle, s3_start, s3_middle = (middle for _, middle, _ in times.values())
    return {
        "seconds": times,
        "disk_middle_of_start": print_ratio("on disk, middle / start", disk_middle / disk_start),
        "s3_middle_of_start": print_ratio("from S3, middle / start", s3_middle / s3_start),
    }


# --------------------------------------------------------------------------------------------------------------- memory


def bench_memory(root: Path, source: Path, rounds: int) -> dict:
    place = str(make_set(root / "local", source, SHARD_ROWS))
    index = read_index(place)
    reader = ShardReader(place, index, Cache(root / "cache"))
    order = Order(index.shard_rows, BATCH, STREAMS, BLOCK_SHARDS, seed=0)
    marks = []
    for number in range(2):
        quarters = {order.num_steps * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
        for step, _ in enumerate(batches_of(reader, order, number, workers=2, at=0.0)):
            if step in quarters:
                marks.append({"epoch": number, "step": step, **resident_mb()})
                print("  " + "   ".join(f"{key} {value}" for key, value in marks[-1].items()))
    return {"marks": marks}


def resident_mb() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    fields = {line.split(":")[0]: line.split() for line in status.splitlines()}
    names = {"own_mb": "RssAnon", "mapped_mb": "RssFile", "peak_mb": "VmHWM"}
    return {name: int(fields[field][1]) // 1024 for name, field in names.items()}


# --------------------------------------------------------------------------------------------------------------- shared


def epoch(uri: str, cache: Path, *, workers: int, at: float = 0.0) -> Iterator:
    """Open a set anew and yield the batches of its first epoch from the share `at` of it on."""
    index = read_index(uri)
    order = Order(index.shard_rows, BATCH, STREAMS, BLOCK_SHARDS, seed=0)
    yield from batches_of(ShardReader(uri, index, Cache(cache)), order, 0, workers=workers, at=at)


def batches_of(reader: ShardReader, order: Order, number: int, *, workers: int, at: float) -> Iterator:
    start = int(order.num_steps * at)
    options = {"rank": 0, "num_ranks": 1, "workers": workers, "prefetch": PREFETCH}
    samples = ImageSamples(reader, SIZE)
    return lend(samples, train_batches(samples, order, epoch=number, start_step=start, **options))


def repeat_rows(root: Path, source: Path, times: int) -> Path:
    """Make a source whose annotations list every row of `source` several times, over the same images."""
    root.mkdir()
    (root / VIEW).symlink_to(source / VIEW)
    for split, name in FILES.items():
        header, *lines = (source / name).read_text().splitlines()
        (root / name).write_text("\n".join([header, *lines * (times if split == "train" else 1)]) + "\n")
    return root


def count_rows(source: Path) -> int:
    return len(read_annotations(source / FILES["train"]).row)


def copy_up(root: Path) -> str:
    """Copy a set to the server and return its URI there."""
    uri = f"s3://{BUCKET}/{root.parent.name}"
    for found in storage.list_objects(str(root)):
        storage.upload(root / found.name, storage.join(uri, found.name))
    return uri


if __name__ == "__main__":
    main()
