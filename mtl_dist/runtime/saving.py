"""Save checkpoints while training goes on: a copy of the tensors is all that the loop waits for.

Rank 0 writes, hashes and uploads in a thread, one checkpoint at a time, COMMIT last; then it deletes what retention
gives up. A store that is away costs the checkpoint, not the run: the next one is tried, and only the last must succeed.

A run lives as often as it is started: `lives.json` names the life that may write. A process that was cut off or frozen,
was believed dead, and wakes up beside its successor finds another name there and ends.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist import storage
from mtl_dist.config import CheckpointConfig
from mtl_dist.errors import InputError, StorageError
from mtl_dist.runtime.checkpoint import CLASSES, COMMIT, DIRECTORY, FORMAT, MODEL, STATE, TRAIN, Checkpoint, committed

LIVES = "lives.json"
SCORES = ("p", "va", "expr", "au")  # the best checkpoint of each is kept
HOUR_S = 3600.0
TICK_S = 1.0


class Superseded(InputError):
    """Another command trains the same run, and took over."""


class Stale(RuntimeError):
    """The ranks of this command were started again: this process is one of those before."""


class Saver:
    """Saves checkpoints of a run in the background. Every rank has one; only rank 0's writes."""

    def __init__(self, run_uri: str, config: CheckpointConfig, *, life: str, clock: Callable[[], float] = time.time):
        self.run_uri, self.config, self.life, self.clock = run_uri, config, life, clock
        self.saved: Checkpoint | None = None  # the last that was committed
        self.is_writer = dist.get_rank() == 0
        self.on_wait: Callable[[], None] = lambda: None  # called now and then by whoever waits for a save
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step = 0
        self._failed: Exception | None = None

    def save(
        self,
        model: dict[str, Tensor],
        train: dict[str, Tensor],
        *,
        begun: float,
        state: dict[str, Any],
        scores: dict[str, Any],
        records: dict[str, bytes | list[bytes]],
    ) -> None:
        """Copy the tensors and store them in the background; `begun` (monotonic) is when training stopped for it.

        Waits for the checkpoint before, where it is not stored yet. `records`, files of the run as bytes or lines, are
        written before the COMMIT: what is beyond the step that a run continues from is dropped, what is missing would
        stay missing.
        """
        if not self.is_writer:
            return
        self.wait()
        copies = [{name: _copy(tensor) for name, tensor in tensors.items()} for tensors in (model, train)]
        kept = {name: scores[name] for name in SCORES if scores.get(name) is not None}
        self._pending_step = state["step"]
        self._pending = self._pool.submit(self._store, *copies, state, kept, records, time.monotonic() - begun)

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

    def _store(self, model, train, state: dict, scores: dict, records: dict, blocked_s: float) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        begun, step, files = time.monotonic(), state["step"], {}
        uri = storage.join(self.run_uri, "checkpoints", f"step_{step:09d}_{self.life}")
        with storage.scratch_directory("save") as scratch:
            for name, tensors in ((MODEL, model), (TRAIN, train)):
                try:
                    save_file(tensors, scratch / name)
                except SafetensorError as error:
                    raise OSError(f"{scratch}/{name} cannot be written: {error}") from None
                tensors.clear()
            (scratch / STATE).write_text(json.dumps(state | {"classes": CLASSES}, indent=1))
            for name in (MODEL, TRAIN, STATE):
                path = scratch / name
                files[name] = {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
                storage.upload(path, storage.join(uri, name))
        for name, data in records.items():
            self.check_current()
            storage.write_bytes(storage.join(self.run_uri, name), data if isinstance(data, bytes) else b"".join(data))
        self.check_current()
        checkpoint = Checkpoint(uri, step, scores, self.clock(), files)
        commit = {
            "format": FORMAT,
            "step": step,
            "scores": scores,
            "saved_at": checkpoint.saved_at,
            "blocked_s": round(blocked_s, 4),  # what the loop waited, and what all of it took
            "save_s": round(blocked_s + time.monotonic() - begun, 4),
            "files": files,
        }
        storage.write_bytes(storage.join(uri, COMMIT), json.dumps(commit, indent=1).encode())
        self.saved = checkpoint
        try:
            self._apply_retention(checkpoint)
        except (FileNotFoundError, StorageError) as error:  # this checkpoint is whole; the next one tries again
            print(f"old checkpoints of {self.run_uri} were not deleted: {error}", flush=True)

    def check_current(self) -> None:
        """Raise `Superseded` or `Stale` unless this life is the run's latest."""
        lives = read_lives(self.run_uri)
        if not lives or lives[-1]["life"] == self.life:
            return
        mine = next((life for life in lives if life["life"] == self.life), None)
        if mine and mine["command"] == lives[-1]["command"]:
            raise Stale(f"the ranks of run {self.run_uri} were started again: this process was believed dead, and ends")
        raise _taken_over(self.run_uri, lives[-1])

    def _apply_retention(self, newest: Checkpoint) -> None:
        """Delete what `plan_retention` gives up, and what no COMMIT vouches for; a COMMIT goes before its files.

        Checkpoints beyond the newest stay: a damaged one was passed over, and they are written anew on the way. Of
        torn directories only those of this life and of earlier ones go: a later one may be under way.
        """
        self.check_current()
        found, _ = committed(self.run_uri)
        found = [checkpoint for checkpoint in found if checkpoint.step <= newest.step]
        for checkpoint in plan_retention(found, self.config):
            storage.delete_all(checkpoint.uri, first=COMMIT)
        root = storage.join(self.run_uri, "checkpoints")
        names = [found.name for found in storage.list_objects(root)]
        whole = {name.partition("/")[0] for name in names if name.endswith(f"/{COMMIT}")}
        lives = [life["life"] for life in read_lives(self.run_uri)]
        former = set(lives[: lives.index(self.life) + 1])
        for torn in sorted({name.partition("/")[0] for name in names} - whole):
            if (match := DIRECTORY.fullmatch(torn)) and match[2] in former:
                storage.delete_all(storage.join(root, torn))


def plan_retention(saved: list[Checkpoint], config: CheckpointConfig) -> list[Checkpoint]:
    """Return what to delete: all but the last, the best of every score, and one of every so many hours."""
    by_step = {
        checkpoint.step: checkpoint for checkpoint in sorted(saved, key=lambda c: c.saved_at)
    }  # the latest life's
    newest_first = sorted(by_step.values(), key=lambda c: c.step, reverse=True)
    keep = {checkpoint.uri for checkpoint in newest_first[: config.keep_last]}
    for name in SCORES:
        scored = [checkpoint for checkpoint in newest_first if name in checkpoint.scores]
        keep |= {c.uri for c in sorted(scored, key=lambda c: c.scores[name], reverse=True)[: config.keep_best]}
    if config.keep_every_hours:
        milestone = float("-inf")
        for checkpoint in sorted(by_step.values(), key=lambda c: c.saved_at):
            if checkpoint.saved_at - milestone >= config.keep_every_hours * HOUR_S:
                milestone = checkpoint.saved_at
                keep.add(checkpoint.uri)
    return [checkpoint for checkpoint in saved if checkpoint.uri not in keep]


def begin_life(run_uri: str, *, command: str, num_ranks: int, typed: str = "") -> str:
    """Enter a new life of the run in its storage, so that earlier ones end; return its name. Every rank calls it.

    `command` names the command that started the ranks, the same for all its restarts, and `typed` is how it was typed.
    Raises `Superseded` where another command has taken the run over from it.
    """
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            chosen[0] = _enter_life(run_uri, command, num_ranks, typed)
        except (InputError, OSError) as error:  # for every rank to raise
            chosen[0] = error
    dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], Exception):
        raise chosen[0]
    return chosen[0]


