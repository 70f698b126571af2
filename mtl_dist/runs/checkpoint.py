"""Checkpoints that prove themselves: <run>/checkpoints/step_000003000_1f3a9c2e/ with COMMIT.json written last.

    model.safetensors    the weights that were evaluated, for predict and ensemble
    train.safetensors    what continuing needs beside them: the optimizer's state, learned loss weights, raw weights
                         where the model's are averages; whole tensors, for any number of ranks and ZeRO stage
    state.json           where the run stands, its configuration and data, its scores
    COMMIT.json          every file with its size and sha256, and a sha256 of itself

Nothing in it can run. Without a COMMIT whose every file is there and whole, a directory is no checkpoint. The newest
valid one wins. Each start of a run (a life, the hex digits) writes to directories of its own, so that a process
believed dead that wakes up cannot spoil what its successor saved. `saving.py` writes them.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.errors import Damaged
from mtl_dist.objective.scores import Score, table_of
from mtl_dist.parsing import parse_object
from mtl_dist.ranks import on_rank_0
from mtl_dist.runs.same_run import check_same_run
from mtl_dist.sealed import unseal
from mtl_dist.settings import explain_validation
from mtl_dist.tasks import AUS, EXPRESSIONS

FORMAT = "mtl_dist-checkpoint-2"
COMMIT, STATE, MODEL, TRAIN = "COMMIT.json", "state.json", "model.safetensors", "train.safetensors"
CLASSES = {"expressions": list(EXPRESSIONS), "aus": list(AUS)}  # the order of a model's outputs, in state.json
MAX_COMMIT_BYTES, MAX_STATE_BYTES, MAX_TENSOR_BYTES = 1 << 20, 16 << 20, 16 << 30
MAX_MESSAGE = 1000  # characters
DIRECTORY = re.compile(r"step_(\d{9})_([0-9a-f]{8})")


class Checkpoint(NamedTuple):
    """A committed checkpoint."""

    uri: str
    step: int
    scores: dict[str, float]  # of its evaluation; empty where it was not evaluated
    saved_at: float  # Unix time
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}
    start: int = 0  # which one of the run saved it: a later one's is the newer of one step, whatever its clock said

    @property
    def score(self) -> float | None:
        """What checkpoints compete by, on the validation split: P, or the first score of another objective."""
        return self.finite_score(self.competes_by.key)

    @property
    def competes_by(self) -> Score:
        """Which score that is."""
        return table_of(self.scores)[0]

    def finite_score(self, name: str) -> float | None:
        """A score; None where it has none, or one that is not a number, as evaluations once let through."""
        value = self.scores.get(name)
        return value if value is not None and math.isfinite(value) else None


class CommittedFile(BaseModel):
    """A file of a checkpoint, as its COMMIT has it."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Commit(BaseModel):
    """COMMIT.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: str
    step: int
    scores: dict[str, float]
    saved_at: float  # Unix time
    blocked_s: float = 0  # what the loop waited, and what all of it took
    save_s: float = 0
    start: int = 0  # of the run, which saved it
    files: dict[str, CommittedFile]


class Restored(NamedTuple):
    """What a run continues from."""

    state: dict[str, Any]
    model: dict[str, Tensor]  # the evaluated weights
    train: dict[str, Tensor]


def load_checkpoint(run_uri: str, config: Config, identity: dict[str, str]) -> Restored | None:
    """Load the newest valid checkpoint on all ranks; None where a run begins.

    Rank 0 chooses and says which it skipped and why. Raises `InputError` naming the field where the checkpoint belongs
    to another configuration or other data.
    """

    def choose() -> tuple[Checkpoint, dict[str, Any]] | None:
        chosen = choose_newest(run_uri)
        if chosen:
            check_same_run(chosen[1], config, identity, chosen[0].uri)
            print(f"continuing from {chosen[0].uri}", flush=True)
        return chosen

    chosen = on_rank_0(choose)
    if chosen is None:
        return None
    checkpoint, state = chosen
    return Restored(state, read_tensors(checkpoint, MODEL), read_tensors(checkpoint, TRAIN))


def committed(run_uri: str) -> tuple[list[Checkpoint], list[str]]:
    """Return the committed checkpoints of a run, oldest first, and what was passed over with the reason.

    Reads the COMMITs and compares names and sizes with one listing; checksums are checked when files are read.
    """
    root = storage.join(run_uri, "checkpoints")
    stored = dict(storage.list_objects(root))
    checkpoints, skipped = [], []
    for directory in sorted({name.partition("/")[0] for name in stored}):
        uri = storage.join(root, directory)
        if not DIRECTORY.fullmatch(directory):  # somebody's copy, for instance
            skipped.append(f"{uri}: not named step_<step>_<start>, so no checkpoint of the run")
            continue
        if f"{directory}/{COMMIT}" not in stored:
            skipped.append(f"{uri}: no {COMMIT} (its save did not finish)")
            continue
        try:
            if stored[f"{directory}/{COMMIT}"] > MAX_COMMIT_BYTES:
                raise Damaged(f"it has more than {MAX_COMMIT_BYTES} bytes")
            checkpoint = read_commit(uri)
            wrong = [n for n, about in checkpoint.files.items() if stored.get(f"{directory}/{n}") != about["bytes"]]
        except (Damaged, FileNotFoundError) as error:
            skipped.append(f"{uri}: damaged {COMMIT} ({error})")
            continue
        if wrong:
            skipped.append(f"{uri}: {wrong[0]} is missing or has another size than {COMMIT} says")
        else:
            checkpoints.append(checkpoint)
    return sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, *newness(checkpoint))), skipped


def read_commit(uri: str) -> Checkpoint:
    """Read what a checkpoint's COMMIT says. Raises `Damaged` if it is damaged."""
    content = unseal(
        storage.read_bytes(storage.join(uri, COMMIT), max_bytes=MAX_COMMIT_BYTES), unsealed=Commit.model_fields
    )
    if content.get("format") != FORMAT:
        raise Damaged(f"format '{content.get('format')}'; this version reads '{FORMAT}'")
    try:
        commit = Commit.model_validate(content)
    except pydantic.ValidationError as error:
        raise Damaged(explain_validation(error)[:MAX_MESSAGE]) from None
    if commit.step != int(DIRECTORY.fullmatch(uri.rpartition("/")[2])[1]):
        raise Damaged(f"it is of step {commit.step}")
    if absent := {MODEL, TRAIN, STATE} - commit.files.keys():
        raise Damaged(f"it names no {min(absent)}")
    files = {name: file.model_dump() for name, file in commit.files.items()}
    scores = {name: score for name, score in commit.scores.items() if math.isfinite(score)}
    return Checkpoint(uri, commit.step, scores, commit.saved_at, files, commit.start)


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read and verify state.json. Raises `Damaged` where it is damaged."""
    state = parse_object(_read_verified(checkpoint, STATE, max_bytes=MAX_STATE_BYTES))
    if not isinstance(scores := state.get("scores", {}), dict):
        raise Damaged(f"{storage.join(checkpoint.uri, STATE)} has the scores {str(scores)[:80]!r}")
    wrong = {n: None for n, v in scores.items() if isinstance(v, float) and not math.isfinite(v)}
    return state | ({"scores": scores | wrong} if wrong else {})


def find_damage(checkpoint: Checkpoint) -> str | None:
    """Read every file and say what is wrong; None where all are whole."""
    for name in checkpoint.files:
        try:
            _read_verified(checkpoint, name)
        except (Damaged, FileNotFoundError) as error:
            return str(error)
    return None


def read_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Read and verify a safetensors file. Raises `Damaged` where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(_read_verified(checkpoint, name))
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{storage.join(checkpoint.uri, name)} is not a safetensors file ({error})") from None


def newness(checkpoint: Checkpoint) -> tuple[int, float]:
    """Order checkpoints of one step. The clock of a host decides between two of one start only, or of old runs."""
    return checkpoint.start, checkpoint.saved_at


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint of the best score, the later of equals; None where none is scored."""
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
    return max(scored, key=lambda c: (c.competes_by.sign * c.score, c.step, *newness(c)), default=None)


