"""Loader speed beside its peers and the decoder alone, in one run, in rounds taken in turn.

    pip install 'mtl_dist[bench]'
    python -m benchmarks.loader [--images 20000] [--rounds 5]

Data: 112 x 112 JPEGs of about 6 KB (rendered faces, repeated with other noise), labels included. Everything yields
shuffled batches of 64 as tensors of pixels and labels. `decoder alone` decodes the same bytes from memory into one
preallocated batch: nothing can be faster with this decoder. Medians over rounds; the quartiles say how noisy the
machine was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import lend, train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.shards.annotations import FILES, HEADER, read_annotations
from mtl_dist.shards.writer import plan_set, write_sets

BATCH, SIZE, SHARD_ROWS, VIEW = 64, 112, 1000, "cropped_aligned"
NUM_VAL = 100  # images of validation, which nothing is measured with
NOISE = 3.2  # of the camera, in grey levels: 112 x 112 pixels then take about 6 KB
Epoch = Callable[[int], Iterator[int]]  # epoch -> the number of images of each batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch:
        root = Path(scratch)
        source = make_images(root / "source", args.images)
        contenders = dict(build_contenders(root, source))
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_number in range(args.rounds + 1):  # the first warms page cache and imports
            for name, epoch in contenders.items():
                speed = measure(epoch, round_number)
                if round_number:
                    speeds[name].append(speed)
        report(speeds, args.out)


def measure(epoch: Epoch, number: int) -> float:
    """Images a second over an epoch, from asking for the first batch to having the last."""
    begun = time.perf_counter()
    images = sum(epoch(number))
    return images / (time.perf_counter() - begun)


def report(speeds: dict[str, list[float]], out: Path | None) -> None:
    limit = statistics.median(speeds["decoder alone"])
    rows = {}
    print(f"{'':34}{'images/s':>10}{'quartiles':>18}{'of decoder':>12}")
    for name, found in sorted(speeds.items(), key=lambda item: -statistics.median(item[1])):
        low, middle, high = np.percentile(found, [25, 50, 75])
        rows[name] = {
            "images_per_s": round(middle),
            "quartiles": [round(low), round(high)],
            "of_decoder": round(middle / limit, 3),
        }
        print(f"{name:34}{middle:>10.0f}{f'{low:.0f}-{high:.0f}':>18}{middle / limit:>12.2f}")
    if out:
        write_results(out, {"loaders": rows})


def write_results(out: Path, results: dict) -> None:
    """Write results as JSON with date, command and machine; where they and the data lie is nobody's business."""
    arguments, name = sys.argv[1:], Path(sys.argv[0]).stem
    for flag in {"--out", "--dir", "--look"} & set(arguments):
        place = arguments.index(flag)
        del arguments[place : place + 2]
    if "--photographs" in arguments:
        arguments[arguments.index("--photographs") + 1] = "DIR"
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *arguments]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
    }
    out.write_text(json.dumps(about | results, indent=1) + "\n")


def make_images(root: Path, count: int) -> Path:
    """Write a labelled set in the s-Aff-Wild2 layout: rendered faces, each with new noise, `count` of them to train."""
    from mtl_dist.synthetic.render import write_synthetic

    faces = root.with_name("faces")
    write_synthetic(faces, num_train=200, num_val=20, jobs=2)
    pixels = [np.asarray(Image.open(path)) for path in sorted((faces / VIEW).rglob("*.jpg"))]
    rng = np.random.default_rng(0)
    lines = [HEADER]
    for number in range(count + NUM_VAL):
        noisy = pixels[number % len(pixels)] + rng.normal(0, NOISE, (SIZE, SIZE, 3))
        image = f"v{number // 500}/{number:05d}.jpg"
        path = root / VIEW / image
        path.parent.mkdir(parents=True, exist_ok=True)
        # Quality and chroma of OpenCV's imwrite, which the tools that cut faces out of videos use.
        data = simplejpeg.encode_jpeg(noisy.clip(0, 255).astype(np.uint8), quality=95, colorsubsampling="420")
        path.write_bytes(data)
        au = ",".join(map(str, rng.integers(0, 2, 12)))
        lines.append(f"{image},{rng.uniform(-1, 1):.3f},{rng.uniform(-1, 1):.3f},{rng.integers(8)},{au}")
    for split, rows in (("train", lines[: count + 1]), ("val", [HEADER, *lines[count + 1 :]])):
        (root / FILES[split]).write_text("\n".join(rows) + "\n")
    shutil.rmtree(faces)
    return root


def make_set(root: Path, source: Path, shard_rows: int) -> Path:
    """Write the training rows of `source` as shards below `root`."""
    annotations = read_annotations(source / FILES["train"])
    options = {"view": VIEW, "split": "train", "seed": 0, "frames_per_shard": shard_rows}
    with contextlib.ExitStack() as claims:
        plan = plan_set(annotations, source / VIEW, str(root), claims=claims, **options)
        write_sets([plan], jobs=1, progress=lambda rows: None)
    return root


def build_contenders(root: Path, source: Path) -> Iterator[tuple[str, Epoch]]:
    """Yield (name, epoch) of every loader whose package is installed; the others are named as missing."""
    shards = make_set(root / "shards", source, SHARD_ROWS)
    samples = read_samples(shards)
    size = sum(len(image) for image, _ in samples) / len(samples)
    print(f"{len(samples)} images of {size / 1000:.1f} KB, batches of {BATCH}")

    yield "decoder alone", lambda number: decode_alone(samples)
    for workers in (0, 1, 2):
        yield f"mtl_dist, {workers} threads", ours(shards, workers)
    for name, build in (("webdataset", webdatasets), ("litdata", litdatas), ("streaming", streamings)):
        try:
            yield from build(root, shards, samples)
        except ImportError as error:
            print(f"{name} is left out: {error}")


