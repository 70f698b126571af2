"""What balancing costs: an optimizer step by every balancer beside one with fixed weights, in turns in one run.

    python -m benchmarks.balancing [--preset small] [--batch 24] [--rounds 9] [--out FILE]

Steps of the model as trained, DeepSpeed's engine and augmentation included, on one rank and one thread; inputs are
noise, and labels are missing as in the challenge's set. "looked at" is fixed weights in the steps whose gradients are
recorded, which is one in `loss.gradients_every`. Ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from benchmarks.loader import write_results
from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import build_preparation
from mtl_dist.families import FAMILIES
from mtl_dist.label_counts import LabelCounts
from mtl_dist.models import build_model
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.presets import load_preset
from mtl_dist.sections import GradientBalancing, LossConfig
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Batch, Labels
from mtl_dist.training.engine import build_engine, restore_optimizer
from mtl_dist.training.step import train_step

PLAIN, LOOKED_AT = "fixed", "fixed, looked at"
SHARES = {"va": 0.7, "expr": 0.6, "au": 0.7}  # of rows that have labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kinds = [PLAIN, LOOKED_AT, "uncertainty", "dwa", "famo", *get_args(GradientBalancing)]
    made = {kind: Stepper(kind, args.preset, args.batch) for kind in kinds}
    rounds = [{kind: stepper.measure() for kind, stepper in made.items()} for _ in range(args.rounds + 1)][1:]
    dist.destroy_process_group()
    ratios = {kind: statistics.median(took[kind] / took[PLAIN] for took in rounds) for kind in kinds}
    seconds = statistics.median(took[PLAIN] for took in rounds)
    print(
        f"preset {args.preset}, {args.batch} images: a step with fixed weights takes {1000 * seconds:.0f} ms; beside it"
    )
    for kind, ratio in ratios.items():
        print(f"  {kind:20}{ratio:.3f}")
    if args.out:
        write_results(args.out, {"preset": args.preset, "batch": args.batch, "step_s": seconds, "ratios": ratios})


class Stepper:
    """Steps of one way of balancing, each of the same batch."""

    def __init__(self, kind: str, preset: str, batch: int):
        loss = {"balancing": kind.partition(",")[0], "gradients_every": 1 if kind == LOOKED_AT else None}
        own = {"train": {"global_batch": batch}, "engine": {"threads": 1}, "loss": loss}
        self.config = config = build_config(load_preset(preset), own)
        model = build_model(config.model, input_size=config.input_size)
        objective = Affect(LossConfig(), no_counts())
        shared = FAMILIES[config.model.name].shared
        module = ObjectiveModule(model, objective, balancing=config.loss.balancing, shared=shared)
        self.engine = build_engine(module, config, num_ranks=1, device=torch.device("cpu"))
        restore_optimizer(self.engine, config, {}, steps=0)
        self.prepare, self.batch, self.step = build_preparation(config), make_batch(config), 0

    def measure(self) -> float:
        """Return the seconds of a step."""
        begun = time.perf_counter()
        where = {"epoch": 0, "step": self.step, "rank": 0}
        train_step(self.engine, self.batch, self.config, prepare=self.prepare, **where)
        self.step += 1
        return time.perf_counter() - begun


def make_batch(config: Config) -> Batch:
    size, side = config.train.global_batch, config.data.image_size
    g = torch.Generator().manual_seed(0)
    va, expr, au = (torch.rand(size, 1, generator=g) < share for share in SHARES.values())
    labels = Labels(
        torch.rand(size, 1, 2, generator=g) * 2 - 1,
        torch.randint(NUM_EXPRESSIONS, (size, 1), generator=g),
        torch.randint(2, (size, 1, NUM_AUS), generator=g).float(),
        *(va, expr, au[..., None].expand(-1, -1, NUM_AUS).clone()),
    )
    inputs = torch.randint(256, (size, 1, 3, side, side), generator=g, dtype=torch.uint8)
    rows = torch.arange(size)
    return Batch(inputs, torch.ones(size, 1, dtype=torch.bool), labels, rows[:, None], rows)


def no_counts() -> LabelCounts:
    none = {"expr_classes": [0] * NUM_EXPRESSIONS, "au_positives": [0] * NUM_AUS}
    return LabelCounts(rows=0, va=0, expr=0, au=[0] * NUM_AUS, unlabelled=0, **none)


if __name__ == "__main__":
    main()
