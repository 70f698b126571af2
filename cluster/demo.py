"""The whole system on this machine in a few minutes: what `make demo` runs.

An S3 server and a Ray cluster of two hosts come up; a set of faces (rendered, or yours with --data) becomes shards in
s3://; a small search finds loss weights and a learning rate; both views are trained by `ray job submit`; the ensemble
job writes the challenge score. Every command is printed, so that you can run it yourself.

Interrupted, it continues where it stopped; finished, it starts anew.

Examples:
    python -m cluster.demo
    python -m cluster.demo --data /data/s-Aff-Wild2
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.local import ClusterState, LocalCluster, down
from cluster.processes import ClusterError
from mtl_dist.errors import InputError, plain_refusals, run_command
from mtl_dist.processes import with_parent
from mtl_dist.shards.annotations import FILES, read_annotations
from mtl_dist.tasks import VIEWS

PROG = "python -m cluster.demo"
DEMO_DIR = Path("demo")
RENDERED_FACES = "rendered faces"
BUCKET = "s3://mtl"
RESULTS = ("score.json", "predictions.parquet", "calibrated.parquet", "table.txt")
NUM_HOSTS, CPUS_PER_HOST = 2, 4  # logical CPUs: room for trial drivers beside ranks, whatever the machine has

# Not its warnings: one may say that a setting is ignored.
RAY_SPEAKS = (
    "\tINFO ", "\tSUCC ", "(PlacementGroupCleaner", "Running entrypoint", "[Gloo]", "core_worker.cc",
    "Found credentials", "Found endpoint", "(raylet",
)  # fmt: skip


JOB_FAILED = re.compile(r"Job '\S+' failed")  # of `ray job submit`, at its end
REASON = re.compile(r"^(?:\([^)]*\) )?((?:error: |[\w.]*(?:Error|Exception|Killed|Died)\b[^:]{0,40}: ).+?)\s*$")


class StepFailed(Exception):
    """A command of the demo failed; the message says which, why, and where its output is."""

    def __init__(self, title: str, code: int, log: Path):
        reason = find_reason(log.read_text(errors="replace").splitlines())
        super().__init__(f"'{title}' failed with exit code {code}{reason and f' ({reason})'}; its output is in {log}")
        self.code = code


class Step(NamedTuple):
    title: str
    seconds: float  # measured on 2 cores; only the bar's guess of what is left depends on it
    command: list[str]
    is_job: bool  # through `ray job submit`


class Recipe(NamedTuple):
    """Training settings that suit the data's size."""

    epochs: int
    batch: int
    eval_every: int
    search_epochs: int
    train_seconds: float


IMAGES_BUDGET = 9000  # that one training of someone's own data may see: about a minute on 2 cores
RENDERED = Recipe(epochs=12, batch=16, eval_every=4, search_epochs=2, train_seconds=100)


