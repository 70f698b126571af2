"""What training changes, model and optimizer: built, restored from a checkpoint, and saved into one."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import nn

from mtl_dist.config import Config
from mtl_dist.data.index import Sets
from mtl_dist.device import check_device
from mtl_dist.families import FAMILIES, objective_of
from mtl_dist.models import build_model
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.objective.taught import Taught, Teacher
from mtl_dist.runs.checkpoint import Restored, load_checkpoint
from mtl_dist.runs.patience import Patience
from mtl_dist.runs.start import (
    BEGAN_FROM,
    Start,
    build_pretrained,
    build_started,
    find_start,
    load_everything,
    start_on_ranks,
)
from mtl_dist.runs.teacher import TAUGHT_BY, find_teacher_on_ranks, load_teacher, note_teacher, taught_tasks
from mtl_dist.runs.weights import EXTRACTORS, Weights
from mtl_dist.sections import EMA
from mtl_dist.settings import flatten
from mtl_dist.spans import SAVE, span
from mtl_dist.tasks import TASKS
from mtl_dist.training.averaging import (
    WeightAverage,
    gather_batchnorm,
    name_batchnorm,
    sync_batchnorm,
    write_batchnorm,
)
from mtl_dist.training.checks import (
    check_finite,
    check_num_ranks,
    check_parts,
    check_size,
    describe_size,
    note_batchnorm,
)
from mtl_dist.training.compiling import compile_model
from mtl_dist.training.engine import build_engine, read_optimizer, restore_optimizer
from mtl_dist.training.fitting import settle_micro_batches
from mtl_dist.training.memory import Memory
from mtl_dist.training.micro_batches import MicroBatches
from mtl_dist.training.precision import ARITHMETIC, describe_arithmetic, note_arithmetic, set_precision, settle_autocast
from mtl_dist.training.rates import describe_rates
from mtl_dist.training.saving import Saver
from mtl_dist.training.setup import Setup
from mtl_dist.training.tracking import NoTracker, Tracker
from mtl_dist.training.watchdog import Phase

LOADED = "weights_loaded"  # in state.json
MODULE, OPTIMIZER, BATCHNORM = "module/", "optimizer/", "batchnorm"  # of a checkpoint's train.safetensors
BEGUN_BEFORE = (
    "note: an earlier version began this run. It goes on in the order that it has; from here on biases, positions and "
    "tokens are not decayed, and balanced weights are 1/20 to 20"
)


class Learner(NamedTuple):
    """The model in training, with its average and where it began."""

    engine: Any  # DeepSpeed's, around an `ObjectiveModule`
    average: WeightAverage | None
    began_from: dict[str, Any] | None  # `Start.note`
    loaded: dict[str, Any] | None  # `Loaded.note` of the backbone's weights
    taught_by: dict[str, Any] | None  # `note_teacher` of the run that teaches
    patience: Patience
    memory: Memory

    @property
    def evaluated(self) -> nn.Module:
        return self.average.model if self.average else self.engine.module.model


def check_start(config: Config, *, has_gpu: bool, num_ranks: tuple[int, int], begins: bool) -> str:
    """Try what ranks do before their first step, as far as one process can; say what was found. Raises `InputError`.

    The model is built with its weights, which are downloaded or read where the run begins with some.
    """
    device = check_device(config, has_gpu=has_gpu)
    for number in num_ranks:
        check_num_ranks(config, number)
    model = _build_model(config, begins=begins, start=find_start(config, {}) if begins else None)
    lines = [
        f"start   on {device}; {describe_size(model)}",
        describe_rates(nn.ModuleDict({"model": model}), config),
        f"weights {model.backbone.loaded}" if model.backbone.loaded else "",
        note_batchnorm(model, config, num_ranks[1], parts=config.train.least_parts),
    ]
    return "\n".join(filter(None, lines))


def restore(setup: Setup) -> tuple[Setup, Learner, int, dict[str, Any]]:
    """Build what is trained, with its newest checkpoint; return it, the steps it has had, and its last scores.

    The setup comes back with the order and the precision that the run was begun with.
    """
    config, watchdog, num_ranks = setup.config, setup.watchdog, setup.context.num_ranks
    watchdog.moved(Phase.RESTORING)
    restored = load_checkpoint(config.run.uri, config, setup.data.identity())
    start = None if restored else start_on_ranks(config, setup.data.identity())
    began_from = restored.state.get(BEGAN_FROM) if restored else start and start.note
    if start and config.run.start_with == "everything":
        restored = load_everything(start)
    known = restored.state.get(TAUGHT_BY) if restored else None
    teaching = find_teacher_on_ranks(config, setup.data.train, known)
    watchdog.moved(Phase.BUILDING)
    config = settle_autocast(config, setup.device, restored.state.get("config", {}) if restored else None)
    set_precision(config, setup.device)
    setup = setup._replace(config=config)
    step, scores = (restored.state["step"], restored.state["scores"]) if restored else (0, {})
    if restored:
        setup = setup._replace(order=setup.order.of_version(restored.state.get("order", 1)))
    model = _build_model(config, begins=restored is None, start=start, train=setup.data.train)
    began = BEGUN_BEFORE if restored and "order" not in restored.state else ""
    loaded = model.backbone.loaded
    what_loaded = f"weights {loaded}" if loaded else ""
    arithmetic = note_arithmetic(config, setup.device, restored.state.get(ARITHMETIC) if restored else None)
    micro_batches = MicroBatches(config.run.uri, config.train.least_parts)
    check_parts(config, num_ranks, num_parts := micro_batches.at(step + 1))
    few_rows = note_batchnorm(model, config, num_ranks, parts=num_parts)
    for note in (began, arithmetic, what_loaded, few_rows, _describe_start(setup, model)):
        if note and setup.context.rank == 0:
            print(note, flush=True)
    average = WeightAverage(model, config.train.ema) if config.train.ema else None
    objective = build_objective(config, setup.data.train.labels)
    if teacher := _build_teacher(config, teaching, average, setup.device):
        objective = Taught(objective, teacher, config.loss, setup.data.train.labels)
    passes = max(len(setup.data.tasks), 1)
    shared = FAMILIES[config.model.name].shared
    module = ObjectiveModule(model, objective, balancing=config.loss.balancing, passes=passes, shared=shared)
    if restored:
        _restore_weights(module, average, restored)
        if len(of_ranks := restored.train.get(BATCHNORM, ())) == num_ranks:
            write_batchnorm(module.model, config, of_ranks[setup.context.rank])
        if average:
            average.copy_buffers(module.model)
    if config.engine.batchnorm == "sync":
        module = sync_batchnorm(module, config)
    if config.engine.compile:
        compile_model(module, setup.device)
    engine = build_engine(module, config, num_ranks=num_ranks, device=setup.device)
    if average:
        average.model.to(setup.device)
    restore_optimizer(engine, config, _part(restored.train, OPTIMIZER) if restored else {}, steps=step)
    loaded = restored.state.get(LOADED) if restored else loaded and loaded.note()
    taught_by = note_teacher(teaching, config) if teaching else None
    patience = Patience(config, restored.state if restored else {})
    settle_micro_batches(setup, engine, micro_batches, step=step)
    memory = Memory(engine, config, micro_batches, rank=setup.context.rank, num_ranks=num_ranks)
    return setup, Learner(engine, average, began_from, loaded, taught_by, patience, memory), step, scores


def _describe_start(setup: Setup, model: nn.Module) -> str:
    """Say what trains on what; the plan has said the rest."""
    device, num_ranks, num_threads = setup.device, setup.context.num_ranks, torch.get_num_threads()
    what = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
    parts = f"{num_ranks} rank{'s' * (num_ranks > 1)} on {what}", f"{num_threads} thread{'s' * (num_threads > 1)} each"
    autocast = ", bf16" if setup.config.engine.autocast == "bf16" else ""
    return f"start   {', '.join(parts)}{autocast}; {describe_size(model)}"


def _build_model(config: Config, *, begins: bool, start: Start | None, train: Sets | None = None) -> nn.Module:
    """Build the model, with what a run begins with unless a checkpoint's weights replace it."""
    if begins:
        model = build_started(config, start) if start else build_pretrained(config)
        if train and train.statistics and not (start and start.checkpoint):  # whose own go with its weights
            model.backbone.learn_inputs(*map(torch.from_numpy, train.statistics))
    else:
        settings = config.model.model_copy(update={"weights": "none"})
        model = build_model(settings, seed=config.run.seed, input_size=config.input_size)
    check_size(model, config)
    return model


