"""What torchrun tells its ranks, and how they meet."""

from __future__ import annotations

import hashlib
import os
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mtl_dist.training.restarts import launch_dir


def torchrun_rank() -> tuple[int, int]:
    """Return this process's rank of how many; (0, 1) where it is alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first_of_node() -> bool:
    """Whether this process is the first of its node's ranks, or alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def join_torchrun(backend: str, timeout: timedelta) -> str:
    """Meet the other ranks of torchrun; return the names of all their launchers, one a node.

    Ranks that torchrun starts again meet in the store of the first ones, among the keys those left, and wait for ever.
    A prefix for every attempt mends it on one node. Several nodes count attempts each for itself: there torchrun
    needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as docs/cluster.md says.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = dist.PrefixStore(f"attempt-{attempt}", dist.TCPStore(address, port, is_master=False))
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    launchers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(launchers, _launcher())
    return " ".join(sorted(set(launchers)))


def _launcher() -> str:
    """Name this node's torchrun: a name that no other one has, and that its restarted ranks find again.

    Run id, address and port can be the same at every launch. The directory that torchrun makes for its ranks' errors
    is drawn at random, once; without one every start counts as another command.
    """
    return hashlib.sha256((launch_dir() or uuid.uuid4().hex).encode()).hexdigest()[:16]
