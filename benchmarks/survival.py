"""What failures cost: rows lost, rows read twice, steps repeated, seconds without a new step.

    python -m benchmarks.survival [--of features] [--only "rank killed" ...] [--out FILE]

A real cluster of three hosts on this machine (network namespaces where this process may make them, an S3 server, Ray),
a run submitted by `ray job submit`, one failure in its middle, each on a run of its own. Rows are counted from
`run.audit_dir`: every step that any process finished. The seconds are the longest time after the failure in which no
step was finished, by all ranks, that is further than any before it: steps done again count as part of the failure.
Of features: they are made over the hosts, and windows of videos take the place of rows.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.loader import write_results
from cluster import faults, parts
from cluster.local import LocalCluster
from cluster.processes import find_processes
from cluster.state import ClusterState
from mtl_dist.data.index import read_sets
from mtl_dist.data.windows import Windows
from mtl_dist.processes import with_parent
from mtl_dist.runs.lives import read_lives
from mtl_dist.training.audit import Report, read_audit
from mtl_dist.training.tracking import read_records

HOSTS = 3
ROWS, EVERY_STEPS = 480, 20
FAIL_AT = 100
HANG_S = 15
S3_AWAY_S = 60
NOTICE_S = 30
TIMEOUT_S = 900.0
REPO = Path(__file__).parent.parent


class Kind(NamedTuple):
    """What is trained on."""

    flags: tuple[str, ...]
    batch: int
    epochs: int
    steps_per_epoch: int

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs


class Outcome(NamedTuple):
    failure: str
    rows_lost: int
    rows_twice: int
    steps_repeated: int
    seconds: float  # without a new step
    ranks: str  # of every start
    loss_difference: float  # of the last epoch's mean, relative to the undisturbed run's


class Run:
    """A run on the cluster, with what its audit and its storage say of it."""

    def __init__(self, cluster: ClusterState, audit: Path, kind: Kind, name: str, *more: str):
        self.cluster, self.audit, self.kind, self.name = cluster, audit, kind, name
        self.uri = f"s3://mtl/runs/{name}"
        self.command = [
            sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(REPO), "--",
            "python", "-m", "mtl_dist.train", *kind.flags, "--run.name", name, "--run.storage", "s3://mtl/runs",
            "--run.audit-dir", str(audit), "--data.cache-dir", str(audit / "cache"),
            "--train.global-batch", str(kind.batch), "--train.epochs", str(kind.epochs), "--train.eval-every", "10",
            "--checkpoint.every-steps", str(EVERY_STEPS),
            "--ray.num-ranks", "1", str(HOSTS), "--ray.placement", "SPREAD", "--ray.resize-every-s", "15", *more,
        ]  # fmt: skip
        self.process: subprocess.Popen | None = None

    def submit(self) -> None:
        log = (self.audit / f"{self.name}.log").open("ab")
        environment = {**os.environ, **self.cluster.client_env()}
        self.process = subprocess.Popen(
            with_parent(self.command), env=environment, stdout=log, stderr=subprocess.STDOUT
        )

    def steps(self) -> list[tuple[float, int]]:
        return self.read_audit().finished_at

    def read_audit(self) -> Report:
        return read_audit(self.audit, self.name, global_batch=self.kind.batch, num_steps=self.kind.num_steps)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: any(found >= step for _, found in self.steps()), f"step {step}")

    def wait(self, is_reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {what} was not reached; see {self.audit / self.name}.log")
            time.sleep(0.5)

    def finish(self) -> None:
        self.wait(lambda: self.process.poll() is not None, "the end of the job")
        if self.process.returncode:
            text = (self.audit / f"{self.name}.log").read_text()
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{text[-3000:]}")

    def ranks(self) -> dict[int, int]:
        """The pid, outside of its host, of every rank of the life that is under way."""
        files = sorted((self.audit / self.name).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        life, pids = files[-1].name.partition("-")[0], {}
        for path in files:
            if path.name.startswith(life):
                _, rank, *_, pid = path.stem.split("-")
                pids[int(rank)] = find_outside(self.cluster, path.stem.split("-", 2)[2].rpartition("-")[0], int(pid))
        return pids

    def outcome(self, failure: str, failed_at: float, undisturbed: float | None) -> Outcome:
        report = self.read_audit()
        news, furthest = [], 0
        for at, step in report.finished_at:
            if step > furthest:
                news.append(at)
                furthest = step
        pauses = [later - earlier for earlier, later in pairwise(news) if later > failed_at]
        ranks = " ".join(str(life["num_ranks"]) for life in read_lives(self.uri))
        loss = self.last_loss()
        difference = 0.0 if undisturbed is None else abs(loss / undisturbed - 1)
        return Outcome(
            failure,
            report.samples_lost,
            report.samples_twice,
            report.steps_repeated,
            max(pauses),
            ranks,
            difference,
        )

    def last_loss(self) -> float:
        records = [record for record in read_records(self.uri) if record["kind"] == "step"]
        assert [record["step"] for record in records] == list(range(1, self.kind.num_steps + 1))
        last = [record["loss"]["total"] for record in records[-self.kind.steps_per_epoch :]]
        return sum(last) / len(last)


def find_outside(cluster: ClusterState, hostname: str, pid: int) -> int:
    """Find the process that has `pid` on a host: hosts in namespaces count their own."""
    for host in range(cluster.hosts):
        for outside in find_processes(cluster.cluster_id, host):
            try:
                status = Path(f"/proc/{outside}/status").read_text()
            except FileNotFoundError:
                continue
            pids = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid"))
            if (
                int(pids[-1]) == pid
                and "RayTrainWorker" in Path(f"/proc/{outside}/cmdline").read_text()
                and (cluster.network == "loopback" or hostname == f"host-{host}")
            ):
                return outside
    raise ProcessLookupError(f"no process {pid} on {hostname}")


# --------------------------------------------------------------------------------------------------------- the failures


def kill_rank(run: Run, rank: int) -> None:
    os.kill(run.ranks()[rank], signal.SIGKILL)


def hang_rank(run: Run) -> None:
    os.kill(run.ranks()[1], signal.SIGSTOP)


def lose_host(run: Run, lose: Callable[[ClusterState, int], object]) -> None:
    """A host that holds no rank 0 goes, and comes back when training has gone on without it."""
    lose(run.cluster, HOSTS - 1)
    reached = max(step for _, step in run.steps())
    run.wait_for_step(reached + EVERY_STEPS)
    faults.start(run.cluster, HOSTS - 1)


def give_notice(run: Run) -> None:
    """Ray is told that a host will be taken away; then it is."""
    address = run.cluster.host_ip(HOSTS - 1)
    node = next(node["node_id"] for node in parts.read_nodes(run.cluster) if node["node_ip"] == address)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", run.cluster.gcs_address,
        "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back",
        "--deadline-remaining-seconds", str(NOTICE_S),
    ]  # fmt: skip
    subprocess.run(command, env={**os.environ, **run.cluster.client_env()}, check=True, stdout=subprocess.DEVNULL)
    time.sleep(NOTICE_S)
    faults.kill(run.cluster, HOSTS - 1)
    reached = max(step for _, step in run.steps())
    run.wait_for_step(reached + EVERY_STEPS)
    faults.start(run.cluster, HOSTS - 1)


def kill_driver(run: Run) -> None:
    """The job's own process is killed; the same command is submitted again."""
    for pid in find_processes(run.cluster.cluster_id):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"mtl_dist.train" in command and b"submit" not in command and b"-c" not in command:
            os.kill(pid, signal.SIGKILL)
    run.process.wait(TIMEOUT_S)
    run.submit()


