"""A step that runs out of memory is the same step in smaller micro-batches, on one rank and on several."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import build_config
from mtl_dist.data.unlabelled import no_labels
from mtl_dist.device import is_out_of_memory
from mtl_dist.errors import InputError
from mtl_dist.predicting import evaluate
from mtl_dist.predicting.evaluate import forward_all
from mtl_dist.runs.checkpoint import committed
from mtl_dist.tasks import Batch
from mtl_dist.training.checks import check_parts
from mtl_dist.training.micro_batches import MicroBatches, plan_parts, read_changes
from tests.conftest import assert_one_message, run_here
from tests.ranks import start_ranks
from tests.starving import limited, starving
from tests.test_recipes import FROZEN, assert_close_losses, config_of, rank_main
from tests.test_training import STEPS_PER_EPOCH, cut_back, final_weights, losses, train, train_args

WITHOUT_BATCHNORM = ("--engine.batchnorm", "frozen")


def assert_same_weights(one: tuple[Path, str], other: tuple[Path, str]) -> None:
    mine, theirs = final_weights(*one), final_weights(*other)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if mine[name].tobytes() != theirs[name].tobytes()] == []


def with_change(storage: Path, name: str, step: int, parts: int) -> None:
    """Give a run that has not begun a change to so many micro-batches at a step."""
    MicroBatches(f"{storage}/{name}", 1).write(step, parts, "a test")


def test_a_step_has_as_many_micro_batches_as_the_changes_up_to_it_say(tmp_path):
    run = str(tmp_path)
    assert read_changes(run) == []
    micro_batches = MicroBatches(run, 1)
    for step, parts in ((7, 4), (3, 2), (7, 4)):
        micro_batches.write(step, parts, "why")
        micro_batches.take(step, parts)
    (tmp_path / "micro_batches" / "notes.txt").write_text("somebody's")
    assert read_changes(run) == [(3, 2), (7, 4)]
    again = MicroBatches(run, 1)
    assert [again.at(step) for step in range(1, 9)] == [micro_batches.at(step) for step in range(1, 9)]
    assert [again.at(step) for step in range(1, 9)] == [1, 1, 2, 2, 2, 2, 4, 4]
    assert [plan_parts(3, read_changes(run), step) for step in (1, 3, 7)] == [3, 3, 4]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_no_micro_batch_is_without_rows_at_zero_2(zero_stage):
    """Of 8 rows three ranks have 3, 3 and 2: a third micro-batch of the last has none."""
    config = build_config({"train": {"global_batch": 8}, "engine": {"zero_stage": zero_stage}})
    check_parts(config, 3, 2)
    if zero_stage < 2:
        check_parts(config, 3, 3)
        return
    with pytest.raises(
        InputError, match=r"accumulation is 3, but a rank has 2 rows .*zero_stage 2 .*; use fewer parts"
    ):
        check_parts(config, 3, 3)


def test_what_says_that_memory_ran_out_is_known():
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50)
    assert is_out_of_memory(real.value)
    memalign = RuntimeError("posix_memalign failed:Cannot allocate memory (12)")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError("std::bad_alloc"), memalign):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shape mismatch"), RuntimeError("CUDA error: an illegal memory access"), ValueError()):
        assert not is_out_of_memory(error)


# ----------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.whole
@pytest.mark.parametrize(
    ("where", "more"),
    [("forward", ()), ("backward", ("--loss.balancing", "famo", "--train.ema", "0.5"))],
)
def test_a_step_that_runs_out_is_taken_again_as_if_the_run_had_begun_so(where, more, shards, tmp_path):
    """Bit for bit: BatchNorm's statistics, dropout and gradients of the failed passes leave nothing behind."""
    with starving(2, where=where) as failed:
        said = train(shards, tmp_path, "starved", *more).stdout
    assert failed == [8, 4]
    assert "out of memory at step 1: micro-batches of 4 instead of 8 from here on; losses stay" in said
    assert "out of memory at step 1: micro-batches of 2 instead of 4 from here on; losses stay" in said
    assert "note: BatchNorm takes its statistics of 2 row(s)" in said
    train(shards, tmp_path, "told", *more, "--train.accumulation", "4")
    assert losses(tmp_path, "starved") == losses(tmp_path, "told")
    assert_same_weights((tmp_path, "starved"), (tmp_path, "told"))


