"""Every method on the synthetic set, over several seeds, and the page that compares them: what `make results` runs.

    python -m benchmarks.comparators [--dir results] [--seeds 3] [--out FILE]

Faces are rendered and made into shards; the baseline, B and A on both views are trained by the same command on the same
shards, a process for every core; the two views of A are ensembled seed by seed; `mtl_dist.report` writes the page. The
baseline's convolutions are trained on the expressions of other rendered people first (the challenge's were VGG-Face's)
and frozen then. Interrupted, it continues; finished, it tells its results again. The time it tells, of the clock and of
the processor, is that of all calls up to the page, as <dir>/spent.json counts it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.loader import write_results
from mtl_dist.errors import run_command
from mtl_dist.machine import num_cpus
from mtl_dist.processes import with_parent
from mtl_dist.progress import progress_bar
from mtl_dist.storage import atomic_path

NUM_TRAIN, NUM_VAL, EPOCHS = 3000, 1200, 12
PRETRAIN_ROWS, PRETRAIN_EPOCHS, PRETRAIN_SEED = 2000, 10, 100
SPENT = ("seconds", "cpu_seconds", "calls")
SHOWN = ("scores", "differences", "runs", "steps_1")  # tables of the page that go into the JSON


class Method(NamedTuple):
    preset: str
    view: str


METHODS = {
    "baseline": Method("small-baseline", "cropped_aligned"),
    "b": Method("small-b", "cropped_aligned"),
    "cropped": Method("small", "cropped"),
    "cropped_aligned": Method("small", "cropped_aligned"),
}
MEMBERS = ("cropped", "cropped_aligned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rows", type=int, nargs=2, default=(NUM_TRAIN, NUM_VAL), metavar=("TRAIN", "VAL"))
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds, args.epochs, *args.rows]):
        make_page(args)
    tables = {path.stem: read_table(path) for path in sorted((args.dir / "report" / "tables").glob("*.csv"))}
    spent = read_spent(args.dir / "spent.json")
    print(markdown(tables["scores"]))
    calls = f", in {spent['calls']} calls" if spent["calls"] > 1 else ""
    took = f"{spent['seconds'] / 60:.0f} min, {spent['cpu_seconds'] / 60:.0f} min of processor time{calls}"
    print(f"\n{args.dir / 'report' / 'report.html'}\nin {took}")
    if args.out:
        shown = {name: tables[name] for name in SHOWN if name in tables}
        about = {"rows": args.rows, "epochs": args.epochs} | {name: round(spent[name]) for name in SPENT}
        write_results(args.out, about | {"tables": shown})


def make_page(args: argparse.Namespace) -> None:
    """Do what is not done yet, from the faces to the page."""
    runs = args.dir / "runs"
    make_sets(args.dir, *args.rows)
    seeds = range(args.seeds)
    # What the baseline's convolutions come from is one more training beside the others, before the baseline's own.
    first = [("pretrained", pretrain_args(args.dir, runs))]
    first += [job(args.dir, runs, name, seed, args.epochs) for seed in seeds for name in METHODS if name != "baseline"]
    run_all("training", first, args.dir / "logs")
    baselines = [job(args.dir, runs, "baseline", seed, args.epochs) for seed in seeds]
    run_all("training the baseline", baselines, args.dir / "logs")
    ensembles = [args.dir / f"ensemble-{seed}" for seed in seeds]
    commands = [
        ["mtl_dist.ensemble", "--runs", *(f"{runs}/{name}-{seed}" for name in MEMBERS), "--out", str(out)]
        for seed, out in zip(seeds, ensembles)
    ]
    run_all("ensembles", [(out.name, command) for out, command in zip(ensembles, commands)], args.dir / "logs")
    page = ["mtl_dist.report", *(f"{runs}/{name}-{seed}" for name in METHODS for seed in seeds)]
    page += ["--ensemble", *map(str, ensembles), "--out", str(args.dir / "report")]
    run_all("the page", [("report", page)], args.dir / "logs")


@contextlib.contextmanager
def timed(path: Path, *, of: list[int]) -> Iterator[None]:
    """Add the time of a block, with that of its processes, to what `path` counts; nothing once that is finished.

    The time of a call that was killed with -9 is lost; it counts as a call.
    """
    spent, begun, cpu_begun = read_spent(path), time.monotonic(), cpu_seconds()
    if spent["finished"] == of:
        yield
        return
    spent |= {"calls": spent["calls"] + 1, "finished": None}
    write_spent(path, spent)
    try:
        yield
        spent["finished"] = of
    finally:
        spent["seconds"] += time.monotonic() - begun
        spent["cpu_seconds"] += cpu_seconds() - cpu_begun
        write_spent(path, spent)


def cpu_seconds() -> float:
    """Return the processor time of this process and of all that it started and that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def write_spent(path: Path, spent: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(spent) + "\n")


