"""Whether a run could start where it would be: storage, clocks, cache disks, data, devices, versions and ports.

`python -m mtl_dist.train ... --check` prints one table and starts nothing. Under torchrun all ranks take part, under
Ray a task on every node; with --local it is this process alone. What fails is said again at the end, with exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtl_dist import __version__, storage
from mtl_dist.config import Config
from mtl_dist.data.cache import GIB, OWN_NAME, Cache
from mtl_dist.data.index import check_stored
from mtl_dist.data.widths import fill_in_widths
from mtl_dist.device import check_device
from mtl_dist.errors import InputError, StorageError, plain
from mtl_dist.joining import join_cluster
from mtl_dist.machine import num_cpus
from mtl_dist.predicting.cluster import ask_every_node
from mtl_dist.training.launch import connect, has_gpus
from mtl_dist.training.plan import open_data
from mtl_dist.training.restarts import is_torchrun
from mtl_dist.training.same_disk import check_seen, seen_by_all
from mtl_dist.training.torchrun import is_first_of_node, join_torchrun, torchrun_rank

MAX_SKEW_S = 60.0  # a server of S3 refuses requests at 900; what others have abandoned is told by its age
TICK_S = 1.0  # S3 tells times in whole seconds
PROBE_BYTES = 1 << 20
PORTS_S = 60  # that ranks wait for each other
NODE_S = 900.0  # that a node has for its answer: a store that is away is asked for up to 5 minutes, some times
PACKAGES = ("torch", "deepspeed", "ray")


class Finding(NamedTuple):
    """What was found of one thing in one place."""

    what: str
    says: str
    where: str
    is_bad: bool = False


def check_health(config: Config, *, alone: bool) -> None:
    """Look at everything and print it. Raises `InputError` with all that fails. `alone`: in this process only."""
    if is_torchrun():
        findings = _ask_ranks(config)
        if torchrun_rank()[0]:
            return  # rank 0 says it; torchrun would end that rank where another one had failed before
    elif alone:
        findings = [*look_at_node(config), look("device", lambda: describe_device(config))]
    else:
        findings = _ask_nodes(config)
    findings = compare_versions(findings)
    print_findings(findings)
    if failed := [f"{finding.what} on {finding.where}: {finding.says}" for finding in findings if finding.is_bad]:
        raise InputError("\n  ".join([f"{len(failed)} of {len(findings)} checks failed", *failed]))


def look(what: str, describe: Callable[[], str], *, where: str = "") -> Finding:
    """Return what `describe` says of a thing; what it refuses is a finding too."""
    where = where or socket.gethostname()
    try:
        return Finding(what, describe(), where)
    except (InputError, StorageError, OSError) as error:
        return Finding(what, str(error), where, is_bad=True)


def look_at_node(config: Config, note: str = "") -> list[Finding]:
    """Look at what all ranks of a node share. `note` stands for a file that a run's starter left: see `same_disk`."""
    findings = [look("storage", lambda: describe_storage(config.run.storage))]
    if not findings[0].is_bad:
        findings.append(look("clock", lambda: describe_clock(config.run.storage)))
    if note and not storage.is_s3(note):
        findings.append(look("same disk", lambda: check_seen(note) or "this host sees what the first one wrote"))
    num_bytes: list[int] = []
    return [
        *findings,
        look("data", lambda: describe_data(config, num_bytes)),
        look("cache", lambda: describe_cache(config, num_bytes=num_bytes[0] if num_bytes else None)),
        look("versions", describe_versions),
    ]


def describe_storage(uri: str) -> str:
    """Write, read back, replace, list and delete an object; say how long it took. Raises `InputError`, `StorageError`.

    Below a local directory that is not there yet nothing is made: the nearest one above it stands for it.
    """
    storage.check_writable(uri, flag="--run.storage")
    place, name = _standing(uri), f".check-{secrets.token_hex(6)}/object"
    probe, began = storage.join(place, name), time.monotonic()
    try:
        for content in (b"first", secrets.token_bytes(PROBE_BYTES)):
            storage.write_bytes(probe, content)
            if storage.read_bytes(probe) != content:
                raise InputError(f"{probe} was written, and something else was read back: give another --run.storage")
        if [found.name for found in storage.list_objects(probe.rpartition("/")[0])] != ["object"]:
            raise InputError(f"{probe} was written, and is not listed: checkpoints would not be found again")
        storage.delete(probe)
        if storage.exists(probe):
            raise InputError(f"{probe} was deleted, and is still there: old checkpoints would stay for ever")
    finally:
        storage.delete_all(probe.rpartition("/")[0])
    return f"{uri}: written, read, replaced, listed, deleted in {time.monotonic() - began:.1f} s"


