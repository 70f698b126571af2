"""Training, written out: setup, restore, then for every epoch and step; log, evaluate, checkpoint, stop.

Nothing here knows of Ray: a `RunContext` is handed in, so the same loop runs in one process, under torchrun and under
Ray Train.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from mtl_dist.config import Config
from mtl_dist.data.loader import eval_batches, lend, train_batches
from mtl_dist.errors import NonFiniteLoss
from mtl_dist.objective.scores import flat_scores
from mtl_dist.predicting.evaluate import Scored, evaluate
from mtl_dist.runs.lives import begin_life
from mtl_dist.spans import DATA, spanned
from mtl_dist.training.audit import Audit
from mtl_dist.training.averaging import average_batchnorm, freeze_batchnorm
from mtl_dist.training.checks import describe_what_is_left
from mtl_dist.training.engine import gradient_norm, set_learning_rate
from mtl_dist.training.instruments import Instruments, open_instruments
from mtl_dist.training.learner import Learner, restore, save_checkpoint
from mtl_dist.training.looking import Taken, look_at
from mtl_dist.training.pending import Pending
from mtl_dist.training.rates import group_rates
from mtl_dist.training.requests import ask_ranks, is_due, is_late
from mtl_dist.training.saving import Saver
from mtl_dist.training.setup import RunContext, Setup, set_up
from mtl_dist.training.step import train_step
from mtl_dist.training.watchdog import Phase, Watchdog


@dataclass
class _Run:
    """What the loop works with, and where it stands."""

    setup: Setup
    learner: Learner
    seen: Instruments
    audit: Audit
    saver: Saver
    step: int  # completed
    scores: dict[str, Any]  # of the last evaluation
    saved_at: float  # monotonic
    under_way: Taken | None = None  # the last step, until its loss is looked at


def fit(config: Config, context: RunContext) -> dict[str, Any]:
    """Train until the last epoch, or until asked to stop; every rank calls it. Returns the last scores.

    Raises `InputError` for what the user can mend and `NonFiniteLoss` where training diverged.
    """
    with Watchdog(limit_s=config.engine.hang_s) as watchdog:
        setup = set_up(config, context, watchdog)
        # The life first: from here on no earlier one commits, or deletes what is being read.
        started_by = {"launcher": context.launcher, "command_line": context.command_line}
        life = begin_life(config.run.uri, **started_by, num_ranks=context.num_ranks)
        setup, learner, step, scores = restore(setup)
        with (
            open_instruments(setup, life=life, step=step, scores=scores, patience=learner.patience) as seen,
            Audit(config.run.audit_dir, config.run.name, life=life.name, rank=context.rank) as audit,
            Saver(config.run.uri, config.checkpoint, life=life) as saver,
        ):
            try:
                return _train(_Run(setup, learner, seen, audit, saver, step, scores, time.monotonic()))
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}. {describe_what_is_left(saver, begun_at=step)}") from None


def _train(run: _Run) -> dict[str, Any]:
    """Train from after `run.step` on; return the last scores."""
    setup, num_epochs = run.setup, run.setup.config.last_epoch
    run.saver.on_wait = lambda: setup.watchdog.moved(Phase.STORING, run.step)
    for epoch in range(run.step // setup.data.steps_per_epoch, num_epochs):
        if run.learner.patience.ended or not _train_epoch(run, epoch):
            break
        run.learner.engine.module.balancer.finished_epoch()

        # ------------------------------------------------------- once in a while: evaluate, publish, save, stop
        is_evaluated = epoch + 1 == num_epochs or is_due(epoch + 1, setup.config.train.eval_every)
        if is_evaluated:
            if setup.val:
                run.scores, constant, pictures = _evaluate(run)
                run.seen.tracker.evaluated(run.step, epoch, run.scores, constant, pictures)
                run.learner.patience.take(run.scores, epoch)
            _save(run, run.scores)
            setup.context.publish({"step": run.step, "epoch": epoch + 1, **flat_scores(run.scores)})
        if _heed_requests(run, is_saved=is_evaluated):
            break
    return run.scores


def _train_epoch(run: _Run, epoch: int) -> bool:
    """Take the steps of an epoch that are left; return False where it was asked to stop in its midst, and saved."""
    setup, engine, average = run.setup, run.learner.engine, run.learner.average
    config, context, watchdog, module = setup.config, setup.context, setup.watchdog, engine.module
    module.train()
    if config.engine.batchnorm == "frozen":
        freeze_batchnorm(module)
    module.balancer.begin_epoch(epoch, module.objective.after)
    module.objective.begin_epoch(epoch)
    start_step = run.step % setup.data.steps_per_epoch
    batches = train_batches(setup.train, setup.order, epoch=epoch, start_step=start_step, **setup.reading)
    batches = spanned(DATA, lend(setup.train, batches, setup.device))
    asked = ended = time.monotonic()
    watchdog.moved(Phase.DATA, run.step + 1)
    for batch in batches:
        waited_s = time.monotonic() - asked

        # ------------------------------------------------------------------------------------------- step
        watchdog.moved(Phase.STEP, run.step + 1)
        lr = set_learning_rate(engine, config, run.step, setup.total_steps)
        how = {"prepare": setup.prepare, "rank": context.rank, "memory": run.learner.memory}
        loss = train_step(engine, batch, config, epoch=epoch, step=run.step, **how)
        run.step += 1
        if average:
            average.update(module.model, run.step)
        run.audit.finished(run.step, epoch, batch.samples.numpy(), setup.data.tasks)

        # -------------------------------------------------------------------------------------------- log
        rows, took_s, ended = batch.valid_rows(), time.monotonic() - ended, time.monotonic()
        parts, found = run.seen.cut(run.step), Pending((loss, gradient_norm(engine)))  # whose event comes last
        _look_at_loss(run)  # of the step before, which is there by now: this one is under way meanwhile
        rates = group_rates(engine.optimizer.param_groups)
        run.under_way = Taken(run.step, epoch, lr, rates, found, parts, rows, took_s, waited_s)

        # ------------------------------------------------------------ once in a while: save in mid-epoch, stop
        is_amidst = run.step % setup.data.steps_per_epoch > 0  # what is due at its end comes after the evaluation
        if is_amidst and _heed_requests(run, step=run.step):
            batches.close()
            return False
        asked = time.monotonic()
        watchdog.moved(Phase.DATA, run.step + 1)
    _look_at_loss(run)
    return True


def _heed_requests(run: _Run, *, step: int | None = None, is_saved: bool = False) -> bool:
    """Save, unless that is done, where it is due or any rank was asked to; return whether all are to stop here."""
    setup, checkpoint = run.setup, run.setup.config.checkpoint
    late = is_late(run.saved_at, checkpoint.every_minutes)
    asked_for = ask_ranks(setup.context, late=late, step=step, own_s=run.seen.pace.own_s)
    run.seen.pace.heard(asked_for.own_s)
    if not is_saved and (asked_for.any or is_due(run.step, checkpoint.every_steps)):
        _save(run, {})
    if asked_for.stop or asked_for.now:
        run.saver.wait()
    if asked_for.stop and run.step < setup.total_steps:
        run.seen.tracker.say(f"stopped at step {run.step} of {setup.total_steps}, saved; the same command continues")
    return asked_for.stop


def _save(run: _Run, scored: dict[str, Any]) -> None:
    """Save a checkpoint; `scored` are the scores of these very weights, where they have some."""
    _look_at_loss(run)
    state = {"step": run.step, "scores": run.scores, "num_ranks": run.setup.context.num_ranks}
    save_checkpoint(run.setup, run.learner, run.saver, run.seen.tracker, state=state, scored=scored)
    run.saved_at = time.monotonic()


def _evaluate(run: _Run) -> Scored:
    """Score the validation set, and the best constant predictor on it."""
    setup, learner, config = run.setup, run.learner, run.setup.config
    average_batchnorm(learner.engine.module.model, config)
    if learner.average:
        learner.average.copy_buffers(learner.engine.module.model)
    batches = eval_batches(setup.val, batch=config.train.eval_batch, **setup.reading)
    batches = lend(setup.val, batches, setup.device)
    how = {"device": setup.device, "prepare": setup.prepare, "bf16": config.engine.autocast == "bf16"}
    how |= {"progress": lambda count: setup.watchdog.moved(Phase.EVALUATION, run.step)}
    return evaluate(learner.evaluated, learner.engine.module.objective, batches, step=run.step, **how)


def _look_at_loss(run: _Run) -> None:
    """Look at the step under way, whose loss may be waited for."""
    taken, run.under_way = run.under_way, None
    if taken:
        saved, objective = run.saver.saved, run.learner.engine.module.objective
        look_at(taken, run.setup, objective, run.seen, saved_step=saved.step if saved else None)
