"""A small real cluster on this machine: an S3 server (rclone) and several hosts, each with a Ray node.

    python -m cluster.local up --hosts 3
    source ~/.cache/mtl_dist/cluster/env.sh
    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help
    python -m cluster.local status
    python -m cluster.local cut 1          # and mend, kill, start, freeze, thaw, stop-s3, start-s3
    python -m cluster.local down

As root a host is a network namespace with its own address on a bridge (network.py), else all are nodes on loopback
addresses. The same from Python, for tests and demos:

    with LocalCluster(tmp_path, hosts=3) as cluster:
        subprocess.run([...], env=os.environ | cluster.client_env())
        faults.cut(cluster, 1)

Every process of a cluster carries MTL_CLUSTER_ID in its environment, every namespace and interface has it in its name,
and the id follows from the directory alone. `down` ends whatever carries the id: it needs no list and cleans up after a
kill -9 of anything, also of `up`. Hosts have CPUs only. Linux only (/proc, pidfd, all of 127.0.0.0/8 on loopback).
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import secrets
import shlex
import shutil
import sys
import time
from pathlib import Path

from cluster import faults, parts
from cluster.network import NetworkError, create_network, remove_network
from cluster.processes import ClusterError, end_processes
from cluster.state import (
    BUCKET,
    MARKER,
    ClusterState,
    cluster_id,
    is_cluster_dir,
    load_state,
    lock,
    plan_state,
    remove_state,
    runtime_dir,
    save_state,
    write_env_file,
    write_private,
)
from mtl_dist.errors import PlainParser

MAX_HOSTS, MAX_CPUS = 32, 1024
MAX_TIMEOUT_S = 86_400
NETWORKS = ("auto", "namespaces", "loopback")


class LocalCluster:
    """A cluster for the length of a `with` block, which yields its ClusterState."""

    def __init__(
        self, dir: Path | str, *, hosts: int = 2, cpus_per_host: int = 4, network: str = "auto", purge: bool = False
    ):
        self.dir, self.purge = Path(dir), purge
        self.options = {"hosts": hosts, "cpus_per_host": cpus_per_host, "network": network}

    def __enter__(self) -> ClusterState:
        return up(self.dir, **self.options)

    def __exit__(self, *_) -> None:
        down(self.dir, purge=self.purge)


# ---------------------------------------------------------------------------------------------------------- up and down


def up(
    dir: Path | str,
    *,
    hosts: int = 2,
    cpus_per_host: int = 4,
    network: str = "auto",
    timeout_s: float = faults.START_TIMEOUT_S,
    progress: parts.Progress = lambda line: None,
) -> ClusterState:
    """Start a cluster with its state in `dir`, or return the one that runs there.

    Raises:
        ValueError: a bad argument, a directory that cannot be written, namespaces that this process may not make, or
            another cluster running in the directory.
        ClusterError: a part died or did not answer within `timeout_s`; nothing is left running then.
    """
    if not 1 <= hosts <= MAX_HOSTS:
        raise ValueError(f"hosts is {hosts}, expected 1 to {MAX_HOSTS}")
    if not 1 <= cpus_per_host <= MAX_CPUS:
        raise ValueError(f"cpus per host is {cpus_per_host}, expected 1 to {MAX_CPUS}")
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"timeout is {timeout_s} s, expected more than 0 and at most {MAX_TIMEOUT_S}")
    dir = Path(dir).expanduser().resolve()
    is_new = not is_cluster_dir(dir)
    try:
        dir.mkdir(parents=True, exist_ok=True)
        if not is_cluster_dir(dir) and any(dir.iterdir()):
            raise ValueError(f"{dir} holds files of others: choose an empty or a new directory")
        (dir / "s3").mkdir(exist_ok=True)
        (dir / "s3" / MARKER).touch()
    except OSError as error:
        raise ValueError(
            f"cannot keep a cluster in {dir}: {error.strerror}: choose a directory that can be written"
        ) from None

    with lock(dir):
        state = load_state(dir)
        if state is not None and not parts.dead_parts(state):
            if (state.hosts, state.cpus_per_host) == (hosts, cpus_per_host) and network in ("auto", state.network):
                progress(f"already running in {dir}")
                return state
            raise ValueError(
                f"a cluster of {state.hosts} hosts x {state.cpus_per_host} CPUs ({state.network}) already runs in"
                f" {dir}, not {hosts} x {cpus_per_host} ({network}): take it down first, or choose another directory"
            )
        if clear(dir):
            progress("ended what was left of a dead cluster")
        try:
            return start(dir, hosts, cpus_per_host, network, timeout_s=timeout_s, progress=progress)
        except BaseException:  # KeyboardInterrupt included: half a cluster is of no use
            clear(dir)
            if is_new:
                remove_objects(dir)
            raise


def down(dir: Path | str, *, purge: bool = False) -> int:
    """End every process of the cluster in `dir`, remove its network and files; return how many processes there were.

    What the S3 server stores is kept unless `purge`. Running it twice, or where nothing ever ran, does no harm.
    """
    dir = Path(dir).expanduser().resolve()
    with lock(dir) if dir.is_dir() else contextlib.nullcontext():
        was_cluster = is_cluster_dir(dir)
        num_ended = clear(dir)
        if purge and was_cluster:
            remove_objects(dir)
    return num_ended


def remove_objects(dir: Path) -> None:
    """Remove what the S3 server stores, and the directory where nothing of others is in it."""
    shutil.rmtree(dir / "s3", ignore_errors=True)
    with contextlib.suppress(OSError):
        dir.rmdir()


def clear(dir: Path) -> int:
    """End and remove all of a cluster but what its S3 server stores; return how many processes there were."""
    num_ended = end_processes(cluster_id(dir))
    parts.reap_children()
    remove_network(cluster_id(dir))  # after the processes: they would keep a namespace alive
    remove_state(dir)
    return num_ended


def start(
    dir: Path, hosts: int, cpus_per_host: int, wanted: str, *, timeout_s: float, progress: parts.Progress
) -> ClusterState:
    begin = time.monotonic()
    deadline = begin + timeout_s

    def say(line: str) -> None:
        progress(f"{time.monotonic() - begin:5.1f} s  {line}")

    for path in (runtime_dir(cluster_id(dir)), runtime_dir(cluster_id(dir)) / "tmp"):
        path.mkdir(mode=0o700)
    used, subnet = start_network(cluster_id(dir), hosts, wanted, say)
    state = plan_state(dir, hosts, cpus_per_host, network=used, subnet=subnet)
    save_state(state)  # before the first process
    write_private(state.token_path, secrets.token_urlsafe(32))
    (state.dir / "logs").mkdir(mode=0o700)

    say("starting the S3 server and the head")
    s3, head = parts.start_s3(state), parts.start_node(state, 0)
    parts.wait_for_s3(state, s3, deadline)
    say(f"S3 server answers at {state.s3_endpoint}, bucket {BUCKET}")
    parts.start_others(state, head, deadline, say)

    state = dataclasses.replace(state, ready=True)
    write_env_file(state)
    save_state(state)
    return state


def start_network(id: str, hosts: int, wanted: str, say: parts.Progress) -> tuple[str, str]:
    """Return the network that can be had and its subnet."""
    if wanted != "loopback":
        try:
            subnet = create_network(id, hosts, runtime_dir(id) / "hosts")
            say(f"{hosts} hosts are network namespaces, {subnet}.2 to {subnet}.{1 + hosts}")
            return "namespaces", subnet
        except NetworkError as error:
            if wanted == "namespaces":
                raise ValueError(f"no network namespaces here: {error}") from None
            say(f"hosts share the loopback interface; no network namespaces here: {error}")
    return "loopback", "127.0.0"


# -------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        return args.command(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m cluster.local",
        description="A small real cluster on this machine: an S3 server and several hosts, each with a Ray node.",
        epilog=EXAMPLES["all"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (command, help_text) in VERBS.items():
        sub = verbs.add_parser(
            verb,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=EXAMPLES.get(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        sub.add_argument(
            "--dir",
            type=Path,
            default=default_dir(),
            help="where its state is kept (default: $MTL_CLUSTER_DIR or %(default)s)",
        )
        if verb in HOST_VERBS:
            sub.add_argument("host", type=int, help="number of the host; 0 is the head")
        if verb == "up":
            sub.add_argument("--hosts", type=int, default=2, help="hosts, the head included (default: %(default)s)")
            sub.add_argument("--cpus-per-host", type=int, default=4, help="logical CPUs (default: %(default)s)")
            help_text = (
                "hosts as namespaces (root), as nodes on loopback, or the first that can be had: auto, the default"
            )
            sub.add_argument("--network", choices=NETWORKS, default="auto", help=help_text)
            help_text = "seconds until giving up (default: %(default)s)"
            sub.add_argument("--timeout", type=float, default=faults.START_TIMEOUT_S, help=help_text)
        if verb == "down":
            sub.add_argument("--purge", action="store_true", help="remove what the S3 server stores too")
        if verb == "exec":
            sub.add_argument("argv", nargs="+", metavar="-- COMMAND", help="what to run there")
    return parser


def default_dir() -> Path:
    return Path(os.environ.get("MTL_CLUSTER_DIR") or Path.home() / ".cache" / "mtl_dist" / "cluster")


def run_up(args: argparse.Namespace) -> int:
    state = up(
        args.dir,
        hosts=args.hosts,
        cpus_per_host=args.cpus_per_host,
        network=args.network,
        timeout_s=args.timeout,
        progress=functools.partial(print, flush=True),
    )
    option = dir_option(state)
    print(
        f"Ray          {state.gcs_address}  ({state.hosts} hosts x {state.cpus_per_host} CPUs, {state.network})\n"
        f"jobs         {state.dashboard_url}\n"
        f"S3           {state.s3_endpoint}  (bucket {BUCKET}, stored in {state.dir / 's3'})\n"
        f"environment  source {shlex.quote(str(state.dir / 'env.sh'))}\n"
        f"then e.g.    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help\n"
        f"on a host    python -m cluster.local exec 0{option} -- python -m mtl_dist.train --help\n"
        f"bring down   python -m cluster.local down{option}"
    )
    return 0


def dir_option(state: ClusterState) -> str:
    """Return what a command needs to find this cluster, to be copied behind its verb."""
    return "" if state.dir == default_dir().resolve() else f" --dir {shlex.quote(str(state.dir))}"


def run_down(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    num_ended = down(args.dir, purge=args.purge)
    ended = f"ended {num_ended} processes in {time.monotonic() - begin:.1f} s" if num_ended else "nothing was running"
    data = args.dir.expanduser() / "s3"
    print(ended + (f"; objects are kept in {data}" if data.exists() else ""))
    return 0


def run_status(args: argparse.Namespace) -> int:
    state = load_state(args.dir)
    if state is None or not state.ready:
        print(
            f"nothing runs in {args.dir}"
            + ("" if state is None else " (an `up` did not finish: run `down`, or `up` again)")
        )
        return 1
    dead = parts.dead_parts(state)
    conditions = [parts.read_condition(state, host) for host in range(state.hosts)]
    # A head that is cut off or frozen would answer with a timeout.
    view = parts.read_ray_view(state) if conditions[0] == "running" else dict.fromkeys(range(state.hosts), "unknown")
    num_alive = sum(seen == "ALIVE" for seen in view.values())
    rows = [("S3", "dead" if "s3" in dead else "running", state.s3_endpoint)]
    for host, condition in enumerate(conditions):
        head = f", the head: {state.dashboard_url}" if host == 0 else ""
        rows.append((f"host {host}", condition, f"{state.host_ip(host):<15}{view[host]} to Ray{head}"))
    print("\n".join(f"{name:<9}{condition:<9}{rest}" for name, condition, rest in rows))
    print(f"{num_alive} of {state.hosts} hosts alive to Ray, {num_alive * state.cpus_per_host} CPUs ({state.network})")
    if dead:
        print(f"dead: {', '.join(dead)}; `start HOST` or `start-s3` begins one again, `up` everything")
    return 0 if not dead and set(conditions) == {"running"} and num_alive == state.hosts else 1


def run_host_verb(args: argparse.Namespace) -> int:
    state, host = faults.load_running(args.dir), args.host
    again = f"python -m cluster.local start {host}{dir_option(state)}"
    match args.verb:
        case "cut":
            faults.cut(state, host)
            print(f"host {host} is cut off")
        case "mend":
            faults.mend(state, host)
            print(f"host {host} is connected; if Ray gave it up meanwhile, its node ends now: {again}")
        case "kill":
            print(f"killed {faults.kill(state, host)} processes of host {host}")
        case "start":
            faults.start(state, host, progress=functools.partial(print, flush=True))
        case "freeze":
            print(f"stopped {faults.freeze(state, host)} processes of host {host}")
        case "thaw":
            num_stopped = faults.thaw(state, host)
            print(f"continued {num_stopped} processes of host {host}; if Ray gave it up meanwhile: {again}")
    return 0


def run_s3_verb(args: argparse.Namespace) -> int:
    state = faults.load_running(args.dir)
    if args.verb == "stop-s3":
        print("stopped the S3 server" if faults.stop_s3(state) else "the S3 server did not run")
    else:
        print(f"S3 server {'answers' if faults.start_s3(state) else 'runs already'} at {state.s3_endpoint}")
    return 0


def run_exec(args: argparse.Namespace) -> int:
    state = faults.load_running(args.dir)
    faults.check_host(state, args.host)
    environment = state.process_env(args.host)
    if shutil.which(args.argv[0], path=environment["PATH"]) is None:
        raise ValueError(f"no command {args.argv[0]!r}")
    command = [*parts.enter_host(state, args.host), *args.argv]
    os.execvpe(command[0], command, environment)


HOST_VERBS = ("cut", "mend", "kill", "start", "freeze", "thaw", "exec")
VERBS = {
    "up": (run_up, "start the cluster, or say that it runs"),
    "down": (run_down, "end it, whatever state it is in"),
    "status": (run_status, "say what runs; exit code 0 when everything does, else 1"),
    "cut": (run_host_verb, "cut a host off the network; its processes go on"),
    "mend": (run_host_verb, "connect it again"),
    "kill": (run_host_verb, "SIGKILL every process of a host"),
    "start": (run_host_verb, "bring a host back, whatever was done to it; of host 0, Ray on all hosts"),
    "freeze": (run_host_verb, "SIGSTOP every process of a host; its connections stay open"),
    "thaw": (run_host_verb, "let them go on"),
    "stop-s3": (run_s3_verb, "SIGKILL the S3 server"),
    "start-s3": (run_s3_verb, "start it again, at the same address with the same objects"),
    "exec": (run_exec, "run a command on a host, in its network and with its environment"),
}
EXAMPLES = {
    "all": """examples:
  python -m cluster.local up --hosts 3
  python -m cluster.local cut 1
  python -m cluster.local status
  python -m cluster.local start 1
  python -m cluster.local down""",
    "up": """examples:
  python -m cluster.local up
  python -m cluster.local up --hosts 4 --cpus-per-host 2 --dir /tmp/other
  python -m cluster.local up --network loopback""",
    "down": """examples:
  python -m cluster.local down
  python -m cluster.local down --dir /tmp/other --purge""",
    "status": """examples:
  python -m cluster.local status
  python -m cluster.local status --dir /tmp/other""",
    "exec": """examples:
  python -m cluster.local exec 0 -- python -m mtl_dist.train --help
  python -m cluster.local exec 1 -- ip addr""",
}


if __name__ == "__main__":
    sys.exit(main())
