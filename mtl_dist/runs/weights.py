"""Weights that exist, under the names users have for them: a run, a checkpoint, an exported directory, a file."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict
from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.data.index import NO_SET, Extractor
from mtl_dist.errors import Damaged, InputError
from mtl_dist.families import FAMILIES
from mtl_dist.models import TooLarge, at_most, build_model
from mtl_dist.runs.checkpoint import (
    CLASSES,
    COMMIT,
    DIRECTORY,
    MAX_TENSOR_BYTES,
    MODEL,
    Checkpoint,
    CommittedFile,
    best,
    committed,
    read_commit,
    read_state,
    read_tensors,
)
from mtl_dist.runs.patience import ENDED
from mtl_dist.runs.same_run import find_lack
from mtl_dist.sealed import unseal
from mtl_dist.settings import explain_validation, flatten, unflatten
from mtl_dist.tasks import AUS, EXPRESSIONS, IMAGENET_MEAN, IMAGENET_STD

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # a run's name may hold dots too
EXTRACTORS = "extractors"  # in state.json
EXPORT_FORMAT = "mtl_dist-export-1"
EXPORTED_CONFIG = "config.json"
# What a model needs of the configuration to predict as it was evaluated; the rest is how it was trained.
KEPT = ("data.image_size", "model.", "engine.autocast")
MAX_CONFIG_BYTES = 1 << 20
MAX_CUT_OFF = 200_000_000  # parameters: VGG's are 124 million


def extractors_of(state: dict[str, Any]) -> list[Extractor]:
    """Return what made the features that a checkpoint was trained on, by its state; none where that is not known."""
    return [Extractor.model_validate(about) for about in state.get(EXTRACTORS) or []]


class Weights(NamedTuple):
    """Weights of a model, not yet read."""

    checkpoint: Checkpoint  # an exported directory has one too: its one file, where it came from
    config: Config
    state: dict[str, Any]  # state.json of a checkpoint; empty for an exported directory
    view: str | None  # of the pictures it was trained on; None: saved before this was noted
    newest_step: int  # of all checkpoints of its run, where it lies in one
    exported: ExportedConfig | None = None  # config.json of an exported directory
    ended: str = ""  # why its run has ended before its last epoch, where it has

    @property
    def uri(self) -> str:
        """Where they lie: a checkpoint's directory, or an exported one."""
        return self.checkpoint.uri

    @property
    def identity(self) -> dict[str, str]:
        """The sets it was trained and scored on, each with the sha256 of its index."""
        return self.exported.data if self.exported else self.state.get("identity", {})

    @property
    def extractors(self) -> list[Extractor]:
        """What made the features it was trained on; none where it reads pictures, or that is not known."""
        return list(self.exported.extractors) if self.exported else extractors_of(self.state)

    @property
    def train_sha256(self) -> str:
        """That of the index it was trained on; empty where this is not known."""
        return self.identity.get("training set", "")

    @property
    def is_scored(self) -> bool:
        """Whether its run has a validation set."""
        return _is_scored(self.identity)

    @property
    def total_steps(self) -> int | None:
        """The steps of its whole run; None: saved before this was noted."""
        return self.state.get("total_steps")

    @property
    def is_finished(self) -> bool:
        """Whether its run was trained to the end: of its epochs, or where it was to stop."""
        if self.total_steps is None or self.ended:
            return True
        return self.newest_step >= self.total_steps // self.config.train.epochs * self.config.last_epoch


