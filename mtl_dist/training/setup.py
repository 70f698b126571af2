"""What a rank trains with: device, data, model and engine; restored from a checkpoint, and saved into one."""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import Config, Varies, flatten, varying
from mtl_dist.data.augment import Preparation, build_preparation
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.loader import FETCH_AHEAD_STEPS
from mtl_dist.data.order import Order, TaskOrders
from mtl_dist.data.samples import Samples, open_samples
from mtl_dist.device import check_device, keep_freed_memory, pick_device
from mtl_dist.errors import InputError
from mtl_dist.machine import allow_open_files
from mtl_dist.models import build_model, num_parameters
from mtl_dist.objective.module import ObjectiveModule, build_module
from mtl_dist.progress import progress_bar
from mtl_dist.runs.checkpoint import MAX_TENSOR_BYTES, READ_AT_THE_START, Restored, load_checkpoint, weights_name
from mtl_dist.runs.start import (
    BEGAN_FROM,
    Start,
    build_pretrained,
    build_started,
    find_start,
    load_everything,
    start_on_ranks,
)
from mtl_dist.training.averaging import (
    WeightAverage,
    check_batchnorm,
    gather_batchnorm,
    name_batchnorm,
    sync_batchnorm,
    write_batchnorm,
)
from mtl_dist.training.engine import build_engine, read_optimizer, restore_optimizer
from mtl_dist.training.plan import Data, build_order, open_data
from mtl_dist.training.saving import Saver
from mtl_dist.training.step import check_finite
from mtl_dist.training.tracking import NoTracker, Tracker
from mtl_dist.training.watchdog import Phase, Watchdog

STATES = {"adamw": 2, "sgd": 1}  # that an optimizer has of each trained parameter, at most
BEGUN_BEFORE = (
    "note: an earlier version began this run. It goes on in the order that it has; from here on biases, positions and "
    "tokens are not decayed, and balanced weights are 1/20 to 20"
)
MODULE, OPTIMIZER, BATCHNORM = "module/", "optimizer/", "batchnorm"  # of a checkpoint's train.safetensors


class RunContext(Protocol):
    """Where a rank stands, and whom it tells. torch.distributed is initialised before `fit`."""

    rank: int
    num_ranks: int
    launcher: str  # names what started the ranks, the same when they are started again
    command_line: str  # of the launcher, as it was typed
    num_cpus: int  # that this rank may use
    has_gpu: bool  # whether this rank may use one

    def publish(self, metrics: dict[str, Any]) -> None:
        """Report an evaluation. Every rank calls it, with the same metrics."""

    def observe(self, **values: float) -> None:
        """Show measurements of this rank to whoever watches the cluster."""

    def should_stop(self) -> bool:
        """Whether this rank was asked to stop (a signal); ranks may disagree."""

    def should_save(self) -> bool:
        """Whether a checkpoint is wanted now: a machine of the run is about to go. All ranks ask at the same steps."""


class Setup(NamedTuple):
    """What a rank works with from its start to its end."""

    config: Config
    context: RunContext
    watchdog: Watchdog
    device: torch.device
    data: Data
    order: Order | TaskOrders
    train: Samples
    val: Samples
    prepare: Preparation

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, all epochs."""
        return self.data.steps_per_epoch * self.config.train.epochs


class Learner(NamedTuple):
    """The model in training, with its average and where it began."""

    engine: Any  # DeepSpeed's, around an `ObjectiveModule`
    average: WeightAverage | None
    began_from: dict[str, Any] | None  # `Start.note`

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged weights, where there are some."""
        return self.average.model if self.average else self.engine.module.model


def set_up(config: Config, context: RunContext, watchdog: Watchdog) -> Setup:
    """Choose the device, check the data, and plan its order."""
    device = pick_device(config, has_gpu=context.has_gpu)
    torch.set_num_threads(config.engine.threads or context.num_cpus)
    if device.type == "cpu":
        keep_freed_memory()
    data = open_data(config)
    check_ranks_agree(config, data)
    check_num_ranks(config, context.num_ranks)
    cache = Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    train, val = (open_samples(sets, config.data, cache) for sets in (data.train, data.val))
    shows = data.tasks and context.rank == 0
    with progress_bar("reading labels", len(data.train.shards)) if shows else contextlib.nullcontext() as advance:

        def moved(count: int) -> None:
            watchdog.moved(Phase.LABELS)
            if advance:
                advance(count)

        order = build_order(config, data, train, moved)
    train.keep_open(order.shards_in_hand(context.num_ranks, num_steps=2 * FETCH_AHEAD_STEPS))
    allow_open_files(train.max_open + val.max_open)
    return Setup(config, context, watchdog, device, data, order, train, val, build_preparation(config))