def _enter_life(run_uri: str, command: str, num_ranks: int, typed: str) -> str:
    lives = read_lives(run_uri)
    if lives and lives[-1]["command"] != command and command in {life["command"] for life in lives}:
        raise _taken_over(run_uri, lives[-1])
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    life = {"life": secrets.token_hex(4), "started": started, "step": None, "num_ranks": num_ranks}
    _write_lives(run_uri, [*lives, life | {"host": socket.gethostname(), "command": command, "typed": typed}])
    return life["life"]


def note_step(run_uri: str, life: str, step: int) -> None:
    """Note where a life continues from. For rank 0."""
    lives = read_lives(run_uri)
    _write_lives(run_uri, [entry | ({"step": step} if entry["life"] == life else {}) for entry in lives])


def read_lives(run_uri: str) -> list[dict[str, Any]]:
    """Return every start of a run, the latest last: life, started, step, num_ranks, host, command, typed."""
    where = storage.join(run_uri, LIVES)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        return []
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError(f"{where} is damaged ({error}); delete it: only the list of starts is lost") from None


def _write_lives(run_uri: str, lives: list[dict[str, Any]]) -> None:
    storage.write_bytes(storage.join(run_uri, LIVES), json.dumps(lives, indent=1).encode())


def _taken_over(run_uri: str, latest: dict[str, Any]) -> Superseded:
    return Superseded(
        f"run {run_uri} was taken over by another command at {latest['started']} on {latest['host']}: two commands "
        "train one run; this one ends, and leaves what the other writes alone"
    )


def _copy(tensor: Tensor) -> Tensor:
    """Copy to the CPU, contiguous: training goes on with the original."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