def choose_newest(run_uri: str, *, verifies: bool = True) -> tuple[Checkpoint, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole, with its state, and say which were passed over and why.

    Without `verifies` its files are taken to be what its COMMIT says.
    """
    checkpoints, skipped = committed(run_uri)
    chosen = None
    while checkpoints and chosen is None:
        checkpoint = checkpoints.pop()
        if damage := verifies and find_damage(checkpoint):
            skipped.append(f"{checkpoint.uri}: {damage}")
            continue
        try:
            chosen = checkpoint, read_state(checkpoint)
        except Damaged as error:  # whole by its checksums, and not what training writes
            skipped.append(f"{checkpoint.uri}: {error}")
    for reason in skipped:
        print(f"passed over {reason}", flush=True)
    return chosen


def _read_verified(checkpoint: Checkpoint, name: str, *, max_bytes: int = MAX_TENSOR_BYTES) -> bytes:
    """Read a checkpoint's file. Raises `Damaged` where it is not what COMMIT says, or larger than `max_bytes`."""
    about, where = checkpoint.files[name], storage.join(checkpoint.uri, name)
    if about["bytes"] > max_bytes:
        raise Damaged(f"{where} has {about['bytes']} bytes; at most {max_bytes} are read")
    with storage.scratch_directory("read") as scratch:
        path = scratch / "file"
        storage.download(where, path)
        if path.stat().st_size != about["bytes"] or storage.sha256_of(path) != about["sha256"]:
            raise Damaged(f"{where} is damaged: its size or sha256 is not what {COMMIT} says")
        return path.read_bytes()
