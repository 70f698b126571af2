"""What a run begins from: `run.start`, with the backbone, the model or everything of what is there; else its backbone
from `model.weights`.

Every rank calls these, but rank 0 alone chooses. The best checkpoint of a run that still trains may be another one a
second later, and nodes may have the run at paths of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.index import Extractor
from mtl_dist.data.order import VERSIONS
from mtl_dist.errors import Damaged, InputError
from mtl_dist.models import build_model, non_finite
from mtl_dist.models.backbones import check_backbone
from mtl_dist.ranks import on_rank_0
from mtl_dist.runs.checkpoint import (
    DIRECTORY,
    MODEL,
    TRAIN,
    Checkpoint,
    Restored,
    choose_newest,
    find_damage,
    read_tensors,
)
from mtl_dist.runs.same_run import differences
from mtl_dist.runs.weights import check_classes, deleted, extractors_of, find_weights, is_local_file, open_weights
from mtl_dist.settings import Varies

TRAINING_SET = "training set"  # what the identity of a run's data calls it
BEGAN_FROM = "began_from"  # of state.json: `Start.note`


class Start(NamedTuple):
    """What `run.start` stands for."""

    uri: str  # of it on this node
    checkpoint: Checkpoint | None  # None: for a backbone, `build_pretrained` opens it
    state: dict[str, Any]  # of the checkpoint; empty for files and exported directories
    note: dict[str, Any]  # what a run keeps of where it began: in its state.json, and in its --status
    extractors: Sequence[Extractor] = ()  # what made the features that the checkpoint was trained on


def find_start(config: Config, identity: dict[str, str], *, verifies: bool = False) -> Start | None:
    """Find what the run begins from; None without `run.start`. Raises `InputError`.

    `identity` is that of the run's data, which everything of another run must fit. `verifies`: a damaged checkpoint is
    passed over for the one before; all its files are read.
    """
    start, start_with = config.run.start, config.run.start_with
    if not start:
        return None
    if start_with == "backbone":
        uri, sha256 = find_weights(start)
        if not storage.exists(uri):
            raise InputError(f"run.start {start} does not exist; give a run, a checkpoint or a file of weights")
        uri = uri.rpartition("/")[0] if sha256 else uri  # a checkpoint, whose weights prove themselves
        return Start(uri, None, {}, {"with": start_with, "uri": uri, "sha256": sha256})
    if start_with == "model":
        opened = open_weights(start)
        checkpoint, state, extractors = opened.checkpoint, opened.state, opened.extractors
    else:
        checkpoint, state = _open_everything(start, verifies=verifies)
        _check_everything(checkpoint, state, config, identity)
        extractors = extractors_of(state)
    note = {"with": start_with, "uri": checkpoint.uri, "step": checkpoint.step}
    note["sha256"] = checkpoint.files[MODEL]["sha256"]
    return Start(checkpoint.uri, checkpoint, state, note, extractors)


def check_pretrained(config: Config) -> None:
    """Raise `InputError` for an unknown backbone, or weights that are not there. Builds and downloads nothing."""
    weights = "none" if config.run.start else config.model.weights
    check_backbone(config.model.backbone, imagenet=weights == "imagenet")
    if weights in ("none", "imagenet"):
        return
    uri = find_weights(weights)[0]
    if not storage.exists(uri):
        raise _not_there(uri)


def start_on_ranks(config: Config, identity: dict[str, str]) -> Start | None:
    """Return what rank 0 finds, at this node's path."""

    def find() -> tuple[Start, str] | None:
        start = find_start(config, identity, verifies=True)
        return start and (start, _place_below(config.run.start, start.uri))

    if (found := on_rank_0(find)) is None:
        return None
    start, place = found
    uri = config.run.start.rstrip("/") + place
    return start._replace(uri=uri, checkpoint=start.checkpoint and start.checkpoint._replace(uri=uri))


def load_everything(start: Start) -> Restored:
    """Read what training goes on with. Raises `InputError` where it is gone or damaged."""
    # Scores are those of the other run, and its number of ranks was its own.
    state = {key: start.state[key] for key in ("step", "order", "config") if key in start.state} | {"scores": {}}
    return Restored(state, _read(start.checkpoint, MODEL), _read(start.checkpoint, TRAIN))


def build_started(config: Config, start: Start) -> nn.Module:
    """Build the configured model on the CPU with what it begins from. Raises `InputError` unless all weights fit."""
    if start.checkpoint is None:
        own = {"run": config.run.model_copy(update={"start": ""})}
        own["model"] = config.model.model_copy(update={"weights": start.uri})
        return build_pretrained(config.model_copy(update=own))
    model = build_model(
        config.model.model_copy(update={"weights": "none"}), seed=config.run.seed, input_size=config.input_size
    )
    given = _read(start.checkpoint, MODEL)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if wrong := [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]:
        here, there = (shapes.get(wrong[0], "not there") for shapes in (own, theirs))
        raise InputError(
            f"run.start {start.checkpoint.uri} has another model: {wrong[0]} is {there} in it and {here} here, and so "
            f"are {len(wrong) - 1} more ({_settings_that_differ(start, config)}); give the same model, or "
            "--run.start-with backbone, which takes the backbone only"
        )
    model.load_state_dict(given)
    return model


