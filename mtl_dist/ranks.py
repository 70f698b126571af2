"""What ranks tell each other of what went wrong, so that all of them raise alike and none waits for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mtl_dist.errors import InputError


def gather_lists(mine: list[Any]) -> list[Any]:
    """Put the lists of all ranks together; every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    found: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return [item for part in found for item in part]


def on_rank_0(call: Callable[[], Any]) -> Any:
    """Return on every rank what `call` returns on rank 0. What it raises is raised on every rank.

    Where there are no ranks, this process is all of them.
    """
    if not dist.is_initialized():
        return call()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [call(), None]
        except (InputError, OSError, RuntimeError) as error:
            answer = [None, error]
        except Exception as error:  # of a class that others may be unable to make from what is sent
            answer = [None, RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")]
            answer[1].__cause__ = error  # stays here, with its traceback
    dist.broadcast_object_list(answer, src=0)
    result, error = answer
    if error:
        raise error
    return result
