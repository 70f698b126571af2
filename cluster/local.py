"""A small real cluster on this machine: an S3 server (rclone) and several hosts, each with a Ray node.

Examples:
    python -m cluster.local up --hosts 3
    source ~/.cache/mtl_dist/cluster/env.sh
    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help
    python -m cluster.local status
    python -m cluster.local cut 1
    python -m cluster.local start 1
    python -m cluster.local down

As root a host is a network namespace with its own address on a bridge, else all are nodes on loopback addresses. `down`
ends whatever is the cluster's, after a kill -9 of anything too, also of `up`. Hosts have CPUs only. Linux only.
"""

from __future__ import annotations

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
from typing import Annotated, Literal, get_args

import tyro

from cluster import faults, parts
from cluster.network import NetworkError, create_network, remove_network
from cluster.processes import end_processes
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
from mtl_dist.errors import InputError, choose_command, run_command

PROG = "python -m cluster.local"
MAX_HOSTS, MAX_CPUS = 32, 1024
MAX_TIMEOUT_S = 86_400
Network = Literal["auto", "namespaces", "loopback"]
NETWORKS = get_args(Network)

Dir = Annotated[
    Path | None,
    tyro.conf.arg(metavar="DIR", help="Where its state is kept; None: $MTL_CLUSTER_DIR or ~/.cache/mtl_dist/cluster."),
]
Host = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="HOST", help="Number of the host; 0 is the head.")]


