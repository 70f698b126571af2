"""What a GPU makes of it, in one command of at most 8 minutes without a network; on a CPU it shows that it runs.

    python -m benchmarks.gpu [--minutes 8] [--out FILE]
    python -m benchmarks.gpu --device cpu --toy

speed    steps of presets a, b, mae and c at several batches, by the engine: as trained (bf16, TF32), and in plain fp32;
         images (rows of windows) a second, the share of the GPU's peak (MFU), and the most memory. Inputs are noise
learn    preset small on rendered faces, on the device and on the CPU: the losses of both, and the share of time that
         the device's run waited for data
predict  `mtl_dist.predict` on the faces with that run: pictures a second, with the start of the command

FLOPs are counted by torch.utils.flop_counter in one step, backward included (convolutions and matrix products; a
multiplication and an addition are two). The peak is the vendor's for dense products without sparsity, of bf16 in either
column. Of a part that there is no time for, nothing is said; what fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pyarrow.parquet import read_metadata
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.balancing import make_batch, no_counts
from benchmarks.loader import write_results
from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import build_preparation
from mtl_dist.families import FAMILIES, FEATURES
from mtl_dist.models import build_model
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.predict import __main__ as predict
from mtl_dist.presets import load_preset
from mtl_dist.settings import dump_yaml
from mtl_dist.shards import __main__ as shards
from mtl_dist.synthetic.render import write_synthetic
from mtl_dist.tasks import Batch, Labels
from mtl_dist.training.engine import build_engine, restore_optimizer
from mtl_dist.training.loop import fit
from mtl_dist.training.pending import Pending
from mtl_dist.training.precision import set_precision
from mtl_dist.training.step import train_step
from mtl_dist.training.tracking import read_records
from mtl_dist.transfer import pin_batch

# Dense bf16 products a second, of the vendors' data sheets, by a part of the GPU's name.
PEAKS = {"B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
PEAKS |= {"L4": 121e12, "A10": 125e12, "4090": 165e12, "T4": 65e12}
BATCHES = {"a": (24, 96, 256), "b": (24, 96, 256), "mae": (64, 256, 512), "c": (32, 128, 512)}
DIM = 512  # of the features that preset c reads here
WARM_UP, STEPS = 3, 10
CURVE_ROWS, CURVE_EPOCHS = 1200, 4
TOY = {
    "a": {"backbone": "small", "image_size": 80},
    "b": {"backbone": "small", "image_size": 80},
    "mae": {"backbone": "vit_small", "masked": {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}},
    "c": {"sequence": {"hidden": 16, "heads": 2, "ffn": 16, "layers": 1, "head_widths": [8], "window": 8}},
}  # fmt: skip
KINDS = {"ours": {}, "fp32": {"autocast": "none", "tf32": False}}


class Speed(NamedTuple):
    """What steps of one batch were measured at."""

    preset: str
    kind: str
    batch: int
    images_per_s: float
    mfu: float | None  # of the peak; None: of a device whose peak is not known
    memory_gib: float | None


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="as little as shows that it runs")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON, after every part")
    options = parser.parse_args(args)
    end = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device, *([0] if options.device == "cuda" else []))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}", flush=True)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="mtl_dist-gpu-") as directory:
        scratch = Path(directory)
        parts = {
            "learn": lambda: bench_learning(scratch, device, toy=options.toy),
            "predict": lambda: bench_predicting(scratch, device),
            # The last: it takes the time that is left.
            "speed": lambda: bench_speeds(device, end=end, toy=options.toy),
        }
        for name, part in parts.items():
            begun = time.monotonic()
            try:
                results[name] = part()
            except Exception as error:  # the others' figures are wanted all the same
                results[name] = {"failed": f"{type(error).__name__}: {error}"}
                print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
            print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
            if options.out:
                write_results(options.out, results)
    if failed := [name for name in parts if "failed" in results[name]]:
        raise SystemExit(f"failed: {', '.join(failed)}")


# --------------------------------------------------------------------------------------------------------------- speed


def bench_speeds(device: torch.device, *, end: float, toy: bool) -> dict[str, Any]:
    """Measure every preset at every batch, the smallest of all first, until the time is over."""
    found: list[Speed] = []
    print(f"{'preset':8}{'':6}{'batch':>6}{'images/s':>10}{'MFU':>7}{'GiB':>7}")
    places = [(preset, of[place]) for place in range(1 if toy else 3) for preset, of in BATCHES.items()]
    places = [(preset, 4) for preset, _ in places] if toy else places
    with one_rank(device):
        for preset, batch in places:
            for kind in KINDS:
                if time.monotonic() > end:
                    print("no time is left for the other batches")
                    return {"speeds": [speed._asdict() for speed in found]}
                try:
                    speed = measure(preset, kind, batch, device, toy=toy)
                except torch.OutOfMemoryError:
                    print(f"{preset:8}{kind:6}{batch:>6}  out of memory")
                    continue
                found.append(speed)
                mfu = "" if speed.mfu is None else f"{speed.mfu:.1%}"
                memory = "" if speed.memory_gib is None else f"{speed.memory_gib:.2f}"
                print(f"{preset:8}{kind:6}{batch:>6}{speed.images_per_s:>10.0f}{mfu:>7}{memory:>7}", flush=True)
    return {"speeds": [speed._asdict() for speed in found]}


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """Be the only rank of a world."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(preset: str, kind: str, batch_size: int, device: torch.device, *, toy: bool) -> Speed:
    """Take steps of one batch, as training does."""
    config = make_config(preset, kind, batch_size, device, toy=toy)
    set_precision(config, device)
    model, objective = build_model(config.model, input_size=config.input_size), build_objective(config, no_counts())
    module = ObjectiveModule(model, objective, shared=FAMILIES[config.model.name].shared)
    engine = build_engine(module, config, num_ranks=1, device=device)
    restore_optimizer(engine, config, {}, steps=0)
    batch = make_windows(config) if config.model.backbone == FEATURES else make_batch(config)
    batch, prepare = pin_batch(batch, device), build_preparation(config)

    def take(count: int) -> None:
        under_way = None
        for number in range(count):
            loss = Pending(train_step(engine, batch, config, prepare=prepare, epoch=0, step=number + 1, rank=0))
            if under_way:
                under_way.read()
            under_way = loss
        under_way.read()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    take(1 if toy else WARM_UP)
    with FlopCounterMode(display=False) as counter:
        take(1)
    begun = time.perf_counter()
    take(steps := 1 if toy else STEPS)
    seconds = (time.perf_counter() - begun) / steps
    peak = memory = None
    if device.type == "cuda":
        peak = next((peak for part, peak in PEAKS.items() if part in torch.cuda.get_device_name(device)), None)
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    mfu = counter.get_total_flops() / seconds / peak if peak else None
    return Speed(preset, kind, batch_size, int(batch.valid.sum()) / seconds, mfu, memory)