def describe_clock(uri: str, *, clock: Callable[[], float] = time.time) -> str:
    """Compare this machine's clock with the store's. Raises `InputError` where they are too far apart."""
    probe = storage.join(_standing(uri), f".check-{secrets.token_hex(6)}")
    try:
        before = clock()
        storage.write_bytes(probe, b"")
        after = clock()
        ahead = clock_skew(before, storage.written_at(probe), after)
    finally:
        storage.delete(probe)
    if abs(ahead) > MAX_SKEW_S:
        raise InputError(
            f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's; at most "
            f"{MAX_SKEW_S:.0f} s are expected: set it by NTP (S3 refuses requests at 15 minutes)"
        )
    return "as the store's" if not ahead else f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"


def clock_skew(before: float, written: float, after: float) -> float:
    """Return the seconds that our clock is ahead of the store's, negative where behind, as far as they are certain.

    The store wrote at some time between our `before` and `after`, and tells it in whole seconds, rounded down.
    """
    return max(before - written - TICK_S, 0.0) or min(after - written, 0.0)


def describe_data(config: Config, num_bytes: list[int]) -> str:
    """Open both sets and look whether all shards are there. Bytes that nodes fetch are appended to `num_bytes`."""
    data = open_data(fill_in_widths(config))
    pairs = data.train.pairs() + (data.val.pairs() if data.val and not data.val.part else [])
    for uri, index in pairs:
        check_stored(uri, index)
    num_bytes.append(sum(shard.tar_bytes for uri, index in pairs if storage.is_s3(uri) for shard in index.shards))
    shards = sum(len(index.shards) for _, index in pairs)
    num_val = data.val.rows if data.val else 0
    return f"{data.train.rows:,} rows to train, {num_val:,} to validate, {shards:,} shards, all there"


def describe_cache(config: Config, *, num_bytes: int | None) -> str:
    """Compare the room for the shards of this node. `num_bytes` of them are fetched; None: unknown."""
    if not any(map(storage.is_s3, (*config.data.train, *config.data.val))):
        return "not needed: shards are read in place"
    cache = Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    place = Path(_standing(str(cache.directory)))
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{cache.directory} cannot be written to; give --data.cache-dir a directory that can")
    held = sum(path.stat().st_size for path in place.iterdir() if OWN_NAME.fullmatch(path.name) and path.is_file())
    free = shutil.disk_usage(place).free
    needed = cache.max_bytes if num_bytes is None else min(cache.max_bytes, num_bytes)
    room = f"{cache.directory} has {free / GIB:.1f} GiB free and holds {held / GIB:.1f}"
    if free + held < needed:
        raise InputError(
            f"{room}; {needed / GIB:.1f} are needed (data.cache_gib {config.data.cache_gib:g}): make room, give "
            "another --data.cache-dir, or lower --data.cache-gib"
        )
    return f"{room}; {needed / GIB:.1f} are needed"


def describe_versions() -> str:
    """Name the versions that all nodes must share. Raises `InputError` for what is not installed."""
    try:
        found = [f"{package} {version(package)}" for package in PACKAGES]
    except PackageNotFoundError as error:
        raise InputError(f"{error.name} is not installed; install mtl_dist with its dependencies") from None
    return ", ".join([f"python {platform.python_version()}", *found, f"mtl_dist {__version__}"])


def compare_versions(findings: list[Finding]) -> list[Finding]:
    """Mark the versions of a place that differ from those of most places."""
    counts = Counter(finding.says for finding in findings if finding.what == "versions" and not finding.is_bad)
    if len(counts) < 2:
        return findings
    most = counts.most_common(1)[0][0]
    return [
        finding._replace(says=f"{finding.says}; most nodes have {most}: install the same on all", is_bad=True)
        if finding.what == "versions" and not finding.is_bad and finding.says != most
        else finding
        for finding in findings
    ]


def describe_device(config: Config, *, num_gpus: float | None = None) -> str:
    """Try the device of this rank; of a node of Ray's, which counts `num_gpus`, all of them. Raises `InputError`."""
    if num_gpus and not has_gpus():
        raise InputError(f"Ray counts {num_gpus:g} GPU(s) here, and torch can use none: look at the driver")
    if num_gpus is None:
        indices = [int(os.environ.get("LOCAL_RANK", 0))] if check_device(config, has_gpu=has_gpus()) == "cuda" else []
    else:
        indices = list(range(int(num_gpus)))
    if not indices:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"{num_cpus()} CPU(s) for this process, the machine has {memory / GIB:.1f} GiB of memory"
    return "; ".join(map(_try_gpu, indices))


