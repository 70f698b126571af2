"""How long a checkpoint keeps training waiting: preset a's weights with AdamW's state, to a real S3 server.

    python -m benchmarks.saving [--rounds 5]

Training is stood in for by matrix products on the same cores; the share of a save's wall time that `Saver.save` blocks,
and what a product takes while a save is under way beside what it takes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.loader import write_results
from mtl_dist import storage
from mtl_dist.config import build_config
from mtl_dist.models import build_model
from mtl_dist.presets import load_preset
from mtl_dist.runs.checkpoint import COMMIT, committed
from mtl_dist.runs.lives import begin_life
from mtl_dist.sections import CheckpointConfig
from mtl_dist.training.saving import Saver
from tests.s3_server import BUCKET, S3Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = build_config(load_preset("a"), {"model": {"weights": "none"}}).model
    weights = build_model(config, seed=0).state_dict()
    moments = {f"optimizer/{key}/{n}": t.clone() for n, t in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-bench-") as scratch, S3Server(Path(scratch)) as server:
        os.environ.update(server.env)
        run = f"s3://{BUCKET}/run"
        alone = [measure_product() for _ in range(50)]
        beside = []
        life = begin_life(run, launcher="benchmark", num_ranks=1)
        with Saver(run, CheckpointConfig(keep_last=args.rounds), life=life) as saver:
            for step in range(1, args.rounds + 1):
                state = {"step": step}
                saver.save(weights, moments, begun=time.monotonic(), state=state, scores={}, records={})
                while not saver.is_idle():
                    beside.append(measure_product())
        commits = [json.loads(storage.read_bytes(storage.join(c.uri, COMMIT))) for c in committed(run)[0]]
    dist.destroy_process_group()
    megabytes = sum(about["bytes"] for about in commits[0]["files"].values()) / 1e6
    blocked, took = (statistics.median(commit[key] for commit in commits) for key in ("blocked_s", "save_s"))
    slower = statistics.median(beside) / statistics.median(alone)
    print(f"{megabytes:.0f} MB: the loop waits {blocked:.3f} s of {took:.2f} s ({blocked / took:.1%})")
    print(f"a product beside a save takes {slower:.2f} times one alone")
    if args.out:
        figures = {
            "megabytes": round(megabytes),
            "blocked_s": blocked,
            "save_s": took,
            "product_beside": round(slower, 3),
        }
        write_results(args.out, figures)


def measure_product() -> float:
    matrix = torch.ones(600, 600)
    begun = time.perf_counter()
    for _ in range(3):
        matrix = matrix @ matrix
        matrix /= matrix.max()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
