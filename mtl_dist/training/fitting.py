"""`train.accumulation auto`: the fewest micro-batches that a step fits into memory with, found when a run begins.

Every rank tries forward and backward passes on the first batch that it is to read, without a word to the others: one
that runs out leaves nobody waiting. The most that any rank needs is stored with the run, which keeps it. Weights and
gradients are not touched, BatchNorm computes with its running statistics, and torch's generator is as it was.
"""

from __future__ import annotations

import contextlib

import torch

from mtl_dist.data.loader import train_batches
from mtl_dist.device import MEMORY_REMEDY, free_memory, is_out_of_memory
from mtl_dist.errors import InputError
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.ranks import gather_lists, on_rank_0
from mtl_dist.tasks import Batch
from mtl_dist.training.averaging import freeze_batchnorm
from mtl_dist.training.checks import STATES, check_parts, note_batchnorm
from mtl_dist.training.draws import draw_passes
from mtl_dist.training.memory import describe_parts
from mtl_dist.training.micro_batches import MicroBatches, split_batch
from mtl_dist.training.overlap import overlaps
from mtl_dist.training.setup import Setup
from mtl_dist.transfer import pin_batch, send


def settle_micro_batches(setup: Setup, engine, micro_batches: MicroBatches, *, step: int) -> None:
    """Find how many micro-batches fit, where that is wanted and not known; every rank calls it, after `step` steps.

    Raises `InputError` where one row does not fit.
    """
    config, num_ranks = setup.config, setup.context.num_ranks
    is_over = step >= setup.data.steps_per_epoch * config.last_epoch
    if config.train.accumulation != "auto" or micro_batches.changes or is_over:
        return
    batch = _next_batch(setup, engine.module.passes, step)
    rows, tried = len(batch.samples), {"num_states": 0 if engine.optimizer.state else STATES[config.optim.name]}
    tried |= {"bf16": config.engine.autocast == "bf16", "looks": config.loss.gradients_every is not None}
    if overlaps(config, setup.device, num_ranks):
        tried["num_states"] += 1  # gradients on their way to other ranks, while the pass goes on
    of_ranks = gather_lists([find_parts(engine.module, batch, **tried)])
    if None in of_ranks:
        raise InputError(f"a step runs out of memory with a micro-batch of one row: {MEMORY_REMEDY}")
    parts = max(of_ranks)
    check_parts(config, num_ranks, parts)
    note = note_batchnorm(engine.module.model, config, num_ranks, parts=parts) if parts > 1 else ""
    text = f"memory  {describe_parts(parts, rows)}, {parts} a step: the fewest that fit (train.accumulation auto)"

    def tell() -> None:
        micro_batches.write(step + 1, parts, text)
        print("\n".join(filter(None, [text, note])), flush=True)

    on_rank_0(tell)
    micro_batches.take(step + 1, parts)


def find_parts(module: ObjectiveModule, batch: Batch, *, num_states: int, bf16: bool, looks: bool) -> int | None:
    """Return the fewest micro-batches, of 1, 2, 4 and so on, whose passes fit; None where one row does not.

    `num_states`: of an optimizer that has none yet, those that every parameter will have. `looks`: some steps look at
    the gradients of each term.
    """
    devices, was_training = [batch.inputs.device] if batch.inputs.is_cuda else [], module.training
    module.train()
    freeze_batchnorm(module)
    try:
        with torch.random.fork_rng(devices):
            parts = 1
            while not _fits(module, batch, parts, num_states=num_states, bf16=bf16, looks=looks):
                if parts * module.passes >= len(batch.samples):
                    return None
                parts *= 2
            return parts
    finally:
        module.train(was_training)
        free_memory()


def _fits(module: ObjectiveModule, batch: Batch, parts: int, **how) -> bool:
    try:
        _pass_part(module, batch, parts, **how)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # not in the handler: the exception holds what the passes have made
    return False


def _pass_part(module: ObjectiveModule, batch: Batch, parts: int, *, num_states: int, bf16: bool, looks: bool) -> None:
    """Pass the largest micro-batch forward and backward, beside what a step has then."""
    part, trained = split_batch(batch, parts=parts, passes=module.passes)[0], _trained(module)
    # Gradients of the micro-batch before, and the optimizer's state.
    held = [torch.empty_like(weight) for weight in trained for _ in range(num_states + (parts > 1))]
    gram = torch.eye(len(module.objective.terms), dtype=torch.float64, device=batch.inputs.device)
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bf16):
        total = module.sums(part)  # given, nothing is added up over ranks
        loss = module(part, total, gram, parts=parts, looks_at_gradients=looks)
    torch.autograd.grad(loss.total, trained, allow_unused=True)
    del held


def _trained(module: ObjectiveModule) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _next_batch(setup: Setup, passes: int, step: int) -> Batch:
    """Read the batch of the step after `step`, prepared, on the device."""
    epoch, start_step = divmod(step, setup.data.steps_per_epoch)
    batches = train_batches(setup.train, setup.order, epoch=epoch, start_step=start_step, **setup.reading)
    with contextlib.closing(batches):
        batch = pin_batch(next(batches), setup.device)
    draws = draw_passes(setup.prepare, batch.rows, seed=setup.config.run.seed, epoch=epoch, passes=passes)
    there = batch.to(setup.device)
    return there._replace(inputs=setup.prepare(there, send(draws, setup.device)))
