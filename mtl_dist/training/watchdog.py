"""Find a rank that hangs. All others would wait for it in a collective for ever, and nothing else would say so.

A thread in every rank looks whether training moves. Where it has not moved for `limit_s`, the thread names the ranks
that are behind, prints where this one stands, and ends the process. Ray, torchrun or a person starts the ranks again.
"""

from __future__ import annotations

import enum
import faulthandler
import json
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL
TICK_S = 1.0
POST_EVERY_S = 3.0
NAMING_S = 20.0
ASLEEP_S = 10.0  # a tick that took so long: the whole process was stopped, not training alone


class Phase(enum.Enum):
    """What a rank is at, in the order in which it comes to it; of one step, or of none yet."""

    STARTING = "starting"
    LABELS = "reading the labels of the training set"
    RESTORING = "reading the checkpoint"
    BUILDING = "building the model"
    DATA = "waiting for the data of step {step}"
    STEP = "step {step}"
    EVALUATION = "the evaluation after step {step}"
    STORING = "storing the checkpoint of step {step}"

    def words(self, step: int) -> str:
        """Say what a rank does in this phase, for a message."""
        return self.value.format(step=step)


class Watchdog:
    """Watches the rank of this process within a `with` block; `moved` tells it of every step."""

    def __init__(self, *, limit_s: float):
        self.limit_s, self.rank, self.num_ranks = limit_s, dist.get_rank(), dist.get_world_size()
        self._at = (0, Phase.STARTING)
        self._moved = time.monotonic()
        self._posts, self._gives_up = 0, False
        self._ended = threading.Event()
        # A connection of its own: the main thread may be waiting in the other one.
        self._store = dist.distributed_c10d._get_default_store().clone() if self.num_ranks > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def moved(self, phase: Phase, step: int = 0) -> None:
        """Note that training has come to a phase of a step."""
        self._at, self._moved = (step, phase), time.monotonic()

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join(TICK_S + POST_EVERY_S)  # a daemon: one that waits for a store that is gone is left behind

    def _watch(self) -> None:
        ticked, posted = time.monotonic(), 0.0
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            if now - ticked > ASLEEP_S:
                self._moved += now - ticked
            ticked = now
            if self._store and now - posted > POST_EVERY_S:
                self._post()
                posted = now
            if now - self._moved > self.limit_s:
                self._give_up(now - self._moved)

    def _post(self) -> None:
        if self._store is None:
            return
        step, phase = self._at
        self._posts += 1
        about = {"step": step, "phase": list(Phase).index(phase), "what": phase.words(step)}
        about |= {"host": socket.gethostname(), "posts": self._posts}
        try:
            self._store.set(f"watchdog/{self.rank}", json.dumps(about | {"gives_up": self._gives_up}))
        except RuntimeError:  # the rank that keeps the store is gone: this one's collectives will say so
            self._store = None

    def _give_up(self, still_s: float) -> None:
        step, phase = self._at
        try:
            print(
                f"rank {self.rank} has not moved for {still_s:.0f} s (engine.hang_s): it is at {phase.words(step)}. "
                "Ending it, so that the ranks are started again from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            # In a thread, because the store does not answer where the process that keeps it is stopped.
            naming = threading.Thread(
                target=lambda: print(self._name_behind(), file=sys.stderr, flush=True), daemon=True
            )
            naming.start()
            naming.join(NAMING_S)
        finally:
            os._exit(EXIT_CODE)

    def _name_behind(self) -> str:
        """Say which ranks all the others wait for."""
        if self._store is None:
            return "" if self.num_ranks == 1 else "The rank that keeps the ranks' store is gone."
        self._gives_up = True
        before = self._read_posts()
        for _ in range(3):  # long enough for every living rank to post again
            self._post()
            time.sleep(POST_EVERY_S)
        posts = self._read_posts()
        if not posts:
            return "The rank that keeps the ranks' store is gone."
        silent = [
            rank
            for rank, about in posts.items()
            if not about.get("gives_up") and about.get("posts") == before.get(rank, {}).get("posts")
        ]
        if silent:
            where = [f"rank {rank} on {posts[rank].get('host', 'an unknown host')}" for rank in silent]
            return f"Stopped or gone: {', '.join(where)}."
        first = min((about["step"], about["phase"]) for about in posts.values())
        behind = {rank: about for rank, about in posts.items() if (about["step"], about["phase"]) == first}
        if len(behind) == self.num_ranks:
            return "All ranks stand there."
        named = [f"rank {rank} on {about['host']}, at {about['what']}" for rank, about in behind.items()]
        return f"Behind the others: {', '.join(named)}."

    def _read_posts(self) -> dict[int, dict]:
        """Return what every rank posted last, nothing of one that never did; empty where the store is gone."""
        keys = {rank: f"watchdog/{rank}" for rank in range(self.num_ranks)}
        try:
            return {r: json.loads(self._store.get(key)) if self._store.check([key]) else {} for r, key in keys.items()}
        except (RuntimeError, AttributeError):  # AttributeError: `_post` found it gone
            return {}
