"""Checkpoints that prove themselves: <run>/checkpoints/step_000003000/ with COMMIT.json written last.

    engine/...           DeepSpeed's state, to continue
    model.safetensors    the weights, for predict and ensemble: nothing in it can run
    state.json           where the run stands, its configuration and data, its scores
    COMMIT.json          every file with its size and sha256

Without a COMMIT whose every file is there and whole, a directory is no checkpoint. The newest valid one wins.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist import storage
from mtl_dist.config import Config, flatten
from mtl_dist.errors import InputError
from mtl_dist.runtime.engine import load_engine, save_engine

FORMAT = "mtl_dist-checkpoint-1"
COMMIT, STATE, MODEL = "COMMIT.json", "state.json", "model.safetensors"
# Settings that may change between parts of a run: they move or time the work, and leave its result.
FREE = (
    "run.storage", "data.train", "data.val", "data.workers", "data.prefetch", "data.cache_dir", "data.cache_gib",
    "engine.device", "engine.threads", "train.eval_batch", "checkpoint.every_steps", "checkpoint.keep_last",
    "checkpoint.keep_best", "ray.num_ranks", "ray.cpus_per_rank", "ray.gpus_per_rank", "ray.placement",
    "ray.autoscaling", "ray.max_failures",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A committed checkpoint. `score` is P on the validation split, None where it was not evaluated."""

    uri: str
    step: int
    score: float | None
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}


def save_checkpoint(engine, run_uri: str, *, step: int, state: dict[str, Any], score: float | None) -> Checkpoint:
    """Write a checkpoint of this step. All ranks must call it; rank 0 commits when every rank's files are stored."""
    uri = step_uri(run_uri, step)
    rank = dist.get_rank()
    if rank == 0:
        storage.delete_all(uri, first=COMMIT)  # a torn attempt of an earlier life
    dist.barrier()
    with tempfile.TemporaryDirectory(prefix="mtl_dist-save-") as scratch:
        save_engine(engine, Path(scratch))
        if rank == 0:
            _write_model(Path(scratch) / MODEL, engine.module.model)
            (Path(scratch) / STATE).write_text(json.dumps(state, indent=1))
        files = {}
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            name = path.relative_to(scratch).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
            storage.upload(path, storage.join(uri, name))
    files_of_ranks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(files_of_ranks, files)
    checkpoint = Checkpoint(uri, step, score, {name: about for part in files_of_ranks for name, about in part.items()})
    if rank == 0:
        commit = {"format": FORMAT, "step": step, "score": score, "files": checkpoint.files}
        storage.write_bytes(storage.join(uri, COMMIT), json.dumps(commit, indent=1).encode())
    dist.barrier()
    return checkpoint


def restore_checkpoint(engine, run_uri: str, config: Config, identity: dict[str, str]) -> dict[str, Any] | None:
    """Load the newest valid checkpoint into the engine on all ranks; its state, or None where a run begins.

    Rank 0 chooses and says which it skipped and why. Raises `InputError` naming the field where the checkpoint belongs
    to another configuration or other data.
    """
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        chosen[0] = _choose(run_uri, config, identity)
    dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], InputError):
        raise chosen[0]
    if chosen[0] is None:
        return None
    uri, files, state = chosen[0]
    with tempfile.TemporaryDirectory(prefix="mtl_dist-load-") as scratch:
        for name, about in files.items():
            if name.startswith("engine/"):
                fetch_verified(uri, name, about, Path(scratch) / name)
        load_engine(engine, Path(scratch))
    return state


def committed(run_uri: str) -> tuple[list[Checkpoint], list[str]]:
    """Return the committed checkpoints of a run, oldest first, and what was passed over with the reason.

    Reads the COMMITs and compares names and sizes with one listing; checksums are checked when files are read.
    """
    root = storage.join(run_uri, "checkpoints")
    stored = dict(storage.list_objects(root))
    found, skipped = [], []
    for directory in sorted({name.partition("/")[0] for name in stored}):
        uri = storage.join(root, directory)
        if f"{directory}/{COMMIT}" not in stored:
            skipped.append(f"{uri}: no {COMMIT} (its save did not finish)")
            continue
        try:
            commit = json.loads(storage.read_bytes(storage.join(uri, COMMIT)))
            if commit["format"] != FORMAT:
                raise ValueError(f"format '{commit['format']}'; this version reads '{FORMAT}'")
            checkpoint = Checkpoint(uri, commit["step"], commit["score"], commit["files"])
            wrong = [n for n, about in checkpoint.files.items() if stored.get(f"{directory}/{n}") != about["bytes"]]
        except InputError:  # the store refuses or is away: that says nothing of the checkpoint
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.append(f"{uri}: damaged {COMMIT} ({error})")
            continue
        if wrong:
            skipped.append(f"{uri}: {wrong[0]} is missing or has another size than {COMMIT} says")
        else:
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step), skipped


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read and verify state.json. Raises ValueError where it is damaged."""
    return json.loads(_read_verified(checkpoint, STATE))


def read_model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read and verify the weights. Raises ValueError where they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(_read_verified(checkpoint, MODEL))
    except SafetensorError as error:
        raise ValueError(f"{storage.join(checkpoint.uri, MODEL)} is not a safetensors file ({error})") from None


def fetch_verified(uri: str, name: str, about: dict[str, Any], path: Path) -> None:
    """Copy a checkpoint's file here and check it. Raises ValueError where it is not what COMMIT says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.download(storage.join(uri, name), path)
    if path.stat().st_size != about["bytes"] or storage.sha256_of(path) != about["sha256"]:
        raise ValueError(f"{storage.join(uri, name)} is damaged: its size or sha256 is not what {COMMIT} says")