def build_pretrained(config: Config) -> nn.Module:
    """Build the configured model with the weights that it names. Raises `InputError`."""
    model = _build(config)
    if wrong := non_finite(model):
        raise InputError(
            f"model.weights {config.model.weights} holds what is not finite ({', '.join(wrong[:3])}); give others"
        )
    return model


def describe_start(note: dict[str, Any]) -> str:
    """Say what a run began from."""
    step = f", step {note['step']}" if note.get("step") else ""
    return f"{note['with']} of {note['uri']}{step}"


def _open_everything(uri: str, *, verifies: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint by its directory, or the newest whole one of a run, with its state."""
    if DIRECTORY.fullmatch(uri.rstrip("/").rpartition("/")[2]):
        opened = open_weights(uri)
        if damage := verifies and find_damage(opened.checkpoint):
            raise InputError(f"run.start: {damage}; give another checkpoint, or the run")
        return opened.checkpoint, opened.state
    if (chosen := choose_newest(uri, verifies=verifies)) is None:
        raise InputError(
            f"run.start {uri} has no whole checkpoint; everything is of a run of ours, or of one of its checkpoints"
        )
    check_classes(*chosen)
    return chosen


def _check_everything(checkpoint: Checkpoint, state: dict[str, Any], config: Config, identity: dict[str, str]) -> None:
    """Raise `InputError` where the optimizer's state or the order would not be those of this configuration and data."""
    remedy = "give the same, or begin with less: --run.start-with model"
    if state.get("order", VERSIONS[0]) not in VERSIONS:
        raise InputError(f"run.start {checkpoint.uri} has an order that this version does not know; {remedy}")
    if differ := differences(state, config, Varies.BY_RUN):
        pairs = "; ".join(f"{key} is {theirs!r} there and {mine!r} here" for key, (theirs, mine) in differ.items())
        raise InputError(f"run.start {checkpoint.uri} with everything: {pairs}; {remedy}")
    theirs, mine = state["config"].get("train.epochs"), config.train.epochs
    if config.data.mix_to and theirs != mine:
        raise InputError(
            f"run.start {checkpoint.uri} with everything: train.epochs is {theirs} there and {mine} here, and "
            f"data.mix_to is the mixture of the last of them, which the order depends on; {remedy}"
        )
    theirs, mine = state["identity"].get(TRAINING_SET), identity.get(TRAINING_SET)
    if mine and theirs != mine:
        raise InputError(
            f"run.start {checkpoint.uri} with everything: it was trained on another training set (sha256 {theirs}, "
            f"not {mine}), of which its order is; {remedy}"
        )


def _not_there(uri: str) -> InputError:
    return InputError(
        f"model.weights {uri} does not exist; give a state dict, a run or checkpoint of ours, imagenet or none"
    )


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    try:
        return read_tensors(checkpoint, name)
    except FileNotFoundError:
        raise deleted(checkpoint) from None
    except Damaged as error:
        raise InputError(f"run.start: {error}; give another checkpoint") from None


def _settings_that_differ(start: Start, config: Config) -> str:
    if not start.state:
        return f"model.name is {config.model.name}, model.backbone {config.model.backbone}"
    differ = differences(start.state, config, Varies.BY_RUN)
    pairs = [f"{k} {theirs!r} there, {mine!r} here" for k, (theirs, mine) in differ.items() if k.startswith("model.")]
    return "; ".join(pairs) or "settings of model. are the same"


def _build(config: Config) -> nn.Module:
    weights = config.model.weights
    if weights in ("none", "imagenet") or is_local_file(weights):
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size)
    place, sha256 = on_rank_0(lambda: _place_of_weights(weights))
    uri = weights.rstrip("/") + place
    with storage.scratch_directory("weights") as scratch:
        path = scratch / uri.rpartition("/")[2]
        try:
            storage.download(uri, path)
        except FileNotFoundError:
            raise _not_there(uri) from None
        if sha256 and storage.sha256_of(path) != sha256:
            raise InputError(f"model.weights {uri} is damaged: its sha256 is not what its checkpoint says")
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size, weights_file=path)


def _place_of_weights(weights: str) -> tuple[str, str | None]:
    """Return the file to read as what comes after `weights`, and its sha256 where that is known."""
    uri, sha256 = find_weights(weights)
    return _place_below(weights, uri), sha256


def _place_below(given: str, uri: str) -> str:
    """Return what comes after the given URI in that of what was found there: the same on all nodes."""
    return storage.absolute(uri).removeprefix(storage.absolute(given.rstrip("/")))
