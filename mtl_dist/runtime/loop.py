"""Training, written out: setup, restore, then for every epoch and step; log, evaluate, checkpoint, stop.

Nothing here knows of Ray: a `RunContext` is handed in, so the same loop runs in one process, under torchrun and under
Ray Train.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config, dump_yaml, flatten
from mtl_dist.data.augment import augment, make_draws
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.loader import eval_batches, train_batches
from mtl_dist.data.reader import ShardReader
from mtl_dist.errors import InputError
from mtl_dist.models import build_model
from mtl_dist.objective.metrics import constant_scores, scores
from mtl_dist.objective.module import ObjectiveModule, StepLoss
from mtl_dist.runtime.audit import Audit
from mtl_dist.runtime.averaging import WeightAverage, average_batchnorm, freeze_batchnorm
from mtl_dist.runtime.checkpoint import Restored, load_checkpoint
from mtl_dist.runtime.device import keep_freed_memory, pick_device
from mtl_dist.runtime.engine import build_engine, learning_rate, read_optimizer, restore_optimizer, set_learning_rate
from mtl_dist.runtime.evaluate import predict, total_sums
from mtl_dist.runtime.plan import open_data
from mtl_dist.runtime.saving import Saver, begin_life, note_step, read_lives
from mtl_dist.runtime.tracking import Tracker
from mtl_dist.runtime.watchdog import Watchdog
from mtl_dist.tasks import TASKS, Batch

CONFIG_NAME = "config.yaml"
ASK_EVERY_STEPS = 8
MODULE, OPTIMIZER = "module/", "optimizer/"  # of a checkpoint's train.safetensors


class RunContext(Protocol):
    """Where a rank stands, and whom it tells. torch.distributed is initialised before `fit`."""

    rank: int
    num_ranks: int
    command: str  # names what started the ranks, the same when they are started again
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


class NonFiniteLoss(RuntimeError):
    """The loss of a step, or what a step made of the weights, is not a number or infinite."""


class _Progress(NamedTuple):
    """A step whose loss has not been looked at yet: looking makes the host wait for the device."""

    step: int
    epoch: int
    lr: float
    loss: StepLoss
    rows: np.ndarray
    waited_s: float


def fit(config: Config, context: RunContext) -> dict[str, Any]:
    """Train until the last epoch, or until asked to stop; every rank calls it. Returns the last scores.

    Raises `InputError` for what the user can mend and `NonFiniteLoss` where training diverged.
    """
    with Watchdog(limit_s=config.engine.hang_s) as watchdog:
        return _fit(config, context, watchdog)


def _fit(config: Config, context: RunContext, watchdog: Watchdog) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------------ setup
    device = pick_device(config, has_gpu=context.has_gpu)
    torch.set_num_threads(config.engine.threads or context.num_cpus)
    if device.type == "cpu":
        keep_freed_memory()
    data = open_data(config)
    if context.num_ranks > config.num_streams:
        raise InputError(
            f"{context.num_ranks} ranks for {config.num_streams} streams: a rank reads one at least; start "
            "fewer ranks, or raise train.global_batch or data.streams"
        )
    cache = Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))
    train_reader = ShardReader(config.data.train, data.train, cache)
    val_reader = ShardReader(config.data.val, data.val, cache)

    # ---------------------------------------------------------------------------------------------- restore
    # The life first: from here on no earlier one commits, or deletes what is being read.
    life = begin_life(config.run.uri, command=context.command, num_ranks=context.num_ranks)
    watchdog.moved(0, 1, "reading the checkpoint")
    restored = load_checkpoint(config.run.uri, config, data.identity())
    watchdog.moved(0, 2, "building the model")
    step, last_scores = (restored.state["step"], restored.state["scores"]) if restored else (0, {})
    module = ObjectiveModule(_build_model(config, pretrained=restored is None), config.loss, data.train.labels)
    average = WeightAverage(module.model, config.train.ema) if config.train.ema else None
    if restored:
        _restore_weights(module, average, restored)
    if config.engine.batchnorm == "sync":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    engine = build_engine(module, config, num_ranks=context.num_ranks, device=device)
    if average:
        average.model.to(device)
    restore_optimizer(engine, config, _part(restored.train, OPTIMIZER) if restored else {}, steps=step)
    restored = None  # hundreds of megabytes
    evaluated = average.model if average else engine.module.model

    steps_per_epoch = data.order.num_steps
    total_steps = steps_per_epoch * config.train.epochs
    tracker = None
    if context.rank == 0:
        note_step(config.run.uri, life, step)
        tracker = Tracker(config.run.uri, resumed_at=step, num_ranks=context.num_ranks)
        storage.write_bytes(storage.join(config.run.uri, CONFIG_NAME), dump_yaml(config).encode())
        context.observe(restarts=len(read_lives(config.run.uri)) - 1)
    if step >= total_steps:
        context.publish({"step": step, "epoch": config.train.epochs, **_flat_scores(last_scores)})
        if tracker:
            print(
                f"run '{config.run.name}' is finished (step {step} of {total_steps}); nothing is left to do", flush=True
            )
    audit = Audit(config.run.audit_dir, config.run.name, life=life, rank=context.rank) if config.run.audit_dir else None
    saved_at = time.monotonic()

    def save(saver: Saver, scored: dict[str, Any]) -> None:
        nonlocal saved_at
        begun = time.monotonic()
        average_batchnorm(engine.module.model, config)
        _check_finite(engine.module, step)
        if average:
            average.copy_buffers(engine.module.model)
        state = {
            "step": step,
            "config": flatten(config),
            "identity": data.identity(),
            "scores": last_scores,
            "num_ranks": context.num_ranks,
        }
        # The model's own weights are in both files only where the evaluated ones are averages.
        rest = {MODULE + n: t for n, t in engine.module.state_dict().items() if average or not n.startswith("model.")}
        rest |= {OPTIMIZER + name: tensor for name, tensor in read_optimizer(engine, config).items()}
        records = tracker.files() if tracker else {}
        saver.save(evaluated.state_dict(), rest, begun=begun, state=state, scores=scored, records=records)
        saved_at = time.monotonic()

    with Saver(config.run.uri, config.checkpoint, life=life) as saver:
        saver.on_wait = lambda: watchdog.moved(step, 3, f"storing the checkpoint of step {step}")
        for epoch in range(step // steps_per_epoch, config.train.epochs):
            module.train()
            if config.engine.batchnorm == "frozen":
                freeze_batchnorm(module)
            batches = train_batches(
                train_reader,
                data.order,
                epoch=epoch,
                start_step=step % steps_per_epoch,
                rank=context.rank,
                num_ranks=context.num_ranks,
                size=config.data.image_size,
                workers=config.data.workers,
                prefetch=config.data.prefetch,
            )
            unseen: _Progress | None = None
            asked = time.monotonic()
            watchdog.moved(step + 1, 0, f"waiting for the data of step {step + 1}")
            for batch in batches:
                waited_s = time.monotonic() - asked

                # ----------------------------------------------------------------------------------- step
                watchdog.moved(step + 1, 1, f"step {step + 1}")
                lr = learning_rate(config, step, total_steps)
                set_learning_rate(engine, lr)
                loss = _train_step(engine, batch, config, epoch=epoch, step=step, device=device, rank=context.rank)
                step += 1
                if average:
                    average.update(engine.module.model, step)
                if audit:
                    audit.finished(step, epoch, batch.rows.flatten().numpy())
                took_s = time.monotonic() - asked
                context.observe(step_s=took_s, data_wait_s=waited_s, images_per_s=len(batch.rows) / took_s)
                if saver.saved:
                    context.observe(checkpoint_step=saver.saved.step)
                if unseen:  # the step before: its loss is there by now, and asking does not make the device wait
                    _look_at(unseen, tracker, saver, config, total_steps)
                unseen = _Progress(step, epoch, lr, loss, batch.rows.flatten().numpy(), waited_s)

                # --------------------------------------------------- once in a while: stop, save in mid-epoch
                if step % steps_per_epoch:  # what is due at an epoch's end comes after its evaluation
                    wishes = _ask_ranks(context, step, is_due=_is_late(saved_at, config.checkpoint.every_minutes))
                    if wishes.any or _is_due(step, config.checkpoint.every_steps):
                        _look_at(unseen, tracker, saver, config, total_steps)
                        unseen = None
                        save(saver, {})
                    if wishes.stop or wishes.now:
                        saver.wait()
                    if wishes.stop:
                        batches.close()
                        _say_stopped(tracker, step, total_steps)
                        return last_scores
                asked = time.monotonic()
                watchdog.moved(step + 1, 0, f"waiting for the data of step {step + 1}")
            if unseen:
                _look_at(unseen, tracker, saver, config, total_steps)

            # --------------------------------------------------------- once in a while: evaluate, publish, save
            is_last = epoch + 1 == config.train.epochs
            is_late = _is_late(saved_at, config.checkpoint.every_minutes)
            wishes = _ask_ranks(context, step, is_due=is_late, always=True)
            if is_last or _is_due(epoch + 1, config.train.eval_every):
                average_batchnorm(engine.module.model, config)
                if average:
                    average.copy_buffers(engine.module.model)
                last_scores = _evaluate(evaluated, val_reader, config, context, device, watchdog, step)
                if tracker:
                    tracker.evaluated(step, epoch, last_scores, constant_scores(data.val.labels))
                save(saver, last_scores)
                context.publish({"step": step, "epoch": epoch + 1, **_flat_scores(last_scores)})
            elif wishes.any or _is_due(step, config.checkpoint.every_steps):
                save(saver, {})
            if wishes.stop or wishes.now:
                saver.wait()
            if wishes.stop and not is_last:
                _say_stopped(tracker, step, total_steps)
                break
    return last_scores


def _train_step(
    engine, batch: Batch, config: Config, *, epoch: int, step: int, device: torch.device, rank: int
) -> StepLoss:
    """One optimizer step on this rank's part of the global batch, in `train.accumulation` micro-batches."""
    parts = config.train.accumulation
    draws = make_draws(batch.rows, seed=config.run.seed, epoch=epoch)
    inputs = augment(batch.inputs.to(device, non_blocking=True), draws.to(device), config.augment, config.input_size)
    labels = batch.labels.to(device)
    micro_batches = [(inputs, labels)]
    if parts > 1:
        columns = [tensor.tensor_split(parts) for tensor in labels]
        micro_batches = [(part, type(labels)(*label)) for part, *label in zip(inputs.tensor_split(parts), *columns)]

    total = None
    if parts > 1:
        # The losses of the whole batch need the sums of the whole batch before the first backward: CCC is no mean.
        for number, (part, label) in enumerate(micro_batches):
            _seed_dropout(config, step, rank, number)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.engine.autocast == "bf16"):
                sums = engine.module.sums(part, label)
            total = sums if total is None else total.plus(sums)
        total = total.detached_total()
    for number, (part, label) in enumerate(micro_batches):
        _seed_dropout(config, step, rank, number)
        loss = engine(part, label, total, parts=parts)
        engine.backward(loss.total)
        engine.step()
    return loss._replace(total=loss.total.detach())


