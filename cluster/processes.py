"""The processes of a local cluster: found by what their environment says, ended by pid.

Every process of a cluster carries MTL_CLUSTER_ID, and those of a host MTL_CLUSTER_HOST too, also those that Ray starts.
No list of pids is needed, and none can be out of date: what carries the id is the cluster's, whoever started it and
whatever was killed since.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from mtl_dist.errors import RunFailed

ID_VARIABLE = "MTL_CLUSTER_ID"
HOST_VARIABLE = "MTL_CLUSTER_HOST"
TERM_GRACE_S = 1.5  # Ray's processes need no goodbye; more would only make `down` slow
END_TIMEOUT_S = 15.0
POLL_S = 0.1


class ClusterError(RunFailed):
    """A part of the cluster did not start or did not end; the message holds the tail of its log."""


def end_processes(id: str, host: int | None = None, *, grace_s: float = TERM_GRACE_S) -> int:
    """SIGTERM, after `grace_s` SIGKILL the processes of a cluster, or of one of its hosts, until a scan finds none.

    Returns how many there were.
    """
    seen: set[int] = set()
    begin = time.monotonic()
    termed: set[int] = set()
    # Twice: one scan can miss a process that was forked behind it by one that ended before it came there.
    while pids := find_processes(id, host) or find_processes(id, host):
        seen.update(pids)
        elapsed_s = time.monotonic() - begin
        if elapsed_s > END_TIMEOUT_S:
            raise ClusterError(f"processes {sorted(pids)} of cluster {id} do not end")
        for pid in pids:
            if elapsed_s >= grace_s:
                send_signal(id, pid, signal.SIGKILL)
            elif pid not in termed:
                send_signal(id, pid, signal.SIGTERM)
                termed.add(pid)
        time.sleep(POLL_S if grace_s else POLL_S / 10)
    return len(seen)


def stop_processes(id: str, host: int) -> int:
    """SIGSTOP the processes of a host until a scan finds none that moves; return how many there are."""
    begin = time.monotonic()
    while moving := [pid for pid in find_processes(id, host) if not is_stopped(pid)]:
        if time.monotonic() - begin > END_TIMEOUT_S:
            raise ClusterError(f"processes {sorted(moving)} of cluster {id} do not stop")
        for pid in moving:
            send_signal(id, pid, signal.SIGSTOP)
        time.sleep(POLL_S / 10)
    return len(find_processes(id, host))


def continue_processes(id: str, host: int) -> int:
    """SIGCONT the processes of a host until a scan finds none stopped; return how many there were."""
    seen: set[int] = set()
    begin = time.monotonic()
    # More than once: nsenter stops itself again when it learns that the command it started was stopped.
    while stopped := [pid for pid in find_processes(id, host) if is_stopped(pid)]:
        if time.monotonic() - begin > END_TIMEOUT_S:
            raise ClusterError(f"processes {sorted(stopped)} of cluster {id} stay stopped")
        seen.update(stopped)
        for pid in stopped:
            send_signal(id, pid, signal.SIGCONT)
        time.sleep(POLL_S / 10)
    return len(seen)


def find_processes(id: str, host: int | None = None) -> list[int]:
    """List the processes that carry the id (and the host), without this one and its ancestors.

    Those may carry it too: `down` may run inside a job.
    """
    own = own_lineage()
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    return [pid for pid in pids if pid not in own and has_id(id, pid, host)]


def has_id(id: str, pid: int, host: int | None = None) -> bool:
    environment = read_environment(pid)
    return f"{ID_VARIABLE}={id}" in environment and (host is None or f"{HOST_VARIABLE}={host}" in environment)


def read_environment(pid: int) -> list[str]:
    """Return the NAME=value of a process; none where it ended meanwhile or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def read_command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def own_lineage() -> frozenset[int]:
    lineage, pid = set(), os.getpid()
    while pid > 0:
        lineage.add(pid)
        try:
            pid = int(read_stat(pid)[1])
        except OSError:
            break
    return frozenset(lineage)


def is_stopped(pid: int) -> bool:
    try:
        return read_stat(pid)[0] in "Tt"
    except OSError:  # ended meanwhile
        return False


def is_init(pid: int) -> bool:
    """Say whether a process is the first of a PID namespace."""
    try:
        return re.search(r"^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the command's name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def send_signal(id: str, pid: int, number: signal.Signals) -> None:
    """Send a signal to the process that carries the id, and to no later owner of its pid."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if has_id(id, pid):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
