"""What a run is watched with while it trains: who is told of it, its times, its pace, and a profile."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtl_dist import storage
from mtl_dist.objective.scores import flat_scores
from mtl_dist.ranks import gather_lists, on_rank_0
from mtl_dist.runs import CONFIG_NAME
from mtl_dist.runs.lives import Life
from mtl_dist.runs.patience import Patience
from mtl_dist.settings import dump_yaml
from mtl_dist.spans import listening
from mtl_dist.training.pace import Pace
from mtl_dist.training.profiling import Profile
from mtl_dist.training.setup import Setup
from mtl_dist.training.sinks.opening import open_sinks
from mtl_dist.training.times import Parts, Times, build_times
from mtl_dist.training.tracking import NoTracker, Tracker, rows_until


@dataclass
class Instruments:
    """What a rank is watched with."""

    tracker: Tracker | NoTracker
    times: Times
    pace: Pace
    profile: Profile

    def cut(self, step: int) -> Parts:
        """Take note of a completed step; return its parts, to be read later."""
        parts = self.times.cut()
        self.profile.passed(step)
        return parts


@contextlib.contextmanager
def open_instruments(
    setup: Setup, *, life: Life, step: int, scores: dict[str, Any], patience: Patience
) -> Iterator[Instruments]:
    """Watch a run that goes on after `step`, and say where it stands. Every rank calls it."""
    context, device = setup.context, setup.device
    hosts, times = gather_lists([socket.gethostname()]), build_times(device)
    first = setup.config.run.profile if context.rank == 0 else None
    profile = Profile(setup.config.run.uri, times, first, device)
    with _open_tracker(setup, life=life, step=step, scores=scores, patience=patience) as tracker, listening(times):
        profile.passed(step)
        try:
            yield Instruments(tracker, times, Pace(hosts, device), profile)
        finally:
            profile.end()


def _open_tracker(
    setup: Setup, *, life: Life, step: int, scores: dict[str, Any], patience: Patience
) -> Tracker | NoTracker:
    """Open what rank 0 writes of the run."""
    config, context, tracker = setup.config, setup.context, NoTracker()
    uri, last_step = config.run.uri, setup.data.steps_per_epoch * config.last_epoch

    def is_over(step: int) -> bool:
        return bool(patience.ended) or step >= last_step

    def open_it() -> None:
        nonlocal tracker
        life.note_step(step)
        written = dump_yaml(config).encode()
        sinks = open_sinks(config, resumed_at=step, history=lambda: rows_until(uri, step), check=life.check_current)
        how = {"num_ranks": context.num_ranks, "is_over": is_over, "kept": {CONFIG_NAME: written}}
        tracker = Tracker(uri, resumed_at=step, sinks=sinks, **how)
        storage.write_bytes(storage.join(uri, CONFIG_NAME), written)
        context.observe(restarts=len(life.known) - 1)

    on_rank_0(open_it)
    if is_over(step):
        context.publish({"step": step, "epoch": step // setup.data.steps_per_epoch, **flat_scores(scores)})
        where = f"step {step} of {setup.total_steps}{patience.ended and f'; {patience.ended}'}"
        tracker.say(f"run '{config.run.name}' is finished ({where}); nothing is left to do")
    return tracker