class LocalCluster:
    """A cluster for the length of a `with` block, which yields its ClusterState:

    with LocalCluster(tmp_path, hosts=3) as cluster:
        subprocess.run([...], env=os.environ | cluster.client_env())
        faults.cut(cluster, 1)
    """

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
        InputError: a bad argument, a directory that cannot be written, namespaces that this process may not make, or
            another cluster running in the directory.
        ClusterError: a part died or did not answer within `timeout_s`; nothing is left running then.
    """
    if not 1 <= hosts <= MAX_HOSTS:
        raise InputError(f"hosts is {hosts}, expected 1 to {MAX_HOSTS}")
    if not 1 <= cpus_per_host <= MAX_CPUS:
        raise InputError(f"cpus per host is {cpus_per_host}, expected 1 to {MAX_CPUS}")
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InputError(f"timeout is {timeout_s} s, expected more than 0 and at most {MAX_TIMEOUT_S}")
    dir = Path(dir).expanduser().resolve()
    is_new = not is_cluster_dir(dir)
    try:
        dir.mkdir(parents=True, exist_ok=True)
        if not is_cluster_dir(dir) and any(dir.iterdir()):
            raise InputError(f"{dir} holds files of others: choose an empty or a new directory")
        (dir / "s3").mkdir(exist_ok=True)
        (dir / "s3" / MARKER).touch()
    except OSError as error:
        raise InputError(
            f"cannot keep a cluster in {dir}: {error.strerror}: choose a directory that can be written"
        ) from None

    with lock(dir):
        state = load_state(dir)
        if state is not None and not parts.dead_parts(state):
            if (state.hosts, state.cpus_per_host) == (hosts, cpus_per_host) and network in ("auto", state.network):
                progress(f"already running in {dir}")
                return state
            raise InputError(
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
                raise InputError(f"no network namespaces here: {error}") from None
            say(f"hosts share the loopback interface; no network namespaces here: {error}")
    return "loopback", "127.0.0"


# -------------------------------------------------------------------------------------------------------- command line


def run_up(
    *,
    dir: Dir = None,
    hosts: int = 2,
    cpus_per_host: int = 4,
    network: Network = "auto",
    timeout: float = faults.START_TIMEOUT_S,
) -> None:
    """Start the cluster, or say that it runs.

    One beside the usual one, and one that needs no root:

        python -m cluster.local up --hosts 4 --cpus-per-host 2 --dir /tmp/other
        python -m cluster.local up --network loopback

    Args:
        hosts: Hosts, the head included.
        cpus_per_host: Logical CPUs.
        network: Hosts as namespaces (root), as nodes on loopback, or the first of these that can be had.
        timeout: Seconds until giving up.
    """
    say = functools.partial(print, flush=True)
    sizes = {"hosts": hosts, "cpus_per_host": cpus_per_host}
    state = up(dir or default_dir(), **sizes, network=network, timeout_s=timeout, progress=say)
    option = dir_option(state)
    print(
        f"Ray          {state.gcs_address}  ({state.hosts} hosts x {state.cpus_per_host} CPUs, {state.network})\n"
        f"jobs         {state.dashboard_url}\n"
        f"S3           {state.s3_endpoint}  (bucket {BUCKET}, stored in {state.dir / 's3'})\n"
        f"environment  source {shlex.quote(str(state.dir / 'env.sh'))}\n"
        f"then e.g.    python -m ray.scripts.scripts job submit --working-dir . -- python -m mtl_dist.train --help\n"
        f"on a host    {PROG} exec 0{option} -- python -m mtl_dist.train --help\n"
        f"bring down   {PROG} down{option}"
    )


def default_dir() -> Path:
    return Path(os.environ.get("MTL_CLUSTER_DIR") or Path.home() / ".cache" / "mtl_dist" / "cluster")


def dir_option(state: ClusterState) -> str:
    """Return what a command needs to find this cluster, to be copied behind its verb."""
    return "" if state.dir == default_dir().resolve() else f" --dir {shlex.quote(str(state.dir))}"


def run_down(*, dir: Dir = None, purge: bool = False) -> None:
    """End it, whatever state it is in.

    Args:
        purge: Remove what the S3 server stores too.
    """
    dir, begin = dir or default_dir(), time.monotonic()
    num_ended = down(dir, purge=purge)
    ended = f"ended {num_ended} processes in {time.monotonic() - begin:.1f} s" if num_ended else "nothing was running"
    data = dir.expanduser() / "s3"
    print(ended + (f"; objects are kept in {data}" if data.exists() else ""))


def run_status(*, dir: Dir = None) -> None:
    """Say what runs; exit code 0 when everything does, else 1."""
    dir = dir or default_dir()
    state = load_state(dir)
    if state is None or not state.ready:
        print(f"nothing runs in {dir}" + (" (an `up` did not finish: run `down`, or `up` again)" if state else ""))
        sys.exit(1)
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
    if dead or set(conditions) != {"running"} or num_alive != state.hosts:
        sys.exit(1)


def run_cut(host: Host, *, dir: Dir = None) -> None:
    """Cut a host off the network; its processes go on."""
    faults.cut(running(dir), host)
    print(f"host {host} is cut off")


def run_mend(host: Host, *, dir: Dir = None) -> None:
    """Connect it again."""
    state = running(dir)
    faults.mend(state, host)
    print(f"host {host} is connected; if Ray gave it up meanwhile, its node ends now: {start_again(state, host)}")


def run_kill(host: Host, *, dir: Dir = None) -> None:
    """SIGKILL every process of a host."""
    print(f"killed {faults.kill(running(dir), host)} processes of host {host}")


def run_start(host: Host, *, dir: Dir = None) -> None:
    """Bring a host back, whatever was done to it; of host 0, Ray on all hosts."""
    faults.start(running(dir), host, progress=functools.partial(print, flush=True))


def run_freeze(host: Host, *, dir: Dir = None) -> None:
    """SIGSTOP every process of a host; its connections stay open."""
    print(f"stopped {faults.freeze(running(dir), host)} processes of host {host}")


def run_thaw(host: Host, *, dir: Dir = None) -> None:
    """Let them go on."""
    state = running(dir)
    again = f"if Ray gave it up meanwhile: {start_again(state, host)}"
    print(f"continued {faults.thaw(state, host)} processes of host {host}; {again}")


def run_stop_s3(*, dir: Dir = None) -> None:
    """SIGKILL the S3 server."""
    print("stopped the S3 server" if faults.stop_s3(running(dir)) else "the S3 server did not run")


def run_start_s3(*, dir: Dir = None) -> None:
    """Start it again, at the same address with the same objects."""
    state = running(dir)
    print(f"S3 server {'answers' if faults.start_s3(state) else 'runs already'} at {state.s3_endpoint}")


def run_exec(
    host: Host,
    command: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="-- COMMAND")],
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ARGUMENT ...]")],
    *,
    dir: Dir = None,
) -> None:
    """Run a command on a host, in its network and with its environment.

    A driver of training, and what a host sees of its network:

        python -m cluster.local exec 0 -- python -m mtl_dist.train --help
        python -m cluster.local exec 1 -- ip addr

    Args:
        command: What to run there.
        arguments: Its arguments.
    """
    state = running(dir)
    faults.check_host(state, host)
    environment = state.process_env(host)
    if shutil.which(command, path=environment["PATH"]) is None:
        raise InputError(f"no command {command!r}")
    argv = [*parts.enter_host(state, host), command, *arguments]
    os.execvpe(argv[0], argv, environment)


def running(dir: Path | None) -> ClusterState:
    """Return the cluster that runs in `dir`, or in the directory that is meant where none is named."""
    return faults.load_running(dir or default_dir())


def start_again(state: ClusterState, host: int) -> str:
    return f"{PROG} start {host}{dir_option(state)}"


COMMANDS = {
    "up": run_up,
    "down": run_down,
    "status": run_status,
    "cut": run_cut,
    "mend": run_mend,
    "kill": run_kill,
    "start": run_start,
    "freeze": run_freeze,
    "thaw": run_thaw,
    "stop-s3": run_stop_s3,
    "start-s3": run_start_s3,
    "exec": run_exec,
}


def main(args: list[str] | None = None) -> None:
    """Read the command line, then run its command. Raises `InputError` for what the user can mend."""
    choose_command(COMMANDS, args, prog=PROG, description=__doc__)()


if __name__ == "__main__":
    run_command(main, interrupted="`up` starts what is missing, `down` ends all")