def _check_index(index: int) -> int:
    if index >= (count := torch.cuda.device_count()):
        raise InputError(f"there is no GPU {index} on this node: torch sees {count}; start fewer ranks on it")
    return index


def _try_gpu(index: int) -> str:
    _check_index(index)
    try:
        torch.ones(8, device=f"cuda:{index}").sum().item()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        raise InputError(f"GPU {index} does not compute: {str(error).splitlines()[0]}") from None
    return f"GPU {index}, {torch.cuda.get_device_name(index)}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def print_findings(findings: list[Finding]) -> None:
    """Print one table."""
    table = Table("", "what", "where", "found", box=None, pad_edge=False)
    for finding in findings:
        mark = "[red]FAILED[/red]" if finding.is_bad else "ok"
        table.add_row(mark, finding.what, escape(finding.where), escape(plain(finding.says)))
    Console().print(table)


def _standing(uri: str) -> str:
    """Return a prefix of S3 as it is; of a local directory the nearest one, from it upwards, that is there."""
    if storage.is_s3(uri):
        return uri
    path = storage.local_path(uri).absolute()
    return str(next(place for place in (path, *path.parents) if place.is_dir()))


def _note_of(config: Config) -> str:
    return storage.join(_standing(config.run.storage), f"failed-check-{secrets.token_hex(6)}.json")


def _ask_ranks(config: Config) -> list[Finding]:
    """Meet the other ranks of torchrun and return what all found; where they do not meet, what this one found."""
    rank, num_ranks = torchrun_rank()
    own = f"rank {rank} on {socket.gethostname()}"
    use_cuda = has_gpus() and config.engine.device != "cpu"
    if use_cuda:
        torch.cuda.set_device(_check_index(int(os.environ["LOCAL_RANK"])))

    def meet() -> str:
        try:
            join_torchrun("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timedelta(seconds=PORTS_S))
            for device in ["cpu", "cuda"] if use_cuda else ["cpu"]:
                met = torch.ones(1, device=device)
                dist.all_reduce(met)
                if met.item() != num_ranks:
                    raise InputError(f"{num_ranks} ranks added 1 each on {device}, and got {met.item():g}")
        except RuntimeError as error:
            raise InputError(
                f"the ranks do not reach each other: {str(error).splitlines()[0]}; look at firewalls, and at the "
                "network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            ) from None
        return f"{num_ranks} ranks met and added up"

    ports = look("ports", meet, where=own)
    device = look("device", lambda: describe_device(config), where=own)
    if ports.is_bad:
        findings = [ports, *_of_rank(config, device)]
        for finding in filter(lambda finding: rank and finding.is_bad, findings):  # nobody else will say it
            print(f"error: {finding.what} on {own}: {plain(finding.says)}", file=sys.stderr)
        return findings
    patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=NODE_S))
    notes, findings_of = [_note_of(config)], [[] for _ in range(num_ranks)]
    dist.broadcast_object_list(notes, group=patient)
    with seen_by_all(notes[0]) if not rank else contextlib.nullcontext():
        dist.barrier(group=patient)  # rank 0 has left its file
        dist.all_gather_object(findings_of, _of_rank(config, device, notes[0]), group=patient)
    return [ports, *(finding for findings in findings_of for finding in findings)]


def _of_rank(config: Config, device: Finding, note: str = "") -> list[Finding]:
    return [*(look_at_node(config, note) if is_first_of_node() else []), device]


def _ask_nodes(config: Config) -> list[Finding]:
    """Return what tasks on all nodes of the Ray cluster found. Raises `InputError` where no cluster answers."""
    join_cluster("check this process with --local")
    room = f"{config.ray.num_ranks[0]} to {config.ray.num_ranks[1]} rank(s)"
    findings = [look("room", lambda: connect(config) or room, where="the cluster")]
    task = {"config": config.model_dump(mode="json"), "note": _note_of(config)}
    with seen_by_all(task["note"]):
        for address, answer in ask_every_node(_of_node, task, timeout_s=NODE_S):
            if isinstance(answer, Exception):
                cause = getattr(answer, "cause", None) or answer
                says = f"no answer: {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
                findings.append(Finding("node", says, address, is_bad=True))
            else:
                findings += [finding._replace(where=address) for finding in answer]
    return findings


def _of_node(task: dict[str, Any], num_gpus: float) -> list[Finding]:
    """Look at this node, as a task of Ray."""
    config = Config(**task["config"])
    device = look("device", lambda: describe_device(config, num_gpus=num_gpus))
    return [*look_at_node(config, task["note"]), device]