def _seed_dropout(config: Config, step: int, rank: int, part: int) -> None:
    """Key torch's generator, which only dropout draws from, by (seed, step, rank, part): there is no state to save."""
    (seed,) = np.random.SeedSequence([config.run.seed, step, rank, part]).generate_state(1, np.uint64)
    torch.manual_seed(int(seed >> np.uint64(1)))


def _look_at(progress: _Progress, tracker: Tracker | None, saver: Saver, config: Config, total_steps: int) -> None:
    """Record a step's losses; stop the run where they are not finite. All ranks hold the same values."""
    losses = {task: float(loss) for task, loss in progress.loss.tasks.items()} | {"total": float(progress.loss.total)}
    if not all(math.isfinite(value) for value in losses.values()):
        rows = ", ".join(map(str, progress.rows))
        raise NonFiniteLoss(
            f"step {progress.step}: the loss is not finite ({losses}); this rank's rows: {rows}. The last "
            "checkpoint is intact; lower optim.lr or optim.clip_norm under another --run.name"
        )
    if tracker:
        present = {task for task in TASKS if bool(progress.loss.present[task])}
        shown = {name: value for name, value in losses.items() if name == "total" or name in present}
        tracker.step(
            progress.step,
            total_steps,
            progress.epoch,
            progress.lr,
            shown,
            images=config.train.global_batch,
            waited_s=progress.waited_s,
            saved_step=saver.saved.step if saver.saved else None,
        )


