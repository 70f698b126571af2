"""Ranks of tests: processes that are forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import ProcessContext, start_processes

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch._dynamo", "tests.test_recipes"])  # optimizers ask for the first


def start_ranks(
    main: Callable[..., None], args: tuple[Any, ...], num_ranks: int, *, join: bool = True
) -> ProcessContext | None:
    """Run `main(rank, *args)` in so many processes, with this one's environment; raise what one of them raised."""
    return start_processes(
        _begin, (main, dict(os.environ), args), nprocs=num_ranks, join=join, start_method="forkserver"
    )


def _begin(rank: int, main: Callable[..., None], environment: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)  # the server has that of the time when it began
    main(rank, *args)