@pytest.mark.whole
def test_a_run_that_changes_in_its_midst_goes_on_from_there_and_a_killed_one_does_the_same(shards, tmp_path):
    plain = train(shards, tmp_path, "plain", "--checkpoint.keep-last", "2").stdout
    assert "out of memory" not in plain
    begin, parts = STEPS_PER_EPOCH + 1, ("--train.accumulation", "2")
    with starving(4, from_step=begin, where="backward") as failed:
        train(shards, tmp_path, "starved", "--checkpoint.keep-last", "2")
    assert failed == [8]
    assert losses(tmp_path, "starved")[:STEPS_PER_EPOCH] == losses(tmp_path, "plain")[:STEPS_PER_EPOCH]
    first = committed(f"{tmp_path}/plain")[0][0].uri
    train(shards, tmp_path, "later", "--run.start", first, "--run.start-with", "everything", *parts)
    assert losses(tmp_path, "starved")[STEPS_PER_EPOCH:] == losses(tmp_path, "later")
    assert_same_weights((tmp_path, "starved"), (tmp_path, "later"))

    # Killed after the change, before a checkpoint that has it; it would fit now, and what was done is done again.
    shutil.copytree(tmp_path / "starved", tmp_path / "killed" / "starved")
    cut_back(tmp_path / "killed", "starved", STEPS_PER_EPOCH)
    assert "continuing from" in train(shards, tmp_path / "killed", "starved").stdout
    assert losses(tmp_path / "killed", "starved") == losses(tmp_path, "starved")
    assert_same_weights((tmp_path / "killed", "starved"), (tmp_path, "starved"))


@pytest.mark.whole
def test_without_batchnorm_losses_are_those_of_a_run_that_fits_and_what_cannot_fit_is_said(shards, tmp_path):
    train(shards, tmp_path, "plain", *WITHOUT_BATCHNORM)
    with starving(4):
        said = train(shards, tmp_path, "starved", *WITHOUT_BATCHNORM).stdout
    assert "micro-batches of 4 instead of 8 from here on\n" in said  # nothing of BatchNorm
    assert_close_losses(losses(tmp_path, "starved"), losses(tmp_path, "plain"))
    with starving(0) as failed:
        done = run_here(*train_args(shards, tmp_path, "hopeless", *WITHOUT_BATCHNORM))
    assert failed == [8, 4, 2, 1]
    assert_one_message(done, "out of memory at step 1, with a micro-batch of one row: take a smaller model")


def limited_rank_main(rank: int, mebibytes: int, *args) -> None:
    torch.backends.mkldnn.enabled = False  # without memory, oneDNN crashes or cannot create a primitive
    with limited(mebibytes) if mebibytes else contextlib.nullcontext():
        rank_main(rank, *args)


@pytest.mark.whole
def test_a_process_that_gets_no_more_memory_trains_on_in_smaller_micro_batches(shards, tmp_path):
    """The allocator itself says so. A step of 40 rows takes some 400 MiB in one pass or two, 130 in 4, 70 in 8."""
    more = {"data": {"image_size": 160}, "train": {"global_batch": 40, "epochs": 1}}
    for name, mebibytes in (("limited", 220), ("plain", 0)):
        jobs = [(config_of(shards, tmp_path, name, FROZEN, more), None)]
        start_ranks(limited_rank_main, (mebibytes, 1, str(tmp_path / f"store-{name}"), jobs), 1)
    changes = read_changes(f"{tmp_path}/limited")
    assert [step for step, _ in changes] == [1] * len(changes)
    assert [parts for _, parts in changes] in ([2, 4], [2, 4, 8])
    assert read_changes(f"{tmp_path}/plain") == []
    assert_close_losses(losses(tmp_path, "limited"), losses(tmp_path, "plain"))


