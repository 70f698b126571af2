"""A sink that is a server somewhere: told of by a thread, so that training never waits for it, nor fails with it.

Every step is there once, whatever failed. A service says which steps it has when it is found (again), and is sent later
ones only: those that a killed run does again are not repeated. What it lacks of the steps before the checkpoint that a
run continues from comes from metrics.jsonl. So what is not sent to the end is sent by the next start.

A process that was frozen or cut off, and has a successor, sends nothing more: the successor sends the same steps.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mtl_dist.errors import plain
from mtl_dist.runs.lives import Stale, Superseded
from mtl_dist.training.sinks.sink import Ending, Known, Row, Service

SEND_EVERY_S, RETRY_EVERY_S = 2.0, 30.0
CHECK_EVERY_S = 10.0  # whether this is the latest start of the run
PATIENCE_S: dict[Ending, float] = {"finished": 20.0, "stopped": 10.0, "failed": 5.0}  # at the end
MAX_WAITING = 20_000  # steps that are not sent; with more than these it is left to the next start
ROWS_AT_ONCE = 500
MAX_REASON = 200  # characters


class Sender:
    """A `Sink` of a service. `history` gives the steps before this start, as metrics.jsonl has them.

    `check` raises `Superseded` or `Stale` where a later start has the run.
    """

    def __init__(
        self,
        service: Service,
        history: Callable[[], Iterable[Row]] = list,
        check: Callable[[], None] = lambda: None,
    ):
        self._service, self._history, self._check = service, history, check
        self._checked = float("-inf")
        self._row: Row | None = None  # of the last step: more may come of it
        self._waiting: deque[Row] = deque()
        self._ended: tuple[Ending, Mapping[str, bytes]] | None = None
        self._closing = threading.Event()
        self._is_full = self._is_over = self._has_warned = False
        self._thread = threading.Thread(target=self._work, name=service.name, daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._row_of(step).values.update(values)

    def show(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._row_of(step).pictures[name] = pixels

    def files(self) -> dict[str, list[bytes]]:
        return {}

    def close(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        """Send what is left; a server that does not answer is given up after `PATIENCE_S`."""
        self._put()
        self._ended = ending, files
        self._closing.set()
        self._thread.join(PATIENCE_S[ending])
        if not self._is_over:
            self._warn(f"it did not take all within {PATIENCE_S[ending]:.0f} s")

    def _row_of(self, step: int) -> Row:
        """Return the row of a step. That of the one before is whole then: a service has all of a step, or nothing."""
        if self._row is None or self._row.step != step:
            self._put()
            self._row = Row(step, {}, {})
        return self._row

    def _put(self) -> None:
        row, self._row = self._row, None
        if len(self._waiting) >= MAX_WAITING and not self._is_full:
            self._is_full = True  # for good: of what it has the next start knows only where it ends
            self._warn(f"{MAX_WAITING} steps wait for it, and no more will")
        if row and not self._is_full:
            self._waiting.append(row)

    def _work(self) -> None:
        is_last = False
        while not self._is_over and not is_last:
            is_last = self._closing.is_set()
            try:
                self._tell()
                self._is_over = True
            except (Superseded, Stale):  # the next save ends this process, and says so
                self._is_over = True
            except Exception as error:  # of a client of others, which raises what it likes
                self._warn(f"{type(error).__name__}: {error}")
                if not is_last:
                    self._closing.wait(RETRY_EVERY_S)

    def _tell(self) -> None:
        """Find the service, and send it all that it lacks until the run has ended."""
        self._checked = float("-inf")
        self._check_current()
        known = self._service.begin()
        self._send(known, self._history())
        while True:
            is_closing = self._closing.wait(SEND_EVERY_S)
            while rows := [self._waiting[place] for place in range(min(len(self._waiting), ROWS_AT_ONCE))]:
                self._send(known, rows)
                for _ in rows:  # sent: what fails before stays
                    self._waiting.popleft()
            if is_closing and self._ended:
                self._check_current()
                self._service.finish(*self._ended)
                return

    def _send(self, known: Known, rows: Iterable[Row]) -> None:
        lacking = [row for row in map(known.lacks, rows) if row.values]
        for begin in range(0, len(lacking), ROWS_AT_ONCE):
            part = lacking[begin : begin + ROWS_AT_ONCE]
            self._check_current()
            self._service.send(part)
            known.note(part)

    def _check_current(self) -> None:
        """Ask now and then whether this is the latest start: after a long silence, always."""
        if time.monotonic() - self._checked > CHECK_EVERY_S:
            self._check()
            self._checked = time.monotonic()

    def _warn(self, reason: str) -> None:
        """Say once that the service fails."""
        if not self._has_warned:
            self._has_warned = True
            print(
                f"{self._service.name} does not answer ({tellable(reason)}): the run goes on; what is missing there is "
                "sent when it does, or when the same command starts again",
                flush=True,
            )


def tellable(reason: str) -> str:
    """Return what a client of others says as we may say it: in a line, of bounded length, without a password."""
    return re.sub(r"//[^/@\s]+@", "//", " ".join(plain(reason).split()))[:MAX_REASON]


def milliseconds() -> int:
    """Return the time now, in ms since 1970."""
    return time.time_ns() // 10**6
