"""How torch's threads wait for each other, alone and beside one busy process: images/s of the `small` model.

    python -m benchmarks.threads [--rounds 3] [--seconds 4]

Forward and backward of batches of 24. Every figure is a process of its own, because OpenMP reads its environment when
torch is imported; the cells are taken in turn, and the median of the rounds is told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from mtl_dist.processes import with_parent

CELLS = ((1, "passive"), (2, "active"), (2, "passive"))  # threads, OMP_WAIT_POLICY
BATCH = 24
BUSY = "while True: pass"
MEASURE = f"""
import sys, time
import mtl_dist, torch
from mtl_dist.config import build_config
from mtl_dist.models import build_model
from mtl_dist.presets import load_preset
torch.set_num_threads(int(sys.argv[1]))
config = build_config(load_preset("small"))
size = config.input_size
model = build_model(config.model, seed=0, input_size=size).train()
inputs, valid = torch.rand({BATCH}, 1, 3, size, size), torch.ones({BATCH}, 1, dtype=torch.bool)
def step():
    sum(output.sum() for output in model(inputs, valid)).backward()
step()
begun, steps = time.monotonic(), 0
while time.monotonic() - begun < float(sys.argv[2]):
    step()
    steps += 1
print(steps * {BATCH} / (time.monotonic() - begun))
"""


def measure(threads: int, policy: str, *, seconds: float) -> float:
    """Return images/s of one process."""
    env = {**os.environ, "OMP_WAIT_POLICY": policy}
    command = with_parent([sys.executable, "-c", MEASURE, str(threads), str(seconds)])
    return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    for where in ("alone", "beside a busy process"):
        busy = subprocess.Popen(with_parent([sys.executable, "-c", BUSY])) if where != "alone" else None
        try:
            rounds = [[measure(*cell, seconds=options.seconds) for cell in CELLS] for _ in range(options.rounds)]
        finally:
            if busy:
                busy.kill()
                busy.wait()
        for (threads, policy), values in zip(CELLS, zip(*rounds, strict=True), strict=True):
            told = ", ".join(f"{value:.1f}" for value in values)
            print(
                f"{where}: {threads} thread(s), {policy}: {statistics.median(values):.1f} images/s ({told})", flush=True
            )


if __name__ == "__main__":
    main()