def _build_teacher(
    config: Config, teaching: Weights | None, average: WeightAverage | None, device: torch.device
) -> Teacher | None:
    """Build what tells labels that are missing: the run of these weights, or the run's own average."""
    if teaching:
        return Teacher(load_teacher(teaching).to(device), taught_tasks(teaching))
    if average and config.loss.teacher == EMA and objective_of(config.model.name).reads_labels:
        return Teacher(average.model, TASKS)
    return None


def _restore_weights(module: ObjectiveModule, average: WeightAverage | None, restored: Restored) -> None:
    weights = {f"model.{name}": tensor for name, tensor in restored.model.items()}
    module.load_state_dict(weights | _part(restored.train, MODULE))
    if average:
        average.model.load_state_dict(restored.model)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@span(SAVE)
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
        ARITHMETIC: describe_arithmetic(config, setup.device),
        "view": setup.data.train.view,
        EXTRACTORS: [extractor.model_dump() for extractor in setup.data.train.extractors],
        "total_steps": setup.total_steps,
        **learner.patience.note(),
        **({BEGAN_FROM: learner.began_from} if learner.began_from else {}),
        **({LOADED: learner.loaded} if learner.loaded else {}),
        **({TAUGHT_BY: learner.taught_by} if learner.taught_by else {}),
    }
    saver.save(model, rest, begun=begun, state=state, scores=scored, records=tracker.files())
