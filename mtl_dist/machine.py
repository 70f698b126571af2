"""What this process may use of its machine: CPUs, and files open at a time."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

from mtl_dist.errors import InputError

RESERVED_FILES = 512  # for all but shards: libraries, sockets, records


def num_cpus(*, cgroup_file: Path = Path("/proc/self/cgroup"), cgroup_dir: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPUs that this process may run on, by its affinity, or has time of, by its cgroups: the fewest.

    `os.cpu_count` is the machine's, of which a container, a batch system's job or taskset may leave a part.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, _cgroup_cpus(cgroup_file, cgroup_dir))))


def _cgroup_cpus(cgroup_file: Path, cgroup_dir: Path) -> float:
    """Return the least CPU time a second that a cgroup of this process, or one above it, allows."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("cpu", "cpu,cpuacct") if controllers else (".", "unified")
        for top in (cgroup_dir / mount for mount in mounts):
            # A container sees its own cgroup as the top one, whatever the path says.
            for directory in (top, *(top / part for part in _prefixes(path))):
                limits.append(
                    _quota(directory, ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",))
                )
    return min(limits)


def _prefixes(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _quota(directory: Path, names: tuple[str, ...]) -> float:
    """Read a quota and its period; infinity where there is none."""
    try:
        quota, period = " ".join((directory / name).read_text() for name in names).split()
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def allow_open_files(count: int) -> None:
    """Let this process hold `count` shards open beside everything else. Raises `InputError` where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + RESERVED_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InputError(
            f"{count} shards are in hand at a time, each an open file, and this process may have {hard} files open: "
            f"raise the limit (`ulimit -n {needed}`, where you may), or lower data.block_shards or data.streams"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