class ExportedConfig(BaseModel):
    """config.json of an exported directory: all that is needed to use its weights, here or elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = EXPORT_FORMAT
    config: dict[str, Any]  # {dotted path: value}: `KEPT`
    image_size: int  # side in pixels that images are resized to first, as uint8
    input_size: int  # side in pixels of the network's input: resized again on the device where it differs
    view: str | None = None  # of the pictures it was trained on; exports of before this was noted have none
    pixel_scale: float = 1 / 255
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB, after the scale
    std: tuple[float, float, float] = IMAGENET_STD
    va: tuple[str, ...] = ("valence", "arousal")
    expressions: tuple[str, ...] = EXPRESSIONS
    aus: tuple[int, ...] = AUS
    step: int
    scores: dict[str, float]  # of the checkpoint on its validation set
    saved_at: float  # Unix time
    files: dict[str, CommittedFile]
    data: dict[str, str]  # identity of the sets: {"training set": sha256, "validation set": sha256 or NO_SET}
    extractors: tuple[Extractor, ...] = ()  # what made the features it was trained on


def open_weights(uri: str) -> Weights:
    """Find a run's checkpoint as `open_best` does, a checkpoint by its directory, or an exported directory.

    Raises `InputError`.
    """
    uri = uri.rstrip("/")
    if is_export(uri):
        return _open_exported(uri)
    if DIRECTORY.fullmatch(uri.rpartition("/")[2]):
        return _open_directory(storage.absolute(uri))  # of several ways to write it one
    return open_best(uri)


def is_export(uri: str) -> bool:
    """Whether a URI is of an exported directory."""
    return storage.exists(storage.join(uri, EXPORTED_CONFIG))


def open_best(run_uri: str) -> Weights:
    """Find a run's best committed checkpoint; the newest where it has no validation set. Raises `InputError`."""
    checkpoints, skipped = committed(run_uri)
    chosen = best(checkpoints) or _newest_unscored(checkpoints)
    if chosen is None:
        reasons = f" ({'; '.join(skipped)})" if skipped else ""
        raise InputError(
            f"run {run_uri} has no committed checkpoint with a score{reasons}; train it first, or correct the name"
        )
    return _open_checkpoint(
        chosen, newest=checkpoints[-1], remedy=f"delete {chosen.uri} to use the next best checkpoint"
    )


