"""Save checkpoints while training goes on: a copy of the tensors is all that the loop waits for.

Rank 0 writes, hashes and uploads in a thread, one checkpoint at a time, COMMIT last; then it deletes what retention
gives up. A store that is away costs the checkpoint, not the run: the next one is tried, and only the last must succeed.

What is not the latest start of the run writes nothing: see `lives.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist import storage
from mtl_dist.errors import InputError, StorageError
from mtl_dist.objective.scores import find_score, flat_scores, tables
from mtl_dist.runs.checkpoint import (
    CLASSES,
    COMMIT,
    DIRECTORY,
    FORMAT,
    MODEL,
    STATE,
    TRAIN,
    Checkpoint,
    committed,
    newness,
)
from mtl_dist.runs.lives import Life, Superseded
from mtl_dist.sealed import seal
from mtl_dist.sections import CheckpointConfig

HOUR_S = 3600.0
TICK_S = 1.0


class Saver:
    """Saves checkpoints of a run in the background. Every rank has one; only rank 0's writes."""

    def __init__(self, run_uri: str, config: CheckpointConfig, *, life: Life, clock: Callable[[], float] = time.time):
        self.run_uri, self.config, self.life, self.clock = run_uri, config, life, clock
        self.saved: Checkpoint | None = None  # the last that was committed
        self.is_writer = dist.get_rank() == 0
        self.on_wait: Callable[[], None] = lambda: None  # called now and then by whoever waits for a save
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step = 0
        self._failed: Exception | None = None
        self._records: dict[str, list[bytes]] = {}  # not written yet; the thread's while a save is under way
        self._said: set[str] = set()  # what could not be deleted

    def save(
        self,
        model: dict[str, Tensor],
        train: dict[str, Tensor],
        *,
        begun: float,
        state: dict[str, Any],
        scores: dict[str, Any],
        records: dict[str, list[bytes]],
    ) -> None:
        """Copy the tensors and store them in the background; `begun` (monotonic) is when training stopped for it.

        Waits for the checkpoint before, where it is not stored yet. `records`, files of the run in pieces, are written
        before the COMMIT: what is beyond the step that a run continues from is dropped, what is missing would stay
        missing. Those of a save that fails are written with the next one.
        """
        if not self.is_writer:
            return
        self.wait()
        copies = [{name: _copy(tensor) for name, tensor in tensors.items()} for tensors in (model, train)]
        self._pending_step = state["step"]
        self._records |= records
        self._pending = self._pool.submit(self._store, *copies, state, flat_scores(scores), time.monotonic() - begun)

    def is_idle(self) -> bool:
        """Whether no save is under way."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Wait for the save under way. Faults of the store are said, not raised: the next save may succeed.

        Raises `Superseded` or `Stale` where another process writes this run now.
        """
        if self._pending is None:
            return
        while not self.is_idle():
            wait([self._pending], timeout=TICK_S)
            self.on_wait()
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._failed = None
        except Superseded:
            raise
        except (InputError, OSError) as error:
            self._failed = error
            last = f"the last is {self.saved.uri}" if self.saved else "there is none of this start yet"
            print(f"checkpoint of step {self._pending_step} was not stored ({last}): {error}", flush=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Wait for the last save. Raises what kept it from being stored, unless something else is being raised."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
        if self._failed and error is None:
            raise self._failed

    def _store(self, model, train, state: dict, scores: dict, blocked_s: float) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        begun, step, files = time.monotonic(), state["step"], {}
        uri = storage.join(self.run_uri, "checkpoints", f"step_{step:09d}_{self.life.name}")
        with storage.scratch_directory("save") as scratch:
            for name, tensors in ((MODEL, model), (TRAIN, train)):
                try:
                    save_file(tensors, scratch / name)
                except SafetensorError as error:
                    raise OSError(f"{scratch}/{name} cannot be written: {error}") from None
                tensors.clear()
            (scratch / STATE).write_text(json.dumps(state | {"classes": CLASSES}, indent=1, allow_nan=False))
            for name in (MODEL, TRAIN, STATE):
                path = scratch / name
                files[name] = {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
                storage.upload(path, storage.join(uri, name))
        for name in list(self._records):
            self.life.check_current()
            storage.write_bytes(storage.join(self.run_uri, name), b"".join(self._records[name]))
            del self._records[name]
        self.life.check_current()
        checkpoint = Checkpoint(uri, step, scores, self.clock(), files, self.life.number)
        commit = {
            "format": FORMAT,
            "step": step,
            "scores": scores,
            "saved_at": checkpoint.saved_at,
            "start": checkpoint.start,
            "blocked_s": round(blocked_s, 4),  # what the loop waited, and what all of it took
            "save_s": round(blocked_s + time.monotonic() - begun, 4),
            "files": files,
        }
        storage.write_bytes(storage.join(uri, COMMIT), seal(commit))
        self.saved = checkpoint
        self._apply_retention(checkpoint)

    def _apply_retention(self, newest: Checkpoint) -> None:
        """Delete what `plan_retention` gives up, and what no COMMIT vouches for; a COMMIT goes before its files.

        Checkpoints beyond the newest stay: a damaged one was passed over, and they are written anew on the way. Of
        torn directories only those of this life and of earlier ones go: a later one may be under way. What may not be
        deleted stays: the newest checkpoint is whole all the same.
        """
        root, former = storage.join(self.run_uri, "checkpoints"), set(self.life.names())
        try:
            self.life.check_current()
            checkpoints, _ = committed(self.run_uri)
            names = [stored.name for stored in storage.list_objects(root)]
            directories = storage.list_directories(root)
        except Superseded:
            raise
        except (InputError, OSError) as error:
            self._say_kept(f"old checkpoints of {self.run_uri}", error)
            return
        planned = plan_retention(
            [checkpoint for checkpoint in checkpoints if checkpoint.step <= newest.step], self.config
        )
        whole = {name.partition("/")[0] for name in names if name.endswith(f"/{COMMIT}")}
        torn = [name for name in directories if name not in whole and DIRECTORY.fullmatch(name)]
        torn = [name for name in torn if DIRECTORY.fullmatch(name)[2] in former]
        for uri in [checkpoint.uri for checkpoint in planned] + [storage.join(root, name) for name in torn]:
            if uri == newest.uri:  # never what was just committed, whatever the clocks say
                continue
            try:
                storage.delete_all(uri, first=COMMIT)
            except StorageError as error:  # the store is away: each of the others would wait for it, too
                self._say_kept(f"old checkpoints of {self.run_uri}", error)
                return
            except (InputError, OSError) as error:
                self._say_kept(uri, error)

    def _say_kept(self, what: str, error: Exception) -> None:
        """Say once that something could not be deleted; every save tries again."""
        if what not in self._said:
            self._said.add(what)
            print(f"{what}: not deleted, and kept ({error})", flush=True)


def plan_retention(saved: list[Checkpoint], config: CheckpointConfig) -> list[Checkpoint]:
    """Return what to delete: all but the last, the best of every score, and one of every so many hours."""
    by_step = {checkpoint.step: checkpoint for checkpoint in sorted(saved, key=newness)}  # the latest start's
    newest_first = sorted(by_step.values(), key=lambda c: c.step, reverse=True)
    keep = {checkpoint.uri for checkpoint in newest_first[: config.keep_last]}
    for score in map(find_score, dict.fromkeys((*(table[0].key for table in tables()), *config.best_of))):
        scored = [(c.finite_score(score.key), c.uri) for c in newest_first if c.finite_score(score.key) is not None]
        ranked = sorted(scored, key=lambda pair: score.sign * pair[0], reverse=True)
        keep |= {uri for _, uri in ranked[: config.keep_best]}
    if config.keep_every_hours:
        milestone = float("-inf")
        for checkpoint in reversed(newest_first):
            # Below 0: of a host whose clock is behind; hours are counted from there.
            if not 0 <= checkpoint.saved_at - milestone < config.keep_every_hours * HOUR_S:
                milestone = checkpoint.saved_at
                keep.add(checkpoint.uri)
    return [checkpoint for checkpoint in saved if checkpoint.uri not in keep]


def _copy(tensor: Tensor) -> Tensor:
    """Copy to the CPU, contiguous: training goes on with the original."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