def check_num_ranks(config: Config, num_ranks: int) -> None:
    """Raise `InputError` where this many ranks cannot share the batch."""
    if num_ranks > config.num_streams:
        raise InputError(
            f"{num_ranks} ranks for {config.num_streams} streams: a rank reads one at least; start "
            "fewer ranks, or raise train.global_batch or data.streams"
        )
    least_rows = _least_rows(config, num_ranks)
    if config.engine.batchnorm == "sync" and config.train.accumulation > least_rows:
        raise InputError(
            f"train.accumulation is {config.train.accumulation}, but a rank has {least_rows} rows of a step: with "
            "engine.batchnorm sync every part needs one at least; use fewer parts, or local"
        )


def check_start(config: Config, *, has_gpu: bool, num_ranks: tuple[int, int], begins: bool) -> str:
    """Try what ranks do before their first step, as far as one process can; say what was found. Raises `InputError`.

    The model is built with its weights, which are downloaded or read where the run begins with some.
    """
    device = check_device(config, has_gpu=has_gpu)
    for number in num_ranks:
        check_num_ranks(config, number)
    model = _build_model(config, begins=begins, start=find_start(config, {}) if begins else None)
    note = _note_batchnorm(model, config, num_ranks[1])
    return f"start   on {device}; {describe_size(model)}{note and f'{chr(10)}{note}'}"


