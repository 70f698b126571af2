"""Processes that end with the one that started them, however that ends: killed, it can tell them nothing.

What they wait for, a queue that they share with each other, never ends by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from mtl_dist.errors import InputError

# A forked copy of a process that holds connections, threads or CUDA is not safe to use.
spawn = multiprocessing.get_context("spawn")
LOOK_EVERY_S = 0.5  # for Ctrl-C
LISTEN_S = 0.1  # for more that is told, once all is done

Key, Item, Result = TypeVar("Key"), TypeVar("Item"), TypeVar("Result")


@contextlib.contextmanager
def process_pool(
    processes: int, *, begin: Callable[..., Any] | None = None, args: tuple = ()
) -> Iterator[ProcessPoolExecutor]:
    """Give a pool whose processes end with this one; each calls `begin(*args)` first.

    At an error what has not begun is dropped. Raises `InputError` where a process was killed.
    """
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(begin, args))
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(
            f"one of {processes} processes was killed, perhaps since no memory was left; give the same command again "
            "with a smaller --jobs, which needs less: what is finished stays"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def as_done(
    pool: ProcessPoolExecutor, call: Callable[[Item], Result], items: dict[Key, Item]
) -> Iterator[tuple[Key, Result]]:
    """Yield the key of every item with `call` of it, as they are done."""
    futures = {pool.submit(call, item): key for key, item in items.items()}
    waiting = set(futures)
    while waiting:
        done, waiting = wait_for(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        for future in done:
            yield futures[future], future.result()


@contextlib.contextmanager
def telling(progress: Callable[[int], None]) -> Iterator[Any]:
    """Give a queue for processes to tell numbers of; `progress` is called with each meanwhile."""
    told, is_over = spawn.Queue(), threading.Event()

    def listen() -> None:
        while True:
            try:
                progress(told.get(timeout=LISTEN_S))
            except queue.Empty:
                if is_over.is_set():
                    return

    listener = threading.Thread(target=listen, name="progress", daemon=True)
    listener.start()
    try:
        yield told
    finally:
        is_over.set()
        listener.join()


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
