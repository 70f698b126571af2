"""Threads that may be left behind: one that waits for a store that is silent must not keep a process from ending.

`concurrent.futures` waits for its threads when they are closed and, whatever one does, when the interpreter ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any


class DaemonThreads:
    """A few threads that run what is submitted, in its order.

    Leaving a `with` block waits for what is running, but not after Ctrl-C: what it does then is of no use to anyone.
    """

    def __init__(self, count: int, name: str):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Any]) -> Future:
        """Have a thread make the call. The future has its result, or the exception it raised."""
        future: Future = Future()
        self._tasks.put((future, call))
        return future

    def map(self, call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield `call` of every item, in their order."""
        futures = deque(self.submit(lambda item=item: call(item)) for item in items)
        return (futures.popleft().result() for _ in range(len(futures)))  # what was yielded is not kept

    def close(self, *, patience_s: float | None = None) -> None:
        """Drop what has not begun and end the threads; those that still run after `patience_s` are left behind.

        What they do goes on to its end, so it must touch nothing that is closed or reused after this. None: wait.
        """
        give_up = None if patience_s is None else time.monotonic() + patience_s
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(None if give_up is None else max(give_up - time.monotonic(), 0))

    def __enter__(self) -> DaemonThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        self.close(patience_s=0 if kind is not None and issubclass(kind, KeyboardInterrupt) else None)

    def _work(self) -> None:
        while task := self._tasks.get():
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call, task  # an idle thread must not keep a batch