def read_samples(shards: Path) -> list[tuple[bytes, dict]]:
    import tarfile

    samples = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [tar.extractfile(member).read() for member in tar]
        samples += [(image, json.loads(label)) for image, label in zip(members[::2], members[1::2])]
    return samples


def decode_alone(samples: list[tuple[bytes, dict]]) -> Iterator[int]:
    memory = np.empty(BATCH * SIZE * SIZE * 3 + 64, np.uint8)
    begin = -memory.ctypes.data % 64  # at a cache line: 3% faster than where numpy begins
    batch = memory[begin : begin + BATCH * SIZE * SIZE * 3].reshape(BATCH, SIZE, SIZE, 3)
    for begin in range(0, len(samples) - BATCH + 1, BATCH):
        for place in range(BATCH):
            simplejpeg.decode_jpeg(samples[begin + place][0], "RGB", buffer=batch[place])
        yield BATCH


def ours(shards: Path, workers: int) -> Epoch:
    """As a training run does it: one reader for all epochs."""
    index = read_index(str(shards))
    order = Order(index.shard_rows, BATCH, 16, 4, seed=0)
    samples = ImageSamples(ShardReader(str(shards), index, Cache()), SIZE)

    def epoch(number: int) -> Iterator[int]:
        options = {"rank": 0, "num_ranks": 1, "workers": workers, "prefetch": 4}
        batches = train_batches(samples, order, epoch=number, start_step=0, **options)
        for batch in lend(samples, batches):
            yield len(batch.rows)

    return epoch


# ------------------------------------------------------------------------------------------------------------ the peers


def count(loader) -> Iterator[int]:
    """Every loader is made once for all rounds, and keeps its processes."""
    for images, _ in loader:
        yield len(images)


def label_tensor(label: dict) -> torch.Tensor:
    """(15,) float32: valence, arousal, expression, action units."""
    return torch.tensor([*(label["va"] or (-5, -5)), label["expr"] if label["expr"] is not None else -1, *label["au"]])


def decode_with_pil(image: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(image)).convert("RGB")))


def decode_with_simplejpeg(image: bytes) -> torch.Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(image, "RGB"))


DECODERS = {"PIL": decode_with_pil, "simplejpeg": decode_with_simplejpeg}


def webdatasets(root: Path, shards: Path, samples) -> Iterator[tuple[str, Epoch]]:
    import webdataset as wds

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    for name, decode in DECODERS.items():
        for workers in (0, 1, 2):
            stages = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
            stages = stages.shuffle(1000).to_tuple("jpg", "json")
            stages = stages.map_tuple(decode, lambda data: label_tensor(json.loads(data))).batched(BATCH)
            loader = wds.WebLoader(stages, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
            yield f"webdataset + {name}, {workers} processes", lambda number, loader=loader: count(loader)


def litdatas(root: Path, shards: Path, samples) -> Iterator[tuple[str, Epoch]]:
    import litdata
    from torchvision.io import decode_jpeg

    out = root / "litdata"
    writer = litdata.streaming.writer.BinaryWriter(str(out), chunk_bytes="8MB")
    for place, (image, label) in enumerate(samples):
        writer.add_item(place, {"image": image, "label": label_tensor(label).numpy()})
    writer.done()
    writer.merge()

    class Faces(litdata.StreamingDataset):
        def __getitem__(self, place):
            item = super().__getitem__(place)
            data = torch.frombuffer(bytearray(item["image"]), dtype=torch.uint8)
            return decode_jpeg(data), torch.from_numpy(np.array(item["label"]))

    for workers in (0, 1, 2):
        options = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
        loader = litdata.StreamingDataLoader(Faces(str(out), shuffle=True), **options)  # it counts its epochs itself
        yield f"LitData + torchvision, {workers} processes", lambda number, loader=loader: count(loader)


def streamings(root: Path, shards: Path, samples) -> Iterator[tuple[str, Epoch]]:
    import streaming

    out = root / "mds"
    columns = {"image": "bytes", "label": "ndarray:float32:15"}
    with streaming.MDSWriter(out=str(out), columns=columns) as writer:
        for image, label in samples:
            writer.write({"image": image, "label": label_tensor(label).numpy()})

    class Faces(streaming.StreamingDataset):
        def __init__(self, decode, **options):
            super().__init__(**options)
            self.decode = decode

        def __getitem__(self, place):
            item = super().__getitem__(place)
            return self.decode(item["image"]), torch.from_numpy(item["label"].copy())

    for name, decode in DECODERS.items():  # PIL is what its own columns of images are decoded with
        for workers in (0, 1, 2):
            streaming.base.util.clean_stale_shared_memory()
            # Its sets of one process may not share a directory.
            local = str(shutil.copytree(out, f"{out}-{name}-{workers}"))
            data = Faces(decode, local=local, shuffle=True, batch_size=BATCH)
            options = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
            loader = torch.utils.data.DataLoader(data, **options)
            yield f"MosaicML Streaming + {name}, {workers} processes", lambda number, loader=loader: count(loader)


if __name__ == "__main__":
    main()