def make_config(preset: str, kind: str, batch: int, device: torch.device, *, toy: bool) -> Config:
    own: dict[str, Any] = {"weights": "none"} | (TOY[preset] if toy else {})
    if preset == "c":
        own = own | {"sequence": own.get("sequence", {}) | {"dims": [DIM]}}
    engine = {"device": device.type, "autocast": "bf16" if device.type == "cuda" else "none"} | KINDS[kind]
    size = {} if preset == "c" else {"image_size": 80 if toy else 112}
    if preset == "mae":
        size = {"image_size": 32 if toy else 224}
    loss = {"loss": {"gradients_every": None}} if preset != "mae" else {}
    layers = {"model": own, "engine": engine, "data": size, "train": {"global_batch": batch}} | loss
    return build_config(load_preset(preset), layers)


def make_windows(config: Config) -> Batch:
    """Return windows of noise, without padding, all labelled."""
    shape = (config.train.global_batch, config.model.sequence.window)
    g = torch.Generator().manual_seed(0)
    there = torch.ones(shape, dtype=torch.bool)
    labels = Labels(
        torch.rand(*shape, 2, generator=g) * 2 - 1,
        torch.randint(8, shape, generator=g),
        torch.randint(2, (*shape, 12), generator=g).float(),
        *(there, there, there[..., None].expand(-1, -1, 12).contiguous()),
    )
    rows = torch.arange(there.numel()).view(shape)
    inputs = torch.randn(*shape, DIM, generator=g).half()
    return Batch(inputs, there, labels, rows, torch.arange(shape[0]))


