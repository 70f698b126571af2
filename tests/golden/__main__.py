"""Write the golden values and formats: see the package's own words."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import tests.golden
from tests.conftest import run_module

NUM_TRAIN, NUM_VAL = 48, 24
# The instructions a processor may have: torch's own kernels, oneDNN's and MKL's.
INSTRUCTIONS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=tests.golden.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("values", "formats", "spread", "measure"))
    parser.add_argument("--out", type=Path, help="of measure: a file for the values")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if args.what == "formats":
            write_formats(scratch)
        elif args.what == "spread":
            print_spread(scratch)
        else:
            from tests.golden.worlds import VALUES, measure

            text = json.dumps(measure(scratch), indent=1, allow_nan=False)
            (args.out or VALUES).write_text(text + "\n")


def print_spread(scratch: Path) -> None:
    from tests.golden.worlds import VALUES, distances

    for name, environment in INSTRUCTIONS.items():
        out = scratch / f"{name}.json"
        command = [sys.executable, "-m", "tests.golden", "measure", "--out", str(out)]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        print(name, json.dumps(distances(json.loads(out.read_text()), json.loads(VALUES.read_text()))), flush=True)


def write_formats(scratch: Path) -> None:
    """Make a set, two runs and an export as a user does, and pack them: weights of two values each compress well."""
    run("mtl_dist.shards", "synth", scratch / "faces", "--num-train", NUM_TRAIN, "--num-val", NUM_VAL)
    root = scratch / "made"
    run("mtl_dist.shards", "create", scratch / "faces", root / "shards", "--frames-per-shard", "24")
    write_backbone(scratch / "backbone.safetensors")
    for view, epochs in (("cropped", "2"), ("cropped_aligned", "1")):
        command = ["--local", "--preset", "small-baseline", "--run.storage", root / "runs", "--run.name", view]
        command += ["--data.train", root / "shards" / view / "train", "--data.val", root / "shards" / view / "val"]
        command += [
            "--model.weights",
            scratch / "backbone.safetensors",
            "--model.hidden",
            "8",
            "--train.epochs",
            epochs,
        ]
        command += ["--data.image-size", "80", "--engine.device", "cpu", "--engine.threads", "1"]
        run("mtl_dist.train", *command, "--checkpoint.keep-last", "2")
    run("mtl_dist.export", root / "runs" / "cropped", "--out", root / "exported")
    predicted = root / "predicted.csv"
    run(
        "mtl_dist.predict",
        "--runs",
        root / "runs" / "cropped",
        "--input",
        root / "shards/cropped/val",
        "--out",
        predicted,
    )
    members = [root / "runs" / view for view in ("cropped", "cropped_aligned")]
    run("mtl_dist.ensemble", "--runs", *members, "--out", root / "ensemble", "--folds", "2", "--local")
    pack(root, Path(tests.golden.__file__).parent / "formats" / f"{datetime.date.today()}.tar.xz")


def write_backbone(path: Path) -> None:
    """A backbone whose every tensor has two values, or one."""
    from mtl_dist.config import build_config
    from mtl_dist.models import build_model
    from mtl_dist.presets import load_preset

    config = build_config(load_preset("small-baseline"))
    state = build_model(config.model, seed=0, input_size=80).backbone.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            state[name] = torch.sign(tensor) * float(np.float32(tensor.std()))
    save_file(state, path)


def pack(root: Path, archive: Path) -> None:
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            entry = tar.gettarinfo(path, path.relative_to(root).as_posix())
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") as file:
                tar.addfile(entry, file)
    print(f"{archive}: {archive.stat().st_size:,} bytes")


def run(*args: object) -> None:
    done = run_module(*map(str, args))
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
