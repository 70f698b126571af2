"""What can happen to the hosts of a running cluster, to order: cut off, killed, frozen, and back again.

    cut     its cable is out: packets vanish, its processes go on     mend
    frozen  all its processes are stopped, connections stay open      thaw
    killed  SIGKILL to all its processes at once                      start

A host that Ray has declared dead (HEALTH_CHECKS in state.py: after 9 to 13 s) does not return by itself: when it hears
of it, its raylet ends with all its workers. `start` begins a new node on it.

Host 0 is the head. Ray keeps the cluster in the head's memory: a killed head takes all jobs with it, and the other
hosts end 60 s later. `start` of host 0 therefore restarts Ray on every host; what S3 holds stays.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from cluster import network, parts
from cluster.processes import (
    POLL_S,
    ClusterError,
    continue_processes,
    end_processes,
    find_processes,
    send_signal,
    stop_processes,
)
from cluster.state import ClusterState, load_state, lock
from mtl_dist.errors import InputError

START_TIMEOUT_S = 60.0
VIEW_TIMEOUT_S = 60.0


def load_running(dir: Path | str) -> ClusterState:
    """Read the state of the cluster in `dir`. Raises InputError where none runs."""
    state = load_state(dir)
    if state is None or not state.ready or not find_processes(state.cluster_id):
        raise InputError(f"no cluster runs in {dir}: `up` starts one")
    return state


def cut(state: ClusterState, host: int) -> None:
    """Cut a host off the network. Its own processes still reach each other."""
    check_host(state, host)
    check_namespaces(state)
    network.set_link(state.cluster_id, host, up=False)


def mend(state: ClusterState, host: int) -> None:
    """Connect a host again."""
    check_host(state, host)
    check_namespaces(state)
    network.set_link(state.cluster_id, host, up=True)


def freeze(state: ClusterState, host: int) -> int:
    """SIGSTOP every process of a host; return how many there are."""
    check_host(state, host)
    return stop_processes(state.cluster_id, host)


def thaw(state: ClusterState, host: int) -> int:
    """SIGCONT every process of a host; return how many were stopped."""
    check_host(state, host)
    return continue_processes(state.cluster_id, host)


def kill(state: ClusterState, host: int) -> int:
    """SIGKILL every process of a host, jobs and workers included; return how many there were."""
    check_host(state, host)
    num_ended = end_processes(state.cluster_id, host, grace_s=0)
    parts.reap_children()
    return num_ended


def start(
    state: ClusterState,
    host: int,
    *,
    timeout_s: float = START_TIMEOUT_S,
    progress: parts.Progress = lambda line: None,
) -> None:
    """Bring a host back, whatever was done to it: mend its cable, end what is left on it, start a new node.

    Nothing happens to a host that is neither cut nor frozen and that Ray believes alive. Of host 0, start Ray anew on
    all hosts.
    """
    check_host(state, host)
    deadline = time.monotonic() + timeout_s
    with lock(state.dir):
        if is_running(state, host):
            progress(f"host {host} runs already")
        elif host == 0:
            progress("Ray keeps its state in the head's memory: starting Ray anew on every host")
            for each in range(state.hosts):
                clear(state, each)
            parts.start_others(state, parts.start_node(state, 0), deadline, progress)
        elif not is_running(state, 0):
            raise InputError("host 0, the head, does not run: start that first")
        else:
            clear(state, host)
            former = [node["node_id"] for node in parts.read_nodes(state, alive=False)]
            started = {f"host-{host}": parts.start_node(state, host)}
            parts.wait_for_nodes(state, started, deadline, former=former)
            progress(f"host {host} is back as a new node")


def clear(state: ClusterState, host: int) -> None:
    """Make a host what it was before its node was started."""
    kill(state, host)
    if state.network == "namespaces":
        mend(state, host)


def is_running(state: ClusterState, host: int) -> bool:
    return parts.read_condition(state, host) == "running" and parts.read_ray_view(state)[host] == "ALIVE"


def stop_s3(state: ClusterState) -> bool:
    """SIGKILL the S3 server; False where it did not run. What it stores stays."""
    was_running = False
    while pid := parts.find_parts(state).get("s3"):
        was_running = True
        send_signal(state.cluster_id, pid, signal.SIGKILL)
        time.sleep(POLL_S / 10)
    parts.reap_children()
    return was_running


def start_s3(state: ClusterState, *, timeout_s: float = START_TIMEOUT_S) -> bool:
    """Start the S3 server at its former address, over the same objects; False where it runs."""
    with lock(state.dir):
        if "s3" in parts.find_parts(state):
            return False
        parts.wait_for_s3(state, parts.start_s3(state), time.monotonic() + timeout_s)
        return True


def wait_for_view(state: ClusterState, host: int, view: str, *, timeout_s: float = VIEW_TIMEOUT_S) -> float:
    """Wait until Ray believes a host "ALIVE" or "DEAD"; return how many seconds that took."""
    begin = time.monotonic()
    while (seen := parts.read_ray_view(state)[host]) != view:
        if time.monotonic() - begin > timeout_s:
            raise ClusterError(f"after {timeout_s:.0f} s host {host} is {seen} to Ray, not {view}")
        time.sleep(POLL_S)
    return time.monotonic() - begin


def check_host(state: ClusterState, host: int) -> None:
    if not 0 <= host < state.hosts:
        raise InputError(f"host is {host}, expected 0 to {state.hosts - 1}")


def check_namespaces(state: ClusterState) -> None:
    if state.network != "namespaces":
        raise InputError(
            "the hosts of this cluster share the loopback interface and cannot be cut off;"
            " `kill` and `freeze` work, and `up --network namespaces` as root makes hosts that can"
        )