def apply_retention(run_uri: str, *, step: int, keep_last: int, keep_best: int) -> None:
    """Delete the committed checkpoints up to `step` that `plan_retention` gives up; their COMMIT goes first.

    Later ones are of a life before a damaged checkpoint was passed over: they vouch for nothing until written again.
    """
    saved = [(c.step, c.score) for c in committed(run_uri)[0] if c.step <= step]
    for step in plan_retention(saved, keep_last=keep_last, keep_best=keep_best):
        storage.delete_all(step_uri(run_uri, step), first=COMMIT)


def plan_retention(saved: list[tuple[int, float | None]], *, keep_last: int, keep_best: int) -> list[int]:
    """Return the steps to delete of (step, score) pairs: all but the last ones and the best scored ones."""
    steps = sorted(step for step, _ in saved)
    by_score = sorted((score, step) for step, score in saved if score is not None)
    keep = set(steps[-keep_last:]) | {step for _, step in by_score[-keep_best:]}
    return [step for step in steps if step not in keep]


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint of the highest score, the later of equals; None where none is scored."""
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.score is not None]
    return max(scored, key=lambda checkpoint: (checkpoint.score, checkpoint.step), default=None)


def step_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "checkpoints", f"step_{step:09d}")


def check_same_run(state: dict[str, Any], config: Config, identity: dict[str, str], where: str) -> None:
    """Raise `InputError` unless a checkpoint's configuration and data are those of the run that wants it."""
    stored, wanted = state["config"], flatten(config)
    for key in sorted(stored.keys() | wanted.keys()):
        if key not in FREE and stored.get(key) != wanted.get(key):
            raise InputError(
                f"run '{config.run.name}' has a checkpoint with {key} {stored.get(key)!r} ({where}), but the "
                f"configuration says {wanted.get(key)!r}; give the run another --run.name, or the same {key}"
            )
    for name, sha256 in identity.items():
        if state["identity"].get(name) != sha256:
            raise InputError(
                f"run '{config.run.name}' has a checkpoint trained on another {name} ({where}): sha256 "
                f"{state['identity'].get(name)}, not {sha256}; give the run another --run.name, or the same data"
            )


def _choose(run_uri: str, config: Config, identity: dict[str, str]):
    """Return (uri, files, state) of the newest checkpoint that verifies; an `InputError` if it is of another run."""
    found, skipped = committed(run_uri)
    for checkpoint in reversed(found):
        try:
            with tempfile.TemporaryDirectory(prefix="mtl_dist-check-") as scratch:
                for name, about in checkpoint.files.items():
                    fetch_verified(checkpoint.uri, name, about, Path(scratch) / "file")
            state = read_state(checkpoint)
        except InputError as error:  # the store refuses or is away: that says nothing of the checkpoint
            return error
        except (ValueError, FileNotFoundError) as error:
            skipped.append(f"{checkpoint.uri}: {error}")
            continue
        try:
            check_same_run(state, config, identity, checkpoint.uri)
            _check_same_ranks(state, config, checkpoint.uri)
        except InputError as error:
            return error
        _say_skipped(skipped)
        print(f"continuing from {checkpoint.uri}", flush=True)
        return checkpoint.uri, checkpoint.files, state
    _say_skipped(skipped)
    return None


def _check_same_ranks(state: dict[str, Any], config: Config, where: str) -> None:
    if config.engine.zero_stage and state["num_ranks"] != dist.get_world_size():
        raise InputError(
            f"{where} was saved with ZeRO {config.engine.zero_stage} by {state['num_ranks']} ranks, and this run has "
            f"{dist.get_world_size()}: sharded optimizer states fit the same number only; start as many ranks, or use "
            "--engine.zero-stage 0 under another --run.name, which continues on any number"
        )


def _say_skipped(skipped: list[str]) -> None:
    for reason in skipped:
        print(f"passed over {reason}", flush=True)


def _read_verified(checkpoint: Checkpoint, name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="mtl_dist-read-") as scratch:
        path = Path(scratch) / "file"
        fetch_verified(checkpoint.uri, name, checkpoint.files[name], path)
        return path.read_bytes()


def _write_model(path: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, path)