# --------------------------------------------------------------------------------------------------- learn and predict


class Watched:
    """A run's only rank (`setup.RunContext`), which adds up what the run waited for."""

    rank, num_ranks, launcher, command_line, num_cpus = 0, 1, "benchmarks.gpu", "benchmarks.gpu", os.cpu_count() or 1
    step_s = data_wait_s = 0.0

    def __init__(self, *, has_gpu: bool):
        self.has_gpu = has_gpu

    def publish(self, metrics: dict[str, Any]) -> None:
        pass

    def observe(self, **values: float) -> None:
        self.step_s += values.get("step_s", 0.0)
        self.data_wait_s += values.get("data_wait_s", 0.0)

    def should_stop(self) -> bool:
        return False

    def should_save(self) -> bool:
        return False


def bench_learning(scratch: Path, device: torch.device, *, toy: bool) -> dict[str, Any]:
    """Train small on rendered faces on the device and on the CPU, and put the losses side by side."""
    rows = 24 if toy else CURVE_ROWS
    write_synthetic(scratch / "faces", num_train=rows, num_val=rows // 2, jobs=1 if toy else os.cpu_count() or 1)
    with quiet():
        shards.main(["create", str(scratch / "faces"), str(scratch / "shards"), "--jobs", "1"])
    watched = Watched(has_gpu=device.type == "cuda")
    with one_rank(device), quiet():
        fit(run_config(scratch, device.type, toy=toy), watched)
    names = [device.type]
    if device.type == "cuda":  # in a process of its own: DeepSpeed knows one kind of device
        path = scratch / "cpu.yaml"
        path.write_text(dump_yaml(run_config(scratch, "cpu", toy=toy)))
        command = [sys.executable, "-m", "mtl_dist.train", "--local", "--config", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        names.append("cpu")
    losses = {name: losses_of(scratch / "runs" / name) for name in names}
    for place in range(0, len(losses[names[0]]), max(len(losses[names[0]]) // 8, 1)):
        print(f"  step {place + 1:>5}" + "".join(f"  {name} {of[place]:.4f}" for name, of in losses.items()))
    share = watched.data_wait_s / watched.step_s
    print(f"  waiting for data {share:.1%} of the time on {device.type}")
    return {"losses": losses, "waiting_for_data": share}


def run_config(scratch: Path, device: str, *, toy: bool) -> Config:
    """Return the configuration of the run on a device, which has its name."""
    sets = {split: f"{scratch}/shards/cropped/{split}" for split in ("train", "val")}
    own: dict[str, Any] = {"train": {"epochs": 1 if toy else CURVE_EPOCHS}}
    if toy:
        own = {"train": {"epochs": 1, "global_batch": 8}, "data": {"image_size": 80}}
    where = {"run": {"name": device, "storage": f"{scratch}/runs"}, "engine": {"device": device}, "data": sets}
    return build_config(load_preset("small"), own, where)


def losses_of(run: Path) -> list[float]:
    return [record["loss"]["total"] for record in read_records(str(run)) if record["kind"] == "step"]


def bench_predicting(scratch: Path, device: torch.device) -> dict[str, Any]:
    """Predict the pictures of the set with the run of the device."""
    out, begun = scratch / "predicted.parquet", time.monotonic()
    where = ["--input", f"{scratch}/faces/cropped", "--out", str(out), "--device", device.type]
    with quiet():
        predict.main(["--runs", f"{scratch}/runs/{device.type}", *where])
    count = read_metadata(out).num_rows
    speed = count / (time.monotonic() - begun)
    print(f"  {count} pictures, {speed:.0f} a second with the start of the command")
    return {"pictures": count, "images_per_s": speed}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what commands print from the table; errors come as they are."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
