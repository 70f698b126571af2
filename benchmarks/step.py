"""What a step of preset a costs: ours, the same by a bare loop of PyTorch, and the published recipe's three forwards.

    python -m benchmarks.step [--sizes 112 299] [--batch 24] [--rounds 7] [--backbone inception_v3] [--out FILE]

ours        the masked batch by the engine: augmentation, sums, losses, DeepSpeed, clipping, the numbers read
bare        the same model, augmentation and losses in ten lines: loss, backward, clip, step
three       `data.sampling per_task`: a batch and a forward pass for every task, by the engine; as many rows of each
            task as the others have in all

On one rank of a CPU; inputs are noise, and labels are missing as in the challenge's set. The contenders take a step
each in turn; ratios are medians over rounds. Images a second count the rows that go through the network: three passes
have three times as many for the same number of labels that count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.balancing import make_batch, no_counts
from benchmarks.loader import write_results
from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import build_preparation
from mtl_dist.families import FAMILIES
from mtl_dist.models import build_model
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.presets import load_preset
from mtl_dist.tasks import TASKS, Batch
from mtl_dist.training.draws import draw_passes
from mtl_dist.training.engine import build_engine, build_optimizer, restore_optimizer
from mtl_dist.training.pending import Pending
from mtl_dist.training.step import train_step

OURS, BARE, THREE = "ours", "bare", "three"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[112, 299], help="pixels a side of what the model reads"
    )
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backbone", default="inception_v3")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    try:
        for size in args.sizes:
            found[str(size)] = measure(size, args)
    finally:
        dist.destroy_process_group()
    if args.out:
        write_results(args.out, {"batch": args.batch, "backbone": args.backbone, "sizes": found})


def measure(size: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Let the contenders take turns at images of one size; print and return their medians."""
    steps = {
        OURS: engine_step(make_config(size, args)),
        BARE: bare_step(make_config(size, args)),
        THREE: engine_step(make_config(size, args, sampling="per_task")),
    }
    rounds = [{name: seconds_of(step) for name, step in steps.items()} for _ in range(args.rounds + 1)][1:]
    print(f"{size} pixels, {args.batch} rows")
    found = {}
    for name in steps:
        seconds = statistics.median(took[name] for took in rounds)
        ratio = statistics.median(took[name] / took[BARE] for took in rounds)
        rows = args.batch * (len(TASKS) if name == THREE else 1)
        found[name] = {"step_s": seconds, "times_bare": ratio, "images_per_s": rows / seconds}
        print(f"  {name:8}{1000 * seconds:8.0f} ms  {ratio:.3f} of bare  {rows / seconds:7.1f} images/s")
    return found


def make_config(size: int, args: argparse.Namespace, *, sampling: str = "masked") -> Config:
    own = {
        "model": {"image_size": size, "backbone": args.backbone, "weights": "none"},
        "data": {"sampling": sampling},
        "train": {"global_batch": args.batch},
        "engine": {"threads": 1, "device": "cpu"},
        "loss": {"gradients_every": None},
    }
    return build_config(load_preset("a"), own)


def make_module(config: Config) -> ObjectiveModule:
    passes = len(TASKS) if config.data.sampling == "per_task" else 1
    model = build_model(config.model, input_size=config.input_size)
    shared = FAMILIES[config.model.name].shared
    return ObjectiveModule(model, Affect(config.loss, no_counts()), passes=passes, shared=shared)


def engine_step(config: Config) -> Callable[[int], None]:
    """Return a function that takes the step of a number as training does."""
    module = make_module(config)
    engine = build_engine(module, config, num_ranks=1, device=torch.device("cpu"))
    restore_optimizer(engine, config, {}, steps=0)
    prepare, batch = build_preparation(config), make_batch(config)
    if module.passes > 1:
        batch = for_each_task(batch)

    def step(number: int) -> None:
        loss = train_step(engine, batch, config, prepare=prepare, epoch=0, step=number, rank=0)
        [float(value) for value in Pending(loss).read().terms.values()]

    return step


def bare_step(config: Config) -> Callable[[int], None]:
    """Return the same without the engine, and without what many ranks and micro-batches need."""
    module = make_module(config)
    optimizer, objective = build_optimizer(module, config), module.objective
    prepare, batch = build_preparation(config), make_batch(config)

    def step(number: int) -> None:
        draws = draw_passes(prepare, batch.rows, seed=0, epoch=0, passes=1)
        sums = objective.sums(module.model(prepare(batch, draws), batch.valid), batch)
        losses = [objective.loss(term, total) for term, total in sums.items()]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        [float(loss.detach()) for loss in losses]

    return step


def for_each_task(batch: Batch) -> Batch:
    """Return a batch three times, each with the labels of one task."""
    batch = batch.take(torch.arange(len(batch.samples)).repeat(len(TASKS)))
    for task, places in zip(TASKS, torch.arange(len(batch.samples)).chunk(len(TASKS))):
        batch.labels.keep_own(task, places.numpy())
    return batch


def seconds_of(step: Callable[[int], None]) -> float:
    begun = time.perf_counter()
    step(1)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