def describe_size(model: nn.Module) -> str:
    """Say how many parameters a model has, and how many are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = num_parameters(model)
    return f"{total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained"


def check_ranks_agree(config: Config, data: Data) -> None:
    """Raise on every rank unless all have the same settings and the same data. Every rank calls it.

    Launchers of several nodes each read a command line and, where data is local, files of their own.
    """
    free = varying(Varies.BY_RANK)
    mine = {name: value for name, value in flatten(config).items() if name not in free} | data.identity()
    mine |= {name: weights_name(mine[name]) for name in READ_AT_THE_START}
    of_ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    for rank, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs.get(name) != value:
                raise InputError(
                    f"rank {rank} has {name} {theirs.get(name)!r}, and rank 0 has {value!r}: all ranks train one model "
                    "on one set; start every node with the same command, and give every node the same data"
                )


def _least_rows(config: Config, num_ranks: int) -> int:
    """Rows of a step (of a task's batch) that each rank has at least."""
    return config.train.global_batch // config.num_streams * (config.num_streams // num_ranks)


def restore(setup: Setup) -> tuple[Setup, Learner, int, dict[str, Any]]:
    """Build what is trained, with its newest checkpoint; return it, the steps it has had, and its last scores.

    The setup comes back with the order that the run was begun with.
    """
    config, watchdog, num_ranks = setup.config, setup.watchdog, setup.context.num_ranks
    watchdog.moved(Phase.RESTORING)
    restored = load_checkpoint(config.run.uri, config, setup.data.identity())
    start = None if restored else start_on_ranks(config, setup.data.identity())
    began_from = restored.state.get(BEGAN_FROM) if restored else start and start.note
    if start and config.run.start_with == "everything":
        restored = load_everything(start)
    watchdog.moved(Phase.BUILDING)
    step, scores = (restored.state["step"], restored.state["scores"]) if restored else (0, {})
    if restored:
        setup = setup._replace(order=setup.order.of_version(restored.state.get("order", 1)))
    model = _build_model(config, begins=restored is None, start=start)
    began = BEGUN_BEFORE if restored and "order" not in restored.state else ""
    for note in (began, _note_batchnorm(model, config, num_ranks)):
        if note and setup.context.rank == 0:
            print(note, flush=True)
    module = build_module(model, config.loss, setup.data.train.labels, passes=max(len(setup.data.tasks), 1))
    average = WeightAverage(module.model, config.train.ema) if config.train.ema else None
    if restored:
        _restore_weights(module, average, restored)
        if len(of_ranks := restored.train.get(BATCHNORM, ())) == num_ranks:
            write_batchnorm(module.model, config, of_ranks[setup.context.rank])
    if config.engine.batchnorm == "sync":
        module = sync_batchnorm(module, config)
    engine = build_engine(module, config, num_ranks=num_ranks, device=setup.device)
    if average:
        average.model.to(setup.device)
    restore_optimizer(engine, config, _part(restored.train, OPTIMIZER) if restored else {}, steps=step)
    return setup, Learner(engine, average, began_from), step, scores


def _note_batchnorm(model: nn.Module, config: Config, num_ranks: int) -> str:
    """Say where a rank has few rows for BatchNorm's statistics. Raises `InputError` where it has too few."""
    if config.engine.batchnorm != "local":
        return ""
    rows = _least_rows(config, num_ranks) // config.train.accumulation
    return check_batchnorm(model, rows=rows, size=config.input_size)


def _build_model(config: Config, *, begins: bool, start: Start | None) -> nn.Module:
    """Build the model, with what a run begins with unless a checkpoint's weights replace it."""
    if begins:
        model = build_started(config, start) if start else build_pretrained(config)
    else:
        settings = config.model.model_copy(update={"weights": "none"})
        model = build_model(settings, seed=config.run.seed, input_size=config.input_size)
    _check_size(model, config)
    return model


def _check_size(model: nn.Module, config: Config) -> None:
    """Raise `InputError` where a checkpoint would have a larger file than continuing reads."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    states = STATES[config.optim.name] * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # Of the two files the larger: the weights, or the optimizer's states with the raw weights where those are averages.
    needed = max(weights, states + (weights if config.train.ema else 0))
    if needed > MAX_TENSOR_BYTES:
        raise InputError(
            f"a checkpoint would have a file of {needed:,} bytes, and no run continues from one of more than "
            f"{MAX_TENSOR_BYTES:,}: {describe_size(model)} by {config.optim.name}, train.ema {config.train.ema:g}; "
            "choose a smaller model.backbone, or --model.freeze-backbone"
        )


def _restore_weights(module: ObjectiveModule, average: WeightAverage | None, restored: Restored) -> None:
    weights = {f"model.{name}": tensor for name, tensor in restored.model.items()}
    module.load_state_dict(weights | _part(restored.train, MODULE))
    if average:
        average.model.load_state_dict(restored.model)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_checkpoint(
    setup: Setup,
    learner: Learner,
    saver: Saver,
    tracker: Tracker | NoTracker,
    *,
    state: dict[str, Any],
    scored: dict[str, Any],
) -> None:
    """Save a checkpoint; every rank calls it. `scored` are the scores of these very weights, where they have some."""
    config, engine, average = setup.config, learner.engine, learner.average
    begun = time.monotonic()
    check_finite(engine.module, state["step"])
    if average:
        average.copy_buffers(engine.module.model)
    # The model's own weights are in both files only where the evaluated ones are averages.
    model = dict(learner.evaluated.state_dict())
    rest = {MODULE + n: t for n, t in engine.module.state_dict().items() if average or not n.startswith("model.")}
    rest |= {OPTIMIZER + name: tensor for name, tensor in read_optimizer(engine, config).items()}
    # Evaluation made all ranks' statistics the same; else what is saved is their mean, and training keeps its own.
    of_ranks = None if scored else gather_batchnorm(engine.module.model, config)
    if of_ranks is not None:
        mean = name_batchnorm(engine.module.model, config, of_ranks.mean(0))
        model |= mean
        rest |= {f"{MODULE}model.{name}": value for name, value in mean.items()} if average else {}
        rest[BATCHNORM] = of_ranks
    state = state | {
        "config": flatten(config),
        "identity": setup.data.identity(),
        "order": setup.order.version,
        "view": setup.data.train.view,
        "total_steps": setup.total_steps,
        **({BEGAN_FROM: learner.began_from} if learner.began_from else {}),
    }
    saver.save(model, rest, begun=begun, state=state, scores=scored, records=tracker.files())