def _newest_unscored(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the newest checkpoint of a run without a validation set; None of one that has one, and no score yet."""
    for checkpoint in reversed(checkpoints):
        try:
            return None if _is_scored(read_state(checkpoint).get("identity", {})) else checkpoint
        except (Damaged, FileNotFoundError):
            continue  # damaged, or deleted meanwhile
    return None


def _is_scored(identity: dict[str, str]) -> bool:
    return identity.get("validation set") != NO_SET


def open_last(run_uri: str, count: int) -> list[Weights]:
    """Find a run's last `count` committed checkpoints, oldest first: of one step the one that was saved last.

    Says which were passed over and why. Raises `InputError` where there are fewer.
    """
    found, skipped = committed(run_uri)
    checkpoints = list({checkpoint.step: checkpoint for checkpoint in found}.values())
    if len(checkpoints) < count:
        reasons = f" ({'; '.join(skipped)})" if skipped else ""
        raise InputError(
            f"run {run_uri} has {len(checkpoints)} committed checkpoint(s){reasons}, and the last {count} are wanted; "
            f"give a smaller number, or train with --checkpoint.keep-last {count} (few are kept by default; they are "
            "saved after every evaluation, and each --checkpoint.every-steps)"
        )
    for reason in skipped:
        print(f"passed over {reason}", flush=True)
    remedy = "delete it, and the one before it is taken in its place"
    newest = checkpoints[-1]
    return [_open_checkpoint(chosen, newest=newest, remedy=remedy) for chosen in checkpoints[-count:]]


def find_weights(uri: str) -> tuple[str, str | None]:
    """Return the file of weights to read for a URI, and its sha256 where that is known.

    A file, of anyone's, is itself and may not exist; of all else it is that of what `open_weights` finds.
    """
    uri = uri.rstrip("/")
    if is_local_file(uri) or (storage.is_s3(uri) and (uri.endswith(FILE_SUFFIXES) or storage.exists(uri))):
        return uri, None
    checkpoint = open_weights(uri).checkpoint
    return storage.join(checkpoint.uri, MODEL), checkpoint.files[MODEL]["sha256"]


def is_local_file(uri: str) -> bool:
    """Whether a URI is of a file here, which need not exist, and not of a directory or an object."""
    return not storage.is_s3(uri) and not storage.local_path(uri).is_dir()


def load_weights(weights: Weights, *, objective: str = "affect") -> nn.Module:
    """Build the model on the CPU with its weights, in evaluation mode. Raises `InputError`.

    `objective` is what it must have been trained for.
    """
    checkpoint, config = weights.checkpoint, weights.config
    if FAMILIES[config.model.name].objective != objective:
        what = FAMILIES[config.model.name].what
        if objective != "affect":
            raise InputError(f"{checkpoint.uri} is {what}; expected what was trained for: {objective}")
        raise InputError(
            f"{checkpoint.uri} is {what}: it predicts no labels; train a model that begins with it, with --run.start "
            f"{checkpoint.uri} --run.start-with backbone"
        )
    if not weights.state:
        _check_exported(checkpoint)
    try:
        tensors = read_tensors(checkpoint, MODEL)
        # A stranger's configuration may ask for any network. Libraries' are built with classifiers that are cut off.
        with at_most(2 * sum(tensor.numel() for tensor in tensors.values()) + MAX_CUT_OFF):
            model = build_model(config.model.model_copy(update={"weights": "none"}), input_size=config.input_size)
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise deleted(checkpoint) from None
    except TooLarge as error:
        raise InputError(
            f"{checkpoint.uri}: its configuration asks for a network of {error}, and its weights are fewer than half "
            "as many: they do not belong together"
        ) from None
    except (Damaged, RuntimeError) as error:
        raise InputError(f"{checkpoint.uri}: {error}; delete it to use the next best checkpoint") from None
    return model.eval()


def exported_config(weights: Weights, files: dict[str, dict[str, Any]]) -> ExportedConfig:
    """Describe a checkpoint that is exported to `files`."""
    config, checkpoint = weights.config, weights.checkpoint
    kept = {key: value for key, value in flatten(config).items() if key.startswith(KEPT)}
    return ExportedConfig(
        config=kept | {"model.weights": "none"},  # what training started from, a path of that machine perhaps
        image_size=config.data.image_size,
        input_size=config.input_size,
        view=weights.view,
        step=checkpoint.step,
        scores=checkpoint.scores,
        saved_at=checkpoint.saved_at,
        files=files,
        data=weights.identity,
        extractors=tuple(weights.extractors),
    )


def _open_directory(uri: str) -> Weights:
    run_uri, _, checkpoints = uri.rpartition("/")[0].rpartition("/")
    if checkpoints != "checkpoints":
        return _open_copy(uri)
    found, skipped = committed(run_uri)
    if checkpoint := next((checkpoint for checkpoint in found if checkpoint.uri == uri), None):
        remedy = "name another checkpoint, or the run"
        return _open_checkpoint(checkpoint, newest=found[-1], remedy=remedy)
    why = [reason for reason in skipped if reason.startswith(f"{uri}:")] or [f"{uri} does not exist"]
    raise InputError(f"no finished checkpoint: {why[0]}; name another, or the run {run_uri}")


def _open_copy(uri: str) -> Weights:
    """Open a checkpoint that lies elsewhere than in its run."""
    where = f"checkpoint {uri}, which is not in its run (<storage>/<run>/checkpoints/step_...),"
    try:
        checkpoint = read_commit(uri)
    except FileNotFoundError:
        raise InputError(f"{where} has no {COMMIT}: its save did not finish; give another one") from None
    except Damaged as error:
        raise InputError(f"{where} has a damaged {COMMIT} ({error}); give another one") from None
    return _open_checkpoint(checkpoint, newest=checkpoint, remedy="give another one")


def _open_checkpoint(checkpoint: Checkpoint, *, newest: Checkpoint, remedy: str) -> Weights:
    """Read and check what a checkpoint says of itself, and `newest`, the last of its run, of the run's end.

    `remedy` is what to do where the former is damaged.
    """
    try:
        state = read_state(checkpoint)
    except FileNotFoundError:
        raise deleted(checkpoint) from None
    except Damaged as error:
        raise InputError(f"{error}; {remedy}") from None
    check_classes(checkpoint, state)
    config = build_config(unflatten(state["config"]))
    ended = state.get(ENDED, "")
    if newest.uri != checkpoint.uri and newest.step < state.get("total_steps", 0):
        with contextlib.suppress(Damaged, FileNotFoundError):  # damaged, or deleted meanwhile
            ended = read_state(newest).get(ENDED, "")
    return Weights(checkpoint, config, state, state.get("view"), newest.step, ended=ended)


def _open_exported(uri: str) -> Weights:
    where = storage.join(uri, EXPORTED_CONFIG)
    try:
        data = storage.read_bytes(where, max_bytes=MAX_CONFIG_BYTES)
        exported = ExportedConfig.model_validate(unseal(data, unsealed=ExportedConfig.model_fields))
    except pydantic.ValidationError as error:
        raise InputError(f"{where} is not what mtl_dist.export writes: {explain_validation(error)[:1000]}") from None
    except Damaged as error:
        raise InputError(f"{where} is damaged ({error}); export the run again") from None
    if exported.format != EXPORT_FORMAT:
        raise InputError(f"{where} has format '{exported.format}'; this version reads '{EXPORT_FORMAT}'")
    if exported.expressions != EXPRESSIONS or exported.aus != AUS:
        raise InputError(
            f"{where} has other classes: {list(exported.expressions)}, AU {list(exported.aus)}; expected "
            f"{list(EXPRESSIONS)}, AU {list(AUS)}, in this order"
        )
    if (exported.pixel_scale, exported.mean, exported.std) != (1 / 255, IMAGENET_MEAN, IMAGENET_STD):
        raise InputError(f"{where} asks for another normalisation than ImageNet's, which this version has no other of")
    if MODEL not in exported.files or not storage.exists(storage.join(uri, MODEL)):
        raise InputError(f"{uri} holds no {MODEL}; export the run with --formats safetensors")
    files = {name: file.model_dump() for name, file in exported.files.items()}
    checkpoint = Checkpoint(uri, exported.step, exported.scores, exported.saved_at, files)
    config = build_config(unflatten(exported.config))
    return Weights(checkpoint, config, {}, exported.view, checkpoint.step, exported)


def _check_exported(checkpoint: Checkpoint) -> None:
    where = storage.join(checkpoint.uri, MODEL)
    about = checkpoint.files[MODEL]
    data = storage.read_bytes(where, max_bytes=min(about["bytes"], MAX_TENSOR_BYTES))
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise InputError(f"{where} is damaged: its sha256 is not what {EXPORTED_CONFIG} says; export the run again")


def check_classes(checkpoint: Checkpoint, state: dict) -> None:
    """Raise `InputError` where a checkpoint's outputs would be taken for those of other classes."""
    if lack := find_lack(state):
        raise InputError(f"{checkpoint.uri}/state.json is not what training writes: {lack}")
    # Checkpoints of before the order was noted have this one: there has been no other.
    if state.get("classes", CLASSES) != CLASSES:
        raise InputError(
            f"{checkpoint.uri} has other classes, or another order of them: {state['classes']}; expected {CLASSES}; "
            "its outputs would be taken for those of others: train it again"
        )


def deleted(checkpoint: Checkpoint) -> InputError:
    """What to say of a checkpoint that was there a moment ago."""
    return InputError(
        f"{checkpoint.uri} was deleted meanwhile: its run is training and keeps the newest and best checkpoints only; "
        "start again"
    )