def _evaluate(
    model: nn.Module,
    reader: ShardReader,
    config: Config,
    context: RunContext,
    device: torch.device,
    watchdog: Watchdog,
    step: int,
) -> dict[str, Any]:
    batches = eval_batches(
        reader,
        batch=config.train.eval_batch,
        rank=context.rank,
        num_ranks=context.num_ranks,
        size=config.data.image_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    predicted = predict(
        model,
        batches,
        device=device,
        size=config.input_size,
        bf16=config.engine.autocast == "bf16",
        progress=lambda count: watchdog.moved(step, 2, f"the evaluation after step {step}"),
    )
    return scores(total_sums(predicted))


def _flat_scores(result: dict[str, Any]) -> dict[str, float]:
    return {key: result[key] for key in ("p", "ccc_v", "ccc_a", *TASKS) if result[key] is not None}


def _build_model(config: Config, *, pretrained: bool) -> nn.Module:
    """Build the model, with pretrained weights unless a checkpoint's replace them."""
    if not pretrained:
        return build_model(config.model.model_copy(update={"weights": "none"}), seed=config.run.seed)
    if not storage.is_s3(config.model.weights):
        return build_model(config.model, seed=config.run.seed)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-weights-") as scratch:
        path = Path(scratch) / config.model.weights.rpartition("/")[2]
        try:
            storage.download(config.model.weights, path)
        except FileNotFoundError:
            raise InputError(
                f"model.weights {config.model.weights} does not exist; give a state dict, imagenet or none"
            ) from None
        return build_model(config.model, seed=config.run.seed, weights_file=path)


def _check_finite(module: nn.Module, step: int) -> None:
    """Raise before weights are saved that are no numbers: a finite loss can have gradients that are not."""
    wrong = [name for name, tensor in module.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise NonFiniteLoss(
            f"step {step}: weights are not finite ({', '.join(wrong[:3])}). The last checkpoint is intact; lower "
            "optim.lr or optim.clip_norm under another --run.name"
        )


def _is_due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


def _is_late(saved_at: float, every_minutes: float | None) -> bool:
    return every_minutes is not None and time.monotonic() - saved_at >= 60 * every_minutes


class _Wishes(NamedTuple):
    stop: bool  # save and leave the loop
    now: bool  # save, and wait until it is stored
    late: bool  # save

    @property
    def any(self) -> bool:
        return self.stop or self.now or self.late


def _ask_ranks(context: RunContext, step: int, *, is_due: bool, always: bool = False) -> _Wishes:
    """What any rank was asked for: all ranks must save and leave the loop at the same step. Rank 0's clock counts.

    Several ranks ask each other now and then only, since the answer makes the host wait for the device.
    """
    if context.num_ranks == 1:
        return _Wishes(context.should_stop(), context.should_save(), is_due)
    if not always and step % ASK_EVERY_STEPS:
        return _Wishes(False, False, False)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = (context.should_stop(), context.should_save(), is_due and context.rank == 0)
    flags = torch.tensor(mine, dtype=torch.float32, device=device)
    dist.all_reduce(flags)
    return _Wishes(*(bool(flag) for flag in flags))


def _restore_weights(module: ObjectiveModule, average: WeightAverage | None, restored: Restored) -> None:
    weights = {f"model.{name}": tensor for name, tensor in restored.model.items()}
    module.load_state_dict(weights | _part(restored.train, MODULE))
    if average:
        average.model.load_state_dict(restored.model)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _say_stopped(tracker: Tracker | None, step: int, total_steps: int) -> None:
    if tracker:
        print(f"stopped at step {step} of {total_steps}, saved; the same command continues", flush=True)
