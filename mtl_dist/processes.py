"""Processes that end with the one that started them, however that ends: killed, it can tell them nothing.

What they wait for, a queue that they share with each other, never ends by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

# A forked copy of a process that holds connections, threads or CUDA is not safe to use.
spawn = multiprocessing.get_context("spawn")


def process_pool(processes: int, *, begin: Callable[..., Any] | None = None, args: tuple = ()) -> ProcessPoolExecutor:
    """Return a pool whose processes end with this one; each calls `begin(*args)` first."""
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(begin, args))


def end_with_parent() -> None:
    """End this process, which was spawned, as soon as the one that spawned it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])  # a pipe that the parent alone holds open
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def with_parent(command: list[str]) -> list[str]:
    """Return a command that is sent SIGTERM when the thread that started it ends; as it is where no `setpriv` is."""
    setpriv = shutil.which("setpriv")  # of util-linux; the kernel does the rest
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


def _begin(begin: Callable[..., Any] | None, args: tuple) -> None:
    end_with_parent()
    if begin:
        begin(*args)