def kill_head(run: Run) -> None:
    """The head with everything on it is killed and started again; the same command is submitted again."""
    faults.kill(run.cluster, 0)
    run.process.kill()
    faults.start(run.cluster, 0)
    run.submit()


def take_store_away(run: Run) -> None:
    faults.stop_s3(run.cluster)
    time.sleep(S3_AWAY_S)
    faults.start_s3(run.cluster)


FAILURES: dict[str, Callable[[Run], None]] = {
    "rank 0 killed": lambda run: kill_rank(run, 0),
    "rank 1 killed": lambda run: kill_rank(run, 1),
    f"rank stopped (found after {HANG_S} s)": hang_rank,
    "host killed, returns": lambda run: lose_host(run, faults.kill),
    "host cut off the network, returns": lambda run: lose_host(run, faults.cut),
    "host frozen, returns": lambda run: lose_host(run, faults.freeze),
    f"host taken away with {NOTICE_S} s notice": give_notice,
    f"object store away for {S3_AWAY_S} s": take_store_away,
    "driver killed, submitted again": kill_driver,
    "head killed, started and submitted again": kill_head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=list(MAKERS), default="pictures", help="what is trained on")
    parser.add_argument("--only", nargs="+", choices=list(FAILURES), default=list(FAILURES))
    parser.add_argument("--dir", type=Path, help="keep logs, audits and the cluster's files here")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mtl_dist-survival-") as scratch:
        root = args.dir or Path(scratch)
        outcomes = [*survive(root, args.only, of=args.of)]
    if args.out:
        write_results(args.out, {"of": args.of, "failures": [outcome._asdict() for outcome in outcomes]})