def plan_recipe(data: Path | None) -> Recipe:
    """Train on the rendered faces as their size wants; on other data for as many epochs as the budget allows."""
    if data is None:
        return RENDERED
    num_rows = len(read_annotations(data / FILES["train"]).images)
    epochs = max(1, min(60, IMAGES_BUDGET // num_rows))
    return Recipe(epochs, 16, max(1, epochs // 3), max(1, epochs // 6), 60 * max(1, num_rows / IMAGES_BUDGET))


@dataclass(frozen=True)
class DemoCommand:
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Data set in the s-Aff-Wild2 layout; None: rendered faces."""


def main(args: list[str] | None = None) -> None:
    with plain_refusals(PROG):
        command = tyro.cli(DemoCommand, args=args, prog=PROG, description=__doc__)
    recipe = plan_recipe(command.data)
    demo = DEMO_DIR / (command.data.resolve().name if command.data else "rendered")
    begin(demo, of=str(command.data.resolve()) if command.data else RENDERED_FACES)
    source = command.data or demo / "faces"
    console = Console(highlight=False)
    begun = time.monotonic()
    try:
        run_steps(console, demo, plan_steps(source, recipe, render=command.data is None))
    except (StepFailed, ClusterError) as error:
        print(f"error: {error}\nWhat is finished is kept: the same command continues.", file=sys.stderr)
        sys.exit(error.code if isinstance(error, StepFailed) else 1)
    finish(console, demo, command.data, time.monotonic() - begun)


def run_steps(console: Console, demo: Path, steps: list[Step]) -> None:
    """Run the steps on a cluster of their own, which is ended in any case."""
    cluster_dir = demo / "cluster"
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=sum(step.seconds for step in steps) + 10, left="")
        show = Display(console, progress, bar, len(steps) + 2)
        show.begin("starting an S3 server and a Ray cluster of 2 hosts", 10, steps)
        try:
            down(cluster_dir)  # of an interrupted demo
            with LocalCluster(cluster_dir, hosts=NUM_HOSTS, cpus_per_host=CPUS_PER_HOST) as cluster:
                for number, step in enumerate(steps):
                    show.begin(step.title, step.seconds, steps[number + 1 :])
                    run_step(step, cluster, show, demo / "logs" / f"{number + 1}-{step.title.replace(' ', '-')}.log")
                copy_results(cluster, demo / "results")
        finally:
            show.begin("stopping the cluster", 2, [])
            down(cluster_dir)
        progress.update(bar, completed=progress.tasks[0].total, left="")


def begin(demo: Path, *, of: str) -> None:
    """Start anew after a demo that finished; keep what an interrupted one has. Another data set's are left alone."""
    note = demo / "data.txt"
    if note.exists() and (other := note.read_text().strip()) != of:
        raise InputError(
            f"{demo} holds the demo of {other}, and this one is of {of}: move or remove {demo}, or rename the data"
        )
    if (demo / "results" / "score.json").exists():
        down(demo / "cluster", purge=True)
        for name in ("cluster", "results", "logs"):
            shutil.rmtree(demo / name, ignore_errors=True)
    demo.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{of}\n")


def plan_steps(source: Path, recipe: Recipe, *, render: bool) -> list[Step]:
    """Return the commands of the demo; those of one's own data and cluster are the same."""
    python = [sys.executable, "-m"]
    sets = {
        view: [f"--data.train={BUCKET}/faces/{view}/train", f"--data.val={BUCKET}/faces/{view}/val"] for view in VIEWS
    }
    common = ["--run.storage", f"{BUCKET}/runs", "--train.global-batch", str(recipe.batch)]
    steps = []
    if render:
        synth = [*python, "mtl_dist.shards", "synth", str(source), "--num-train", "1500", "--num-val", "600"]
        steps.append(Step("rendering faces", 20, synth, False))
    create = [*python, "mtl_dist.shards", "create", str(source), f"{BUCKET}/faces", "--frames-per-shard", "128"]
    steps.append(Step("writing shards", 4, create, False))
    # Trials are compared when all have run to their end: which one wins must not depend on which was faster.
    search_epochs = str(recipe.search_epochs)
    search = ["tune.search", "--preset", "small", "--search.name", "search", "--search.trials", "3"]
    search += ["--search.concurrent", "2", "--search.grace-epochs", search_epochs, "--train.epochs", search_epochs]
    search += ["--train.eval-every", search_epochs, *common, *sets["cropped_aligned"]]
    steps.append(Step("searching", 90, ["python", "-m", *search], True))
    for view in VIEWS:
        train = ["mtl_dist.train", "--config", f"{BUCKET}/runs/search/best.yaml", "--run.name", view]
        train += ["--train.epochs", str(recipe.epochs), "--train.eval-every", str(recipe.eval_every)]
        train += [
            "--checkpoint.every-steps",
            "500",
            "--ray.num-ranks",
            "2",
            "2",
            "--ray.placement",
            "SPREAD",
            *common,
            *sets[view],
        ]
        steps.append(Step(f"training {view}", recipe.train_seconds, ["python", "-m", *train], True))
    ensemble = [
        "mtl_dist.ensemble",
        "--runs",
        *(f"{BUCKET}/runs/{view}" for view in VIEWS),
        "--out",
        f"{BUCKET}/runs/ensemble",
    ]
    steps.append(Step("ensembling", 20, ["python", "-m", *ensemble], True))
    return steps


class Display:
    """The bar, the headings, and what the running command prints."""

    def __init__(self, console: Console, progress: Progress, bar, num_steps: int):
        self.console, self.progress, self.bar, self.num_steps = console, progress, bar, num_steps
        self.number = 0

    def begin(self, title: str, seconds: float, later: list[Step]) -> None:
        self.number = min(self.number + 1, self.num_steps)
        self.begun, self.seconds, self.later_s = time.monotonic(), seconds, sum(step.seconds for step in later)
        self.heading = f"[{self.number}/{self.num_steps}] {title}"
        left = self._advance()
        self.console.print(f"\n{self.heading} (about {left:.0f} s left)", markup=False, style="bold")

    def line(self, text: str) -> None:
        self._advance()
        self.console.print(f"  {text}", markup=False, soft_wrap=True, style="dim")

    def _advance(self) -> float:
        """Move the bar by the clock within a step, never past its guess; returns the seconds left."""
        left = max(self.seconds - (time.monotonic() - self.begun), 0) + self.later_s
        done = self.progress.tasks[0].total - left
        self.progress.update(self.bar, completed=done, description=self.heading, left=f"about {left:.0f} s left")
        return left


def run_step(step: Step, cluster: ClusterState, show: Display, log: Path) -> None:
    """Run one command, showing and keeping what it prints. Raises `StepFailed` where it fails."""
    command = step.command
    if step.is_job:
        submit = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--working-dir",
            ".",
            "--log-color",
            "false",
            "--",
        ]
        show.line("$ ray job submit --working-dir . -- " + shlex.join(command))
        command = [*submit, *command]
    else:
        show.line("$ " + shlex.join(["python", *command[1:]]))
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **cluster.client_env(), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file, subprocess.Popen(
        with_parent(command), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        try:
            is_over = False
            for text in process.stdout:
                file.write(text)
                is_over |= JOB_FAILED.match(text) is not None  # what follows repeats the last lines
                if not is_over and (shown := readable(text)):
                    show.line(shown)
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        raise StepFailed(step.title, process.returncode, log)


def find_reason(lines: Iterable[str]) -> str:
    """Return the last line that names an error, without Ray's prefix; empty where none does."""
    reasons = [match[1] for line in lines if (match := REASON.search(re.sub(r"\x1b\[[0-9;]*m", "", line)))]
    return reasons[-1][:300] if reasons else ""


def readable(text: str) -> str | None:
    """Strip colours and Ray's prefix from a line; None for what Ray says of itself (the log keeps it)."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    if any(word in text for word in RAY_SPEAKS):
        return None
    return re.sub(r"^\([^)]*pid=[^)]*\) ", "", text) or None


def copy_results(cluster: ClusterState, directory: Path) -> None:
    from mtl_dist import storage

    os.environ.update(cluster.client_env())
    for name in RESULTS:
        storage.download(f"{BUCKET}/runs/ensemble/{name}", directory / name)
    storage.download(f"{BUCKET}/runs/search/best.yaml", directory / "best.yaml")
    storage.download(f"{BUCKET}/runs/search/trials.csv", directory / "trials.csv")


def finish(console: Console, demo: Path, data: Path | None, seconds: float) -> None:
    results = demo / "results"
    report = json.loads((results / "score.json").read_text())
    console.print((results / "table.txt").read_text(), markup=False, soft_wrap=True)
    covers = ", ".join(task.upper() for task in report["covers"])
    console.print(f"challenge score P {report['p']:.4f} (covers {covers}), in {seconds:.0f} s\n", markup=False)
    for name in (*RESULTS, "best.yaml", "trials.csv"):
        console.print(f"  {results / name}", markup=False)
    console.print(
        f"  {demo / 'cluster' / 's3' / 'mtl'}  (shards, runs and checkpoints, as the S3 server keeps them)\n",
        markup=False,
    )
    of_rendered, of_own = (
        "your own data: make demo DATA=/path/to/s-Aff-Wild2",
        "your own bucket and cluster: docs/cluster.md",
    )
    console.print(f"next: {of_rendered if data is None else of_own}", markup=False)


if __name__ == "__main__":
    run_command(main)
