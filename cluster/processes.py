"""The processes of a local cluster: found by the id in their environment, ended by pid.

Every process of a cluster carries MTL_CLUSTER_ID, also those that Ray starts. No list of pids is needed, and none can
be out of date: what carries the id is the cluster's, whoever started it and whatever was killed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

ID_VARIABLE = "MTL_CLUSTER_ID"
TERM_GRACE_S = 1.5  # Ray's processes need no goodbye; more would only make `down` slow
END_TIMEOUT_S = 15.0
POLL_S = 0.1


class ClusterError(RuntimeError):
    """A part of the cluster did not start or did not end; the message holds the tail of its log."""


@dataclasses.dataclass(frozen=True)
class Process:
    pid: int
    start_ticks: int  # since boot: with the pid it names one process for ever


def end_processes(id: str) -> int:
    """SIGTERM, then SIGKILL every process that carries the id until a scan finds none; return how many there were."""
    seen: set[int] = set()
    begin = time.monotonic()
    termed: set[int] = set()
    # Twice: one scan can miss a process that was forked behind it by one that ended before it came there.
    while pids := find_processes(id) or find_processes(id):
        seen.update(pids)
        elapsed_s = time.monotonic() - begin
        if elapsed_s > END_TIMEOUT_S:
            raise ClusterError(f"processes {sorted(pids)} of cluster {id} do not end")
        for pid in pids:
            if elapsed_s > TERM_GRACE_S:
                send_signal(id, pid, signal.SIGKILL)
            elif pid not in termed:
                send_signal(id, pid, signal.SIGTERM)
                termed.add(pid)
        time.sleep(POLL_S)
    return len(seen)


def find_processes(id: str) -> list[int]:
    """List the processes that carry the id, without this one and its ancestors (`down` may run inside a job)."""
    own = own_lineage()
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    return [pid for pid in pids if pid not in own and has_id(id, pid)]


def has_id(id: str, pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return False
    return f"{ID_VARIABLE}={id}".encode() in environment.split(b"\0")


def own_lineage() -> frozenset[int]:
    lineage, pid = set(), os.getpid()
    while pid > 0:
        lineage.add(pid)
        try:
            pid = int(read_stat(pid)[1])
        except OSError:
            break
    return frozenset(lineage)


def read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the command's name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def read_start_ticks(pid: int) -> int:
    return int(read_stat(pid)[19])


def is_alive(id: str, process: Process) -> bool:
    try:
        return read_start_ticks(process.pid) == process.start_ticks and has_id(id, process.pid)
    except OSError:
        return False


def send_signal(id: str, pid: int, number: signal.Signals) -> None:
    """Send a signal to the process that carries the id, and to no later owner of its pid."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if has_id(id, pid):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
