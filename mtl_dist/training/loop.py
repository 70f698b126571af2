"""Training, written out: setup, restore, then for every epoch and step; log, evaluate, checkpoint, stop.

Nothing here knows of Ray: a `RunContext` is handed in, so the same loop runs in one process, under torchrun and under
Ray Train.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mtl_dist import storage
from mtl_dist.config import Config, dump_yaml
from mtl_dist.data.loader import eval_batches, train_batches
from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.module import StepLoss
from mtl_dist.objective.scores import flat_scores
from mtl_dist.predicting.evaluate import evaluate, list_rows
from mtl_dist.ranks import gather_lists
from mtl_dist.runs.checkpoint import on_rank_0
from mtl_dist.runs.lives import Life, begin_life
from mtl_dist.tasks import Batch
from mtl_dist.training.audit import Audit
from mtl_dist.training.averaging import average_batchnorm, freeze_batchnorm
from mtl_dist.training.engine import learning_rate, set_learning_rate
from mtl_dist.training.saving import Saver
from mtl_dist.training.setup import RunContext, Setup, Trained, describe_size, restore, save_checkpoint, set_up
from mtl_dist.training.step import train_step
from mtl_dist.training.tracking import Tracker
from mtl_dist.training.watchdog import Watchdog

CONFIG_NAME = "config.yaml"
ASK_EVERY_STEPS = 8


class _Progress(NamedTuple):
    """A step whose loss has not been looked at yet: looking makes the host wait for the device."""

    step: int
    epoch: int
    lr: float
    loss: StepLoss
    rows: list[int]
    took_s: float  # since the step before was done, the wait for data included
    waited_s: float


def fit(config: Config, context: RunContext) -> dict[str, Any]:
    """Train until the last epoch, or until asked to stop; every rank calls it. Returns the last scores.

    Raises `InputError` for what the user can mend and `NonFiniteLoss` where training diverged.
    """
    with Watchdog(limit_s=config.engine.hang_s) as watchdog:
        return _fit(config, context, watchdog)


def _fit(config: Config, context: RunContext, watchdog: Watchdog) -> dict[str, Any]:
    setup = set_up(config, context, watchdog)
    # The life first: from here on no earlier one commits, or deletes what is being read.
    life = begin_life(config.run.uri, command=context.command, num_ranks=context.num_ranks, typed=context.typed)
    setup, trained, step, last_scores = restore(setup)
    say_start(setup, trained)
    with contextlib.ExitStack() as records:
        tracker, audit = _open_records(setup, records, life=life, step=step, scores=last_scores)
        with Saver(config.run.uri, config.checkpoint, life=life) as saver:
            try:
                return _train(setup, trained, step, last_scores, tracker=tracker, audit=audit, saver=saver)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}. {_what_is_left(saver, begun_at=step)}") from None


def say_start(setup: Setup, trained: Trained) -> None:
    """Say, once for all ranks, what trains on what; the plan has said the rest."""
    if setup.context.rank:
        return
    device, num_ranks, num_threads = setup.device, setup.context.num_ranks, torch.get_num_threads()
    what = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
    parts = f"{num_ranks} rank{'s' * (num_ranks > 1)} on {what}", f"{num_threads} thread{'s' * (num_threads > 1)} each"
    print(f"start   {', '.join(parts)}; {describe_size(trained.engine.module.model)}", flush=True)


def _train(
    setup: Setup,
    trained: Trained,
    step: int,
    last_scores: dict[str, Any],
    *,
    tracker: Tracker | None,
    audit: Audit | None,
    saver: Saver,
) -> dict[str, Any]:
    """Train from after `step` on; return the last scores."""
    config, context, watchdog = setup.config, setup.context, setup.watchdog
    engine, average, steps_per_epoch = trained.engine, trained.average, setup.data.steps_per_epoch
    saved_at = time.monotonic()

    def save(scored: dict[str, Any]) -> None:
        nonlocal saved_at
        state = {"step": step, "scores": last_scores, "num_ranks": context.num_ranks}
        save_checkpoint(setup, trained, saver, tracker, state=state, scored=scored)
        saved_at = time.monotonic()

    saver.on_wait = lambda: watchdog.moved(step, 3, f"storing the checkpoint of step {step}")
    for epoch in range(step // steps_per_epoch, config.train.epochs):
        engine.module.train()
        if config.engine.batchnorm == "frozen":
            freeze_batchnorm(engine.module)
        batches = _open_batches(setup, epoch, start_step=step % steps_per_epoch)
        unseen: _Progress | None = None
        asked = ended = time.monotonic()
        watchdog.moved(step + 1, 0, f"waiting for the data of step {step + 1}")
        for batch in batches:
            waited_s = time.monotonic() - asked

            # --------------------------------------------------------------------------------------- step
            watchdog.moved(step + 1, 1, f"step {step + 1}")
            lr = learning_rate(config, step, setup.total_steps)
            set_learning_rate(engine, lr)
            loss = train_step(engine, batch, config, epoch=epoch, step=step, device=setup.device, rank=context.rank)
            step += 1
            if average:
                average.update(engine.module.model, step)
            rows = batch.valid_rows()
            if audit:
                audit.finished(step, epoch, batch.samples.numpy(), setup.data.tasks)

            # ---------------------------------------------------------------------------------------- log
            took_s, ended = time.monotonic() - ended, time.monotonic()
            context.observe(step_s=took_s, data_wait_s=waited_s, images_per_s=len(rows) / took_s)
            if saver.saved:
                context.observe(checkpoint_step=saver.saved.step)
            if unseen:  # the step before, whose loss is there by now: this one is under way meanwhile
                _look_at(unseen, setup, tracker, saver)
            unseen = _Progress(step, epoch, lr, loss, rows, took_s, waited_s)

            # -------------------------------------------------------- once in a while: save in mid-epoch, stop
            if step % steps_per_epoch:  # what is due at an epoch's end comes after its evaluation
                wishes = _ask_ranks(context, step, is_due=_is_late(saved_at, config.checkpoint.every_minutes))
                if wishes.any or _is_due(step, config.checkpoint.every_steps):
                    _look_at(unseen, setup, tracker, saver)
                    unseen = None
                    save({})
                if wishes.stop or wishes.now:
                    saver.wait()
                if wishes.stop:
                    batches.close()
                    _say_stopped(tracker, step, setup.total_steps)
                    return last_scores
            asked = time.monotonic()
            watchdog.moved(step + 1, 0, f"waiting for the data of step {step + 1}")
        if unseen:
            _look_at(unseen, setup, tracker, saver)
        engine.module.balancer.finished_epoch()

        # ------------------------------------------------------- once in a while: evaluate, publish, save, stop
        is_last = epoch + 1 == config.train.epochs
        is_late = _is_late(saved_at, config.checkpoint.every_minutes)
        wishes = _ask_ranks(context, step, is_due=is_late, always=True)
        if is_last or _is_due(epoch + 1, config.train.eval_every):
            last_scores = _evaluate(setup, trained, step)
            if tracker:
                floor = engine.module.objective.meter().floor(setup.data.val.labels)
                tracker.evaluated(step, epoch, last_scores, floor)
            save(last_scores)
            context.publish({"step": step, "epoch": epoch + 1, **flat_scores(last_scores)})
        elif wishes.any or _is_due(step, config.checkpoint.every_steps):
            save({})
        if wishes.stop or wishes.now:
            saver.wait()
        if wishes.stop and not is_last:
            _say_stopped(tracker, step, setup.total_steps)
            break
    return last_scores


def _what_is_left(saver: Saver, *, begun_at: int) -> str:
    """Say what checkpoint a run that diverged has, and what to do; every rank calls it."""

    def look() -> str:
        saver.wait()  # one may be on its way
        remedy = "lower optim.lr, or set a lower optim.clip_norm"
        if not saver.saved and not begun_at:
            return f"The run has no checkpoint: {remedy}; --run.name may stay"
        last = f"of step {saver.saved.step} ({saver.saved.uri})" if saver.saved else f"of step {begun_at}"
        return (
            f"The last checkpoint is {last}: its weights are finite, but may have been diverging already. The same "
            f"command comes to the same end: {remedy}, under another --run.name"
        )

    return on_rank_0(look)


def _open_records(
    setup: Setup, records: contextlib.ExitStack, *, life: Life, step: int, scores: dict[str, Any]
) -> tuple[Tracker | None, Audit | None]:
    """Open what this rank writes of the run, closed with `records`, and say where the run stands."""
    config, context = setup.config, setup.context
    tracker = audit = None

    def open_tracker() -> None:
        nonlocal tracker
        life.note_step(step)
        tracker = Tracker(config.run.uri, resumed_at=step, num_ranks=context.num_ranks)
        storage.write_bytes(storage.join(config.run.uri, CONFIG_NAME), dump_yaml(config).encode())
        context.observe(restarts=len(life.known) - 1)

    on_rank_0(open_tracker)
    if step >= setup.total_steps:
        context.publish({"step": step, "epoch": config.train.epochs, **flat_scores(scores)})
        if tracker:
            print(
                f"run '{config.run.name}' is finished (step {step} of {setup.total_steps}); nothing is left to do",
                flush=True,
            )
    if config.run.audit_dir:
        audit = Audit(config.run.audit_dir, config.run.name, life=life.name, rank=context.rank)
        records.callback(audit.close)
    return tracker, audit


def _open_batches(setup: Setup, epoch: int, *, start_step: int) -> Generator[Batch]:
    config = setup.config
    return train_batches(
        setup.train_reader,
        setup.order,
        epoch=epoch,
        start_step=start_step,
        rank=setup.context.rank,
        num_ranks=setup.context.num_ranks,
        size=config.data.image_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def _evaluate(setup: Setup, trained: Trained, step: int) -> dict[str, Any]:
    config, context, watchdog = setup.config, setup.context, setup.watchdog
    average_batchnorm(trained.engine.module.model, config)
    if trained.average:
        trained.average.copy_buffers(trained.engine.module.model)
    batches = eval_batches(
        setup.val_reader,
        batch=config.train.eval_batch,
        rank=context.rank,
        num_ranks=context.num_ranks,
        size=config.data.image_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    return evaluate(
        trained.evaluated,
        trained.engine.module.objective,
        batches,
        step=step,
        device=setup.device,
        size=config.input_size,
        bf16=config.engine.autocast == "bf16",
        progress=lambda count: watchdog.moved(step, 2, f"the evaluation after step {step}"),
    )


def _look_at(progress: _Progress, setup: Setup, tracker: Tracker | None, saver: Saver) -> None:
    """Record a step's losses; stop the run where they are not finite. All ranks hold the same values."""
    losses = {term: float(loss) for term, loss in progress.loss.terms.items()} | {"total": float(progress.loss.total)}
    weights = {f"weight of {term}": float(weight) for term, weight in progress.loss.weights.items()}
    wrong = {name: value for name, value in weights.items() if not math.isfinite(value)}
    if wrong or not all(map(math.isfinite, losses.values())):
        shown = ", ".join(f"{name} {value:g}" for name, value in (losses | wrong).items())
        rows = list_rows(gather_lists(progress.rows))
        raise NonFiniteLoss(f"step {progress.step}: the loss is not finite ({shown}); its rows: {rows}")
    if tracker:
        present = {term for term, is_present in progress.loss.present.items() if bool(is_present)}
        shown = {name: value for name, value in losses.items() if name == "total" or name in present}
        learned = setup.config.loss.balancing != "fixed"
        weights = {term: float(w) for term, w in progress.loss.weights.items() if learned and term in present}
        tracker.step(
            progress.step,
            setup.total_steps,
            progress.epoch,
            progress.lr,
            shown,
            weights=weights,
            images=setup.config.train.global_batch * max(len(setup.data.tasks), 1),
            took_s=progress.took_s,
            waited_s=progress.waited_s,
            saved_step=saver.saved.step if saver.saved else None,
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


def _say_stopped(tracker: Tracker | None, step: int, total_steps: int) -> None:
    if tracker:
        print(f"stopped at step {step} of {total_steps}, saved; the same command continues", flush=True)