def survive(root: Path, names: list[str], *, of: str = "pictures") -> list[Outcome]:
    """Run an undisturbed run, then one with each failure; print a line each."""
    outcomes = []
    audit = root / "audit"
    audit.mkdir(parents=True, exist_ok=True)
    with LocalCluster(root / "cluster", hosts=HOSTS, cpus_per_host=1) as cluster:
        os.environ.update(cluster.client_env())
        kind = MAKERS[of](root)
        undisturbed = Run(cluster, audit, kind, "undisturbed")
        undisturbed.submit()
        undisturbed.finish()
        seconds = undisturbed.steps()[-1][0] - undisturbed.steps()[0][0]
        loss = undisturbed.last_loss()
        what = f"{kind.num_steps} steps of {kind.batch} {'rows' if of == 'pictures' else 'windows'}"
        print(f"undisturbed: {what} in {seconds:.0f} s, {HOSTS} hosts, {cluster.network}")
        print(f"{'':46}{'lost':>6}{'twice':>6}{'repeated':>9}{'seconds':>9}{'loss':>9}  ranks")
        for number, name in enumerate(names):
            more = ("--engine.hang-s", str(HANG_S)) if FAILURES[name] is hang_rank else ()
            run = Run(cluster, audit, kind, f"run-{number}", *more)
            run.submit()
            run.wait_for_step(FAIL_AT)
            failed_at = time.time()
            FAILURES[name](run)
            run.finish()
            found = run.outcome(name, failed_at, loss)
            outcomes.append(found)
            print(
                f"{name:46}{found.rows_lost:>6}{found.rows_twice:>6}{found.steps_repeated:>9}{found.seconds:>9.1f}"
                f"{found.loss_difference:>9.4f}  {found.ranks}",
                flush=True,
            )
    return outcomes


def make_pictures(root: Path) -> Kind:
    """Render faces, and make shards of them."""
    faces = str(root / "faces")
    run_module("mtl_dist.shards", "synth", faces, "--num-train", str(ROWS), "--num-val", "48")
    run_module("mtl_dist.shards", "create", faces, "s3://mtl/faces", "--views", "cropped", "--frames-per-shard", "20")
    flags = ["--preset", "small", "--data.image-size", "80", "--engine.batchnorm", "frozen"]
    flags += ["--data.train", "s3://mtl/faces/cropped/train", "--data.val", "s3://mtl/faces/cropped/val"]
    return Kind(tuple(flags), batch=24, epochs=30, steps_per_epoch=ROWS // 24)


def make_features(root: Path) -> Kind:
    """Describe the pictures over the hosts, with a network that is trained for an epoch."""
    pictures = make_pictures(root)
    own = ["--local", *pictures.flags, "--run.name", "extractor", "--run.storage", "s3://mtl/runs"]
    run_module("mtl_dist.train", *own, "--train.epochs", "1")
    sets = ["s3://mtl/faces/cropped/train", "s3://mtl/faces/cropped/val"]
    submit = ["job", "submit", "--working-dir", str(REPO), "--", "python", "-m", "mtl_dist.features", "create"]
    run_module(
        "ray.scripts.scripts", *submit, "s3://mtl/features", "--data", *sets, "--runs", "s3://mtl/runs/extractor",
        "--shard-mib", "1",
    )  # fmt: skip
    train, window, batch = "s3://mtl/features/cropped/train", 8, 4
    videos = Windows(read_sets([train]).firsts[0].video_rows, window, seed=0)
    flags = ["--preset", "small-c", "--model.sequence.window", str(window), "--model.dropout", "0"]
    flags += ["--data.train", train, "--data.val", "s3://mtl/features/cropped/val"]
    return Kind(tuple(flags), batch, epochs=60, steps_per_epoch=int(videos.counts.sum()) // batch)


MAKERS: dict[str, Callable[[Path], Kind]] = {"pictures": make_pictures, "features": make_features}


def run_module(*args: str) -> None:
    subprocess.run(with_parent([sys.executable, "-m", *args]), check=True, stdout=subprocess.DEVNULL, cwd=REPO)


if __name__ == "__main__":
    main()
