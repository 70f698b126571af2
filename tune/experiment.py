"""What Ray Tune is handed: who draws trials, who stops the weak ones, who tells of them; so that a search continues."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator

from mtl_dist.errors import InputError, RunFailed, StorageError
from mtl_dist.objective.scores import FIRST, Score
from tune.trial import DIVERGED, EPOCH

Evaluations = list[tuple[int, float]]  # of a trial: epoch and score


def build_searcher(algorithm: str, *, seed: int, limit: int | None) -> BasicVariantGenerator | ConcurrencyLimiter:
    """Build what draws trials, `limit` at a time: Ray takes no notice of its own `max_concurrent_trials` beside one."""
    if algorithm == "random":
        return RandomSearch(max_concurrent=limit or 0, random_state=seed)
    try:
        import optuna  # noqa: F401  Ray asserts where it is missing
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise InputError(
            "search.algorithm is optuna, which is not installed; pip install 'mtl_dist[search]' on every node"
        ) from None
    searcher = OptunaSearch(seed=seed % 2**32)  # numpy's old generator takes no more
    return LimitedSearch(searcher, max_concurrent=limit) if limit else searcher


class RandomSearch(BasicVariantGenerator):
    """Ray's, with this start's limit where a search continues, not the first start's."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"max_concurrent": self.max_concurrent})


class LimitedSearch(ConcurrencyLimiter):
    """Ray's, which where a search continues no longer knows its trials, and never tells the searcher how they end."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.live_trials.add(trial_id)
        super().on_trial_complete(trial_id, result=result, error=error)


class Asha(ASHAScheduler):
    """Ray's ASHA, but a trial at its last evaluation ends by itself: stopped there, it would lose the checkpoint that
    is being stored. And where a search continues, its rungs hold what trials scored before."""

    def __init__(self, *, epochs: int, grace_epochs: int, reduction: int, earlier: Mapping[str, Evaluations]):
        super().__init__(
            time_attr=EPOCH,
            max_t=epochs,
            grace_period=min(grace_epochs, epochs),
            reduction_factor=reduction,
            stop_last_trials=False,
        )
        self._epochs, self._earlier, self._must_restore = epochs, earlier, bool(earlier)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        # Ray adds the earlier trials first. Where it cannot read them, it logs that, and would begin a new search.
        if self._must_restore and trial.trial_id not in self._earlier:
            raise StorageError(
                "the search could not be continued, as is logged above; the same command may succeed later"
            )
        self._must_restore = False
        for epoch, value in self._earlier.get(trial.trial_id, ()):
            super().on_trial_result(tune_controller, trial, {EPOCH: epoch, self._metric: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(EPOCH, 0) >= self._epochs else decision


class Reporter(Callback):
    """Prints a line at each evaluation of a trial, and how and why it ended, with the time left."""

    def __init__(self, *, num_trials: int, num_ended: int, score: Score = FIRST):
        self.score = score
        self.begun, self.num_trials, self.earlier, self.ended = time.monotonic(), num_trials, num_ended, set[str]()

    @property
    def num_ended(self) -> int:
        return self.earlier + len(self.ended)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        score = self.score
        if score.key in result and DIVERGED not in result:
            print(f"trial {trial.trial_id}  epoch {result[EPOCH]}  {score.title} {result[score.key]:.4f}", flush=True)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Say that a trial is started again. A driver that died with its node is, several times; an error may have
        been the store's, and gets one more try."""
        error = _read_error(trial)
        if not isinstance(error, RayActorError):
            trial.max_failures = min(trial.max_failures, trial.num_failures)
        print(f"trial {trial.trial_id} failed and is started again: {explain(error)}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        diverged = (trial.last_result or {}).get(DIVERGED)
        self._ended(trial, f"diverged: {diverged}" if diverged else "finished")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial, f"failed: {explain(_read_error(trial))}")

    def _ended(self, trial: Any, what: str) -> None:
        self.ended.add(trial.trial_id)
        left = (time.monotonic() - self.begun) / len(self.ended) * (self.num_trials - self.num_ended)
        print(
            f"trial {trial.trial_id} {what}\n{self.num_ended} of {self.num_trials} trials, about {left:.0f} s left",
            flush=True,
        )


def evaluations(frame: Any, metric: str) -> Evaluations:
    """Return what a trial scored of the table of its reports; those that are no numbers, or none, are left out."""
    if frame is None or metric not in frame:
        return []
    if DIVERGED in frame:
        frame = frame[frame[DIVERGED].isna()]
    return [(int(epoch), float(value)) for epoch, value in zip(frame[EPOCH], frame[metric]) if math.isfinite(value)]


def explain(error: BaseException | str | None) -> str:
    """Say in full why a trial failed: the message alone where it is one for the user."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, InputError | StorageError | RunFailed) or not isinstance(cause, BaseException):
        return str(cause)
    return f"{type(cause).__name__}: {str(cause).strip()}"


def _read_error(trial: Any) -> BaseException | str:
    """Return the last error of a trial, from this process's own files: its storage has it later."""
    try:
        return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # of a class that cannot be read again; its text can
        return Path(trial.error_file).read_text() if trial.error_file else "no reason is known"
