"""How fast features are made, beside the extractor's own forward of the same pictures, decoded already; in one run.

    python -m benchmarks.features [--images 4000] [--rounds 5] [--jobs 1]

Data: 112 x 112 JPEGs of about 6 KB, in shards. The extractor is `small` with random weights (676,016 parameters).
`features create` decodes, computes, writes tars and sidecars, and proves them with checksums. `the forward alone` runs
the same network on batches of the same pictures in memory, as many at a time, on as many threads of one batch each. By
turns; medians over rounds, and quartiles, which say how noisy the machine was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.loader import VIEW, make_images, write_results
from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import ahead
from mtl_dist.data.reader import ShardReader
from mtl_dist.features.extractors import build, find_feature_nets
from mtl_dist.features.job import create_features
from mtl_dist.features.options import CreateOptions
from mtl_dist.features.pooling import Pooled
from mtl_dist.models.backbones import build_backbone
from mtl_dist.shards.__main__ import create as create_shards

BATCH, SIZE = 64, 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="small")
    parser.add_argument(
        "--jobs", type=int, default=1, help="threads that compute; one more decodes for features create"
    )
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch:
        root = Path(scratch)
        source = make_images(root / "source", args.images)
        with contextlib.redirect_stdout(io.StringIO()):
            create_shards(str(source), str(root / "shards"), views=(VIEW,), jobs=2)
        torch.manual_seed(0)
        save_file(build_backbone(args.backbone, SIZE).state_dict(), root / "net.safetensors")
        options = CreateOptions(
            data=(str(root / "shards" / VIEW / "train"),),
            runs=(str(root / "net.safetensors"),),
            backbone=args.backbone,
            image_size=SIZE,
            batch=BATCH,
            jobs=args.jobs,
            local=True,
        )
        speeds = measure(root, options, rounds=args.rounds)
    report(speeds, args.out)


def measure(root: Path, options: CreateOptions, *, rounds: int) -> dict[str, list[float]]:
    """Return pictures a second of every round."""
    model = build(find_feature_nets(options)[0].networks[0])
    batches = decoded_batches(options.data[0])
    count = sum(map(len, batches))
    speeds: dict[str, list[float]] = {"features create": [], "the forward alone": []}
    for number in range(rounds + 1):  # the first warms page cache and imports
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            create_features(str(root / f"features-{number}"), options)
        made = time.perf_counter()
        forward(model, batches, threads=options.jobs)
        ended = time.perf_counter()
        if number:
            speeds["features create"].append(count / (made - begun))
            speeds["the forward alone"].append(count / (ended - made))
    return speeds


def decoded_batches(uri: str) -> list[Tensor]:
    """Return all pictures of a set, (64, 1, 3, 112, 112) uint8 a batch, the last one filled up."""
    reader = ShardReader(uri, read_index(uri), Cache())
    numbers = np.arange(reader.index.rows)
    return [reader.read_batch(numbers[begin : begin + BATCH], SIZE).inputs for begin in range(0, len(numbers), BATCH)]


def forward(model: Pooled, batches: list[Tensor], *, threads: int) -> None:
    """Run a network on batches, one after the other on each thread."""

    def compute(batch: Tensor) -> Tensor:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return model(normalise(batch, SIZE)[:, 0])

    calls = ((lambda batch=batch: compute(batch)) for batch in batches)
    for _ in ahead(calls, workers=threads if threads > 1 else 0, prefetch=2 * threads):
        pass


def report(speeds: dict[str, list[float]], out: Path | None) -> None:
    rows = {}
    print(f"{'':20}{'pictures/s':>12}{'quartiles':>18}")
    for name, found in speeds.items():
        low, middle, high = np.percentile(found, [25, 50, 75])
        rows[name] = {"pictures_per_s": round(middle), "quartiles": [round(low), round(high)]}
        print(f"{name:20}{middle:>12.0f}{f'{low:.0f}-{high:.0f}':>18}")
    share = float(np.median([made / bare for made, bare in zip(*speeds.values())]))
    print(f"features create has {share:.3f} of the forward alone (median of rounds)")
    if out:
        write_results(out, {"features": rows | {"of_forward": round(share, 3)}})


if __name__ == "__main__":
    main()
