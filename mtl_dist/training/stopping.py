"""Ctrl-C and SIGTERM of a run's driver under Ray, passed on to its ranks: they save after the step, and end.

The driver keeps a flag, an actor on its own node; rank 0 asks it now and then. `ray job stop` sends SIGTERM, and kills
the driver after RAY_JOB_STOP_WAIT_TIME_S, 3 s by default: the image and `cluster.local` set 60.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

ASK_EVERY_S = 2.0
ANSWER_S = 5.0  # an actor that takes longer has gone, and Ray ends the run by itself


class _Flag:
    """An actor of Ray."""

    def __init__(self):
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def get(self) -> bool:
        return self.is_set


class DriverSignals:
    """What signals this driver got, while a run is in its hands."""

    def __init__(self, name: str):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._flag = ray.remote(_Flag).options(name=name, num_cpus=0, scheduling_strategy=here).remote()
        ray.get(self._flag.get.remote())  # it is there before the first rank asks
        self.signal = 0  # the first one
        self._received = threading.Event()
        # Not in the handler: it runs within whatever call of Ray's the driver is in.
        threading.Thread(target=self._pass_on, name="stop", daemon=True).start()

    def ask(self, number: int, frame) -> None:
        """Take a signal; a second Ctrl-C ends the driver, and Ray the run, without saving."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        os.write(1, b"stopping after this step ...\n")  # print may be interrupted here by itself
        self._received.set()

    def _pass_on(self) -> None:
        self._received.wait()
        self._flag.set.remote()


@contextlib.contextmanager
def driver_signals(name: str) -> Iterator[DriverSignals | None]:
    """Take this process's SIGINT and SIGTERM for the block; None in a thread that gets no signals (a trial's)."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    taken = DriverSignals(name)
    before = {number: signal.signal(number, taken.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopFlag:
    """The driver's flag, as rank 0 sees it."""

    def __init__(self, name: str):
        self._name, self._flag, self._asked, self.is_set = name, None, 0.0, False

    def ask(self) -> bool:
        """Whether the driver was told to stop; asks it every two seconds at most."""
        import ray
        from ray.exceptions import RayError

        if self.is_set or time.monotonic() - self._asked < ASK_EVERY_S:
            return self.is_set
        self._asked = time.monotonic()
        try:
            self._flag = self._flag or ray.get_actor(self._name)
            self.is_set = ray.get(self._flag.get.remote(), timeout=ANSWER_S)
        except (RayError, ValueError):  # a trial's driver has none; one that died takes the run with it
            pass
        return self.is_set