def read_spent(path: Path) -> dict[str, Any]:
    """Return the time of all calls so far, and what they finished: [seeds, epochs, rows of training and validation]."""
    return json.loads(path.read_text()) if path.exists() else dict.fromkeys(SPENT, 0) | {"finished": None}


def make_sets(directory: Path, num_train: int, num_val: int) -> None:
    """Render the faces, and other people's for the baseline's convolutions, and make shards of them."""
    pretrain_rows = min(PRETRAIN_ROWS, num_train)
    for name, rows, seed in (
        ("faces", (num_train, num_val), 0),
        ("others", (pretrain_rows, max(pretrain_rows // 5, 24)), PRETRAIN_SEED),
    ):
        synth = ["mtl_dist.shards", "synth", str(directory / name), "--seed", str(seed)]
        synth += ["--num-train", str(rows[0]), "--num-val", str(rows[1])]
        create = ["mtl_dist.shards", "create", str(directory / name), str(directory / "shards" / name)]
        for step, command in (("render", synth), ("create", [*create, "--frames-per-shard", "128"])):
            run_all(f"{step} {name}", [(f"{step}-{name}", command)], directory / "logs")


def pretrain_args(directory: Path, runs: Path) -> list[str]:
    shards = directory / "shards" / "others" / "cropped_aligned"
    command = train_args(runs, "pretrained", "small-baseline", shards)
    command += ["--model.no-freeze-backbone", "--loss.va", "0", "--loss.au", "0"]
    return [*command, "--train.epochs", str(PRETRAIN_EPOCHS), "--train.eval-every", str(PRETRAIN_EPOCHS)]


def job(directory: Path, runs: Path, name: str, seed: int, epochs: int) -> tuple[str, list[str]]:
    method = METHODS[name]
    command = train_args(runs, f"{name}-{seed}", method.preset, directory / "shards" / "faces" / method.view)
    command += ["--run.seed", str(seed), "--train.epochs", str(epochs), "--train.eval-every", "2"]
    if name == "baseline":
        command += ["--model.weights", str(runs / "pretrained")]
    return f"{name}-{seed}", command


def train_args(runs: Path, run: str, preset: str, shards: Path) -> list[str]:
    command = ["mtl_dist.train", "--local", "--preset", preset, "--run.storage", str(runs), "--run.name", run]
    return [*command, "--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--engine.threads", "1"]


def run_all(what: str, commands: list[tuple[str, list[str]]], logs: Path) -> None:
    """Run commands, as many at once as there are cores; their logs are added to. The first failure ends everything."""
    logs.mkdir(parents=True, exist_ok=True)
    with progress_bar(what, len(commands)) as advance, ThreadPoolExecutor(num_cpus()) as pool:
        waiting = [pool.submit(run_one, command, logs / f"{name}.log") for name, command in commands]
        try:
            for finished in as_completed(waiting):
                finished.result()
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_one(command: list[str], log: Path) -> None:
    with log.open("a") as file:
        file.write("$ " + shlex.join(["python", "-m", *command]) + "\n")
        file.flush()
        done = subprocess.run(with_parent([sys.executable, "-m", *command]), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"error: '{shlex.join(command[:2])}' ended with {done.returncode}; what it said is in {log}")


def read_table(path: Path) -> list[list[str]]:
    """Read a table of the page: its head, then its rows."""
    with path.open(newline="") as file:
        return list(csv.reader(file))


def markdown(table: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])


if __name__ == "__main__":
    run_command(main)
