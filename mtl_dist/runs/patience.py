"""When training ends before its last epoch: where a score has got no better for `train.patience` evaluations.

Where a run stands is in every checkpoint, so that one which is killed and continued ends at the same step. Rank 0
decides for all: hosts may differ in the last digit of a score.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mtl_dist.config import Config
from mtl_dist.families import objective_of
from mtl_dist.objective.scores import Score, find_score, table_of
from mtl_dist.ranks import on_rank_0

STANDING, ENDED = "standing", "ended"  # in state.json: `Standing`, and why a run has ended early


class Standing(NamedTuple):
    """What the evaluations of a run come to."""

    score: str  # the key of what is watched
    best: float | None = None  # None: none was a number yet
    epoch: int = 0  # of the best, from 1
    since: int = 0  # evaluations after it


def watched_score(config: Config) -> Score:
    """Return what is watched: the first of `checkpoint.best_of` that the model's objective has, else its own first."""
    table = table_of({objective_of(config.model.name).score: None})
    known = {score.key: score for score in table if not score.names}
    return next((known[key] for key in config.checkpoint.best_of if key in known), table[0])


def plan_standing(before: Standing, value: float | None, *, epoch: int) -> Standing:
    """Return where a run stands after an evaluation, of the epoch of this number from 1. Only better is better."""
    is_number = value is not None and math.isfinite(value)
    if is_number and (before.best is None or find_score(before.score).better(value, before.best)):
        return before._replace(best=value, epoch=epoch, since=0)
    return before._replace(since=before.since + 1)


class Patience:
    """Watches a score, from where a checkpoint's `state` says that the run stands."""

    def __init__(self, config: Config, state: dict[str, Any]):
        self._config = config
        kept, score = state.get(STANDING), watched_score(config).key
        # Another score than before: it is watched from here on.
        self._standing = Standing(**kept) if kept and kept["score"] == score else Standing(score)

    def take(self, scores: dict[str, Any], epoch: int) -> None:
        """Take note of an evaluation after an epoch, from 0; every rank calls it. Says where it is the last one."""
        value = scores.get(self._standing.score)
        self._standing = on_rank_0(lambda: plan_standing(self._standing, value, epoch=epoch + 1))
        if self.ended and epoch + 1 < self._config.last_epoch:
            on_rank_0(lambda: print(self.ended, flush=True))

    @property
    def ended(self) -> str:
        """Why training ends here; empty where it does not."""
        of, title = self._standing, find_score(self._standing.score).title
        if not 0 < self._config.train.patience <= of.since:
            return ""
        best = "which had none that is a number" if of.best is None else f"best {of.best:.4f} at epoch {of.epoch}"
        return f"stopped early: no better {title} for {of.since} evaluation{'s' * (of.since > 1)}, {best}"

    def note(self) -> dict[str, Any]:
        """Return what a checkpoint's state keeps."""
        return {STANDING: self._standing._asdict(), **({ENDED: self.ended} if self.ended else {})}