@pytest.mark.whole
def test_an_optimizer_that_runs_out_ends_the_run_which_continues_from_its_last_checkpoint(shards, tmp_path):
    from deepspeed import DeepSpeedEngine

    update, saves = DeepSpeedEngine._take_model_step, ("--checkpoint.every-steps", "1")

    def starved_update(engine, *args, **how):
        if engine.global_steps == 1:
            with torch.no_grad():
                next(engine.module.parameters()).zero_()  # half of the update
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return update(engine, *args, **how)

    with mock.patch.object(DeepSpeedEngine, "_take_model_step", starved_update):
        done = run_here(*train_args(shards, tmp_path, "starved", *saves))
    assert_one_message(done, "out of memory while the optimizer updated the weights in step 2; none of these is stored")
    assert not read_changes(f"{tmp_path}/starved")
    assert [checkpoint.step for checkpoint in committed(f"{tmp_path}/starved")[0]] == [1]
    train(shards, tmp_path, "starved", *saves)
    train(shards, tmp_path, "plain", *saves)
    assert_same_weights((tmp_path, "starved"), (tmp_path, "plain"))


# --------------------------------------------------------------------------------------------- without gradients


class SmallMemory(torch.nn.Module):
    """Adds up what is valid of every sample, of `most` at a time."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.passed = most, []

    def forward(self, inputs, valid):
        self.passed.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return (inputs * valid).sum(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4), most=st.integers(1, 17))
def test_what_runs_out_without_gradients_is_done_again_in_smaller_batches_in_the_same_order(sizes, most):
    rows = torch.arange(1, sum(sizes) + 1).split(sizes)
    batches = [
        Batch(
            own[:, None].repeat(1, 2), torch.tensor([True, False]).repeat(len(own), 1), no_labels(len(own), 2), own, own
        )
        for own in rows
    ]
    model = SmallMemory(most)
    said = io.StringIO()
    # To collect garbage takes half a second in a process that has run many tests.
    with contextlib.redirect_stdout(said), mock.patch.object(evaluate, "free_memory"):
        found = list(forward_all(model, batches, prepare=lambda batch, draws: batch.inputs, device=torch.device("cpu")))
    assert torch.cat([batch.samples for batch, _ in found]).tolist() == list(range(1, sum(sizes) + 1))
    assert torch.cat([outputs for _, outputs in found]).tolist() == list(range(1, sum(sizes) + 1))
    failed = [size for size in model.passed if size > most]
    assert failed == sorted(set(failed), reverse=True)  # what did not fit once is not tried again
    assert said.getvalue().count("note: out of memory: batches of ") == len(failed)
    if max(sizes) <= most:
        assert [batch for batch, _ in found] == batches  # as they came
    model.passed.clear()
    list(forward_all(model, batches, prepare=lambda batch, draws: batch.inputs, device=torch.device("cpu")))
    assert max(model.passed) <= most  # nor in the next evaluation


def test_a_sample_that_does_not_fit_and_what_is_no_lack_of_memory_end_it(capsys):
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool), no_labels(3, 2), torch.ones(3), torch.ones(3))
    how = {"prepare": lambda batch, draws: batch.inputs, "device": torch.device("cpu")}
    with pytest.raises(InputError, match="out of memory with a batch of one sample: take a smaller model"):
        list(forward_all(SmallMemory(0), [batch], **how))
    assert capsys.readouterr().out.splitlines() == [
        "note: out of memory: batches of 2 sample(s) instead of 3 from here on",
        "note: out of memory: batches of 1 sample(s) instead of 2 from here on",
    ]
    with pytest.raises(RuntimeError, match="size of tensor"):
        list(forward_all(SmallMemory(9), [batch._replace(inputs=torch.ones(3, 5))], **how))


# ------------------------------------------------------------------------------------------------ the fewest that fit


@pytest.mark.whole
def test_the_fewest_micro_batches_that_fit_are_found_without_a_trace_and_kept(shards, tmp_path):
    train(shards, tmp_path, "one")
    said = train(shards, tmp_path, "found-1", "--train.accumulation", "auto").stdout
    assert "memory  micro-batches of 8, 1 a step: the fewest that fit (train.accumulation auto)" in said
    assert losses(tmp_path, "found-1") == losses(tmp_path, "one")
    assert_same_weights((tmp_path, "found-1"), (tmp_path, "one"))

    train(shards, tmp_path, "four", "--train.accumulation", "4")
    with starving(3, where="backward") as failed:
        said = train(shards, tmp_path, "found-4", "--train.accumulation", "auto", "--checkpoint.keep-last", "2").stdout
    assert failed == [8, 4]
    assert "memory  micro-batches of 2, 4 a step" in said
    assert_same_weights((tmp_path, "found-4"), (tmp_path, "four"))
    cut_back(tmp_path, "found-4", STEPS_PER_EPOCH)
    again = train(shards, tmp_path, "found-4", "--train.accumulation", "auto").stdout  # with memory enough now
    assert "memory  " not in again
    assert_same_weights((tmp_path, "found-4"), (tmp_path, "four"))


# -------------------------------------------------------------------------------------------------------- several ranks


def starved_rank_main(rank: int, starved: dict[str, Any], *args) -> None:
    """Rank 1 has less memory than the others."""
    with starving(**starved if rank == 1 else {"most_rows": 99}):
        rank_main(rank, *args)


@pytest.fixture(scope="module")
def on_two_ranks(shards, tmp_path_factory) -> Path:
    """Runs whose rank 1 runs out at step 3, started again as torchrun and Ray do; and ones that are told to change."""
    storage = tmp_path_factory.mktemp("two")

    def start(most_rows: int, name: str, *layers: dict[str, Any]) -> None:
        starved = {"most_rows": most_rows, "where": "backward", "from_step": 3}
        jobs = [(config_of(shards, storage, name, {"checkpoint": {"every_steps": 1}}, *layers), None)]
        start_ranks(starved_rank_main, (starved, 2, str(storage / f"store-{len(list(storage.iterdir()))}"), jobs), 2)

    for name, layers in {"local": (), "zero": (FROZEN | {"engine": FROZEN["engine"] | {"zero_stage": 2}},)}.items():
        with pytest.raises(Exception, match=r"out of memory|Connection|Broken|peer"):  # of whichever is seen first
            start(2, name, *layers)
        start(2, name, *layers)
        with_change(storage, f"{name}-told", 3, 2)
        start(99, f"{name}-told", *layers)
    start(99, "zero-plain", FROZEN)
    return storage


@pytest.mark.whole
@pytest.mark.parametrize("name", ["local", "zero"])
def test_where_one_of_two_ranks_runs_out_both_change_at_its_step(on_two_ranks, name):
    assert read_changes(f"{on_two_ranks}/{name}") == [(3, 2)]
    (why,) = (on_two_ranks / name / "micro_batches").iterdir()
    assert why.read_text().startswith("out of memory at step 3: micro-batches of 2 instead of 4 from here on")
    assert why.read_text().endswith("; rank 1\n")
    assert losses(on_two_ranks, name) == losses(on_two_ranks, f"{name}-told")
    assert_same_weights((on_two_ranks, name), (on_two_ranks, f"{name}-told"))


@pytest.mark.whole
def test_losses_of_two_ranks_stay_those_of_the_whole_batch(on_two_ranks):
    assert_close_losses(losses(on_two_ranks, "zero"), losses(on_two_ranks, "zero-plain"))


@pytest.mark.whole
def test_two_ranks_take_what_the_poorer_needs(shards, tmp_path):
    jobs = [(config_of(shards, tmp_path, "run", {"train": {"accumulation": "auto", "epochs": 1}}), None)]
    start_ranks(starved_rank_main, ({"most_rows": 1}, 2, str(tmp_path / "store"), jobs), 2)
    assert read_changes(f"{tmp_path}/run") == [(1, 4)]
    assert len(losses(tmp_path, "run")) == STEPS_PER_EPOCH
