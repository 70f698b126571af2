"""Whole runs of the settings beside the defaults: sampling per task, parts of an epoch, balancers; on several ranks.

The ranks of a test are processes that do a list of jobs: most of a run's time here is starting them.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import build_preparation, make_draws
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import train_batches
from mtl_dist.errors import InputError
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.presets import load_preset
from mtl_dist.runs.lives import read_lives
from mtl_dist.shards.__main__ import create
from mtl_dist.tasks import TASKS, Batch, Labels, Outputs
from mtl_dist.training.audit import read_audit
from mtl_dist.training.checks import check_ranks_agree
from mtl_dist.training.draws import draw_passes, seed_dropout
from mtl_dist.training.loop import fit
from mtl_dist.training.micro_batches import split_batch
from mtl_dist.training.plan import open_data, plan_run
from mtl_dist.training.rates import learning_rate
from mtl_dist.training.step import train_step
from mtl_dist.training.tracking import read_records
from tests.conftest import write_dataset
from tests.ranks import forkserver, start_ranks
from tests.test_training import cut_back, final_weights, losses

pytestmark = pytest.mark.whole

PER_TASK = {"data": {"sampling": "per_task"}}
EVERY_STEP = {"checkpoint": {"every_steps": 1, "keep_last": 99}}
# Adam makes much of the last bits of small gradients.
FROZEN = {"engine": {"batchnorm": "frozen"}, "optim": {"name": "sgd", "lr": 0.02}}


def config_of(shards: Path, storage: Path, name: str, *layers: dict[str, Any]) -> Config:
    tiny = {
        "run": {"name": name, "storage": str(storage), "audit_dir": str(storage / "audit")},
        "data": {
            "train": f"{shards}/cropped/train",
            "val": f"{shards}/cropped/val",
            "image_size": 80,
            "workers": 0,
        },
        "train": {"global_batch": 8, "epochs": 2},
        "optim": {"warmup_steps": 2},
        "engine": {"threads": 1, "device": "cpu"},
    }
    return build_config(load_preset("small"), tiny, *layers)


class Context:
    """A rank of a test: nobody watches it, and nobody stops it."""

    has_gpu, num_cpus, command_line = False, 1, "a test"

    def __init__(self, rank: int, num_ranks: int, launcher: str):
        self.rank, self.num_ranks, self.launcher = rank, num_ranks, launcher

    def publish(self, metrics) -> None: ...

    def observe(self, **values) -> None: ...

    def should_stop(self) -> bool:
        return False

    def should_save(self) -> bool:
        return False


def rank_main(rank: int, num_ranks: int, init_file: str, jobs: list) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))  # DeepSpeed asks for them
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=num_ranks)
    for number, (config, cut_at) in enumerate(jobs):
        if cut_at is not None and rank == 0:  # a copy of the run, as a kill after this step would have left it
            storage, name = Path(config.run.storage), config.run.name
            shutil.copytree(storage.parent / name, storage / name)
            cut_back(storage, name, cut_at)
        dist.barrier()
        fit(config, Context(rank, num_ranks, launcher=f"job-{number}"))
    dist.destroy_process_group()


def run_ranks(num_ranks: int, jobs: list, scratch: Path) -> None:
    """Run (configuration, None) one after the other; (configuration, step) continues a copy, cut back to that step."""
    store = scratch / f"store-{secrets.token_hex(4)}"
    start_ranks(rank_main, (num_ranks, str(store), jobs), num_ranks)


def assert_close_losses(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6)


def assert_same_run(one: tuple[Path, str], other: tuple[Path, str]) -> None:
    mine, theirs = final_weights(*one), final_weights(*other)
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert weights_of(*one) == weights_of(*other)
    assert losses(*one) == losses(*other)


def weights_of(storage: Path, name: str) -> list[dict[str, float]]:
    return [r["weights"] for r in read_records(f"{storage}/{name}") if r["kind"] == "step" and "weights" in r]


def disagreeing_rank(rank: int, init_file: str, runs: list, messages) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    for config, *of_ranks in runs:
        mine = build_config(config.model_dump(mode="json"), of_ranks[rank])
        try:
            check_ranks_agree(mine, open_data(mine))
            messages.put((rank, "agreed"))
        except InputError as error:
            messages.put((rank, str(error)))
    dist.destroy_process_group()


def test_ranks_of_other_settings_or_other_data_are_refused_on_every_rank(shards, tmp_path):
    other = tmp_path / "other"  # the same address could hold it on another node
    create(str(write_dataset(tmp_path / "images", seed=1)), str(other), frames_per_shard=7, jobs=1)
    config, moved = config_of(shards, tmp_path, "run"), tmp_path / "moved"
    shutil.copytree(shards, moved)
    runs = [
        (config, {"optim": {"lr": 0.1}}, {"optim": {"lr": 0.2}}),
        (config, {}, {"data": {"train": f"{other}/cropped/train"}}),
        (config, {}, {"data": {"train": f"{moved}/cropped/train", "workers": 2}, "engine": {"threads": 1}}),
        (config, {"model": {"weights": "/one/faces.pth"}}, {"model": {"weights": "/two/faces.pth"}}),
        (config, {"model": {"weights": "/one/faces.pth"}}, {"model": {"weights": "/one/others.pth"}}),
    ]
    messages = forkserver.SimpleQueue()
    start_ranks(disagreeing_rank, (str(tmp_path / "store"), runs, messages), 2)
    said = [messages.get() for _ in range(2 * len(runs))]
    for rank in (0, 1):
        lr, data, agreed, moved_weights, other_weights = [text for of, text in said if of == rank]
        assert "rank 1 has optim.lr 0.2, and rank 0 has 0.1" in lr
        assert re.search("rank 1 has training set '[0-9a-f]{64}', and rank 0 has '", data)
        assert agreed == moved_weights == "agreed"
        assert "rank 1 has model.weights 'others.pth', and rank 0 has 'faces.pth'" in other_weights


BALANCERS = {
    "famo": {"loss": {"balancing": "famo"}},
    "dwa": {"loss": {"balancing": "dwa"}, "train": {"epochs": 4, "eval_every": 4}},
}
RANKS = {"famo": 2, "dwa": 3}  # compared with one
UPGRAD = {"loss": {"balancing": "upgrad", "gradients_every": 3}}


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """All runs of this file on 1, 2 and 3 ranks; returns their storage."""
    storage = tmp_path_factory.mktemp("recipes")

    def job(name: str, *layers: dict[str, Any], cut_at: int | None = None):
        where = storage if cut_at is None else storage / "killed"
        return config_of(shards, where, name, *layers), cut_at

    for num_ranks in (1, 2, 3):
        here = [name for name in BALANCERS if num_ranks in (1, RANKS[name])]
        jobs = [job(f"{name}-{num_ranks}", PER_TASK, FROZEN, BALANCERS[name]) for name in here]
        if num_ranks == 1:
            jobs += [job("upgrad-1", FROZEN, UPGRAD)]
            jobs += [job("upgrad-parts", FROZEN, UPGRAD, {"train": {"accumulation": 2}})]
            jobs += [job("parts", PER_TASK, FROZEN, BALANCERS["famo"], {"train": {"accumulation": 2}})]
        if num_ranks == 2:  # BatchNorm is each rank's own here, but of the first
            upgrad = FROZEN, UPGRAD, EVERY_STEP, {"engine": FROZEN["engine"] | {"zero_stage": 2}}
            jobs += [job("upgrad-2", *upgrad), job("upgrad-2", *upgrad, cut_at=1)]
            jobs += [job("whole", PER_TASK, BALANCERS["famo"], EVERY_STEP)]
            jobs += [job("whole", PER_TASK, BALANCERS["famo"], EVERY_STEP, cut_at=1)]
        if num_ranks == 3:
            eighth = {"data": {"epoch_fraction": 0.5}, **BALANCERS["dwa"]}
            jobs += [job("few-saves", eighth), job("many-saves", eighth, EVERY_STEP)]
            jobs += [job("many-saves", eighth, EVERY_STEP, cut_at=5)]
        run_ranks(num_ranks, jobs, storage)
    return storage


@pytest.mark.parametrize(("name", "num_ranks"), RANKS.items())
def test_sampling_per_task_and_balancers_are_the_same_on_every_number_of_ranks(runs, name, num_ranks):
    assert_close_losses(losses(runs, f"{name}-{num_ranks}"), losses(runs, f"{name}-1"))
    found, expected = weights_of(runs, f"{name}-{num_ranks}"), weights_of(runs, f"{name}-1")
    assert_close_losses(found, expected)
    assert found[0].keys() == set(TASKS)
    assert found[-1] != found[0], "weights move"
    assert sum(found[-1].values()) == pytest.approx({"famo": 1, "dwa": 3}[name])


def gradients_of(storage: Path, name: str) -> dict[int, dict[str, dict[str, float]]]:
    return {r["step"]: r["gradients"] for r in read_records(f"{storage}/{name}") if "gradients" in r}


@pytest.mark.parametrize("other", ["upgrad-2", "upgrad-parts"])
def test_weights_by_gradients_are_the_same_on_two_ranks_with_zero_and_in_micro_batches(runs, other):
    assert_close_losses(losses(runs, other), losses(runs, "upgrad-1"))
    assert_close_losses(weights_of(runs, other), weights_of(runs, "upgrad-1"))
    found, expected = gradients_of(runs, other), gradients_of(runs, "upgrad-1")
    assert list(found) == list(expected) == [1, 4, 7, 10]
    for step, of_kind in expected.items():
        assert found[step]["norm"] == pytest.approx(of_kind["norm"], rel=1e-3)
        assert found[step]["cosine"] == pytest.approx(of_kind["cosine"], abs=1e-3)


def test_a_run_with_weights_by_gradients_that_was_killed_ends_bit_identical(runs):
    assert_same_run((runs / "killed", "upgrad-2"), (runs, "upgrad-2"))


def test_micro_batches_of_task_batches_have_the_losses_of_the_whole(runs):
    assert_close_losses(losses(runs, "parts"), losses(runs, "famo-1"))


def test_a_row_in_the_batches_of_two_tasks_is_augmented_twice():
    rows, prepare = torch.tensor([[3], [4], [3], [5], [3], [4]]), build_preparation(Config())
    draws = [draw_passes(prepare, rows, seed=1, epoch=epoch, passes=3) for epoch in range(2)]
    of_row_3 = torch.cat([draw[::2] for draw in draws]).flatten(1)
    assert len(of_row_3.unique(dim=0)) == 6
    alone = torch.cat([draw_passes(prepare, rows[[0, 2, 4]], seed=1, epoch=epoch, passes=3) for epoch in range(2)])
    assert torch.equal(of_row_3, alone.flatten(1))  # nobody beside it matters
    assert torch.equal(draw_passes(prepare, rows, seed=1, epoch=7, passes=1), make_draws(rows, seed=1, epoch=7))


def test_a_run_per_task_killed_in_mid_epoch_ends_bit_identical(runs):
    assert_same_run((runs / "killed", "whole"), (runs, "whole"))


def test_neither_the_number_of_saves_nor_a_kill_between_evaluations_shows_in_the_last_bit(runs):
    """3 ranks, with BatchNorm statistics of their own: a mean over three is not exact, and must not enter training."""
    assert_same_run((runs, "many-saves"), (runs, "few-saves"))
    assert_same_run((runs / "killed", "many-saves"), (runs, "few-saves"))
    assert len(read_lives(f"{runs}/killed/many-saves")) == 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_audit_of_a_run_per_task_counts_each_tasks_batches(runs, shards, num_ranks):
    config = config_of(shards, runs, f"famo-{num_ranks}", PER_TASK)
    steps = open_data(config).steps_per_epoch
    labels = read_index(config.data.train[0]).labels
    assert steps == min(labels.va, labels.expr, max(labels.au)) // 8
    report = read_audit(runs / "audit", config.run.name, global_batch=8, num_steps=2 * steps)
    assert (report.samples_lost, report.samples_twice, report.steps_repeated) == (0, 0, 0)
    assert [step for _, step in report.finished_at] == list(range(1, 2 * steps + 1))
    file = next((runs / "audit" / config.run.name).iterdir())
    assert set(json.loads(file.read_text().splitlines()[0])["samples"]) == set(TASKS)


# ------------------------------------------------------------------------------------------------------- its parts


def test_task_batches_carry_the_labels_of_their_task_alone_and_rows_that_have_some(shards, tmp_path):
    from mtl_dist.data.cache import Cache
    from mtl_dist.data.reader import ShardReader
    from mtl_dist.data.samples import ImageSamples
    from mtl_dist.training.plan import build_order

    config = config_of(shards, tmp_path, "run", PER_TASK)
    data = open_data(config)
    reader = ShardReader(config.data.train[0], data.train.indexes[0], Cache())
    samples = ImageSamples(reader, 80)
    order = build_order(config, data, samples)
    for rank in (0, 1):
        for batch in train_batches(
            samples, order, epoch=0, start_step=0, rank=rank, num_ranks=2, workers=0, prefetch=1
        ):
            assert len(batch.rows) == 3 * 4
            for place, own in enumerate(TASKS):
                for task in TASKS:
                    mask = getattr(batch.labels, f"{task}_mask")[4 * place : 4 * place + 4].flatten(1)
                    assert mask.any(1).tolist() == [task == own] * 4


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([PER_TASK, {"train": {"global_batch": 20}}], "rows with labels of expr"),
        ([{"data": {"epoch_fraction": 0.1}}], r"40 rows, of which an epoch reads 0.1 \(data.epoch_fraction\)"),
    ],
)
def test_a_batch_larger_than_what_an_epoch_reads_is_refused(shards, tmp_path, layers, words):
    with pytest.raises(InputError, match=words):
        plan_run(config_of(shards, tmp_path, "run", *layers))


def test_a_crop_larger_than_the_resized_image_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"augment.resize is 79, less than the model's input of 80"):
        config_of(shards, tmp_path, "run", {"augment": {"resize": 79}})


def test_the_cosine_is_torchs_also_beyond_its_end():
    config = build_config({"optim": {"lr": 0.1, "warmup_steps": 0, "final_lr": 0.0, "cosine_steps": 40}})
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(130):
        # Theirs adds up a recurrence, whose error grows around the zeros.
        assert learning_rate(config, step, 130) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimizer.step()
        schedule.step()
    whole = build_config({"optim": {"lr": 0.1, "warmup_steps": 10, "final_lr": 0.01}})
    assert learning_rate(whole, 9, 100) == learning_rate(whole, 10, 100) == 0.1
    assert math.isclose(learning_rate(whole, 100, 100), 0.001)


class DropModel(nn.Module):
    """Keeps what dropout left of a tensor of ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.kept: list[torch.Tensor] = []

    def forward(self, inputs, valid):
        kept = nn.functional.dropout(torch.ones(len(inputs), 1, 22), 0.5, self.training)
        self.kept.append(kept)
        return Outputs(*(self.scale * kept).split([2, 8, 12], -1))


class PlainEngine:
    """What DeepSpeed's engine is to a step, on one rank."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **options):
        return self.module(*args, **options)

    def backward(self, loss):
        loss.backward()

    def step(self): ...


@pytest.mark.parametrize("balancing", ["fixed", "famo"])
def test_dropout_differs_between_ranks_steps_and_micro_batches_and_repeats_for_each(balancing, shards, tmp_path):
    config = config_of(shards, tmp_path, "run", {"train": {"accumulation": 2}, "loss": {"balancing": balancing}})
    counts = read_index(config.data.train[0]).labels
    labels = Labels(
        torch.zeros(4, 1, 2), torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1, 12),
        *(torch.ones(shape, dtype=torch.bool) for shape in ((4, 1), (4, 1), (4, 1, 12))),
    )  # fmt: skip
    inputs, numbers = torch.zeros(4, 1, 3, 80, 80, dtype=torch.uint8), torch.arange(4)
    batch = Batch(inputs, torch.ones(4, 1, dtype=torch.bool), labels, numbers[:, None], numbers)

    def masks(step: int, rank: int) -> list[bytes]:
        module = ObjectiveModule(DropModel(), build_objective(config, counts), balancing=config.loss.balancing)
        train_step(
            PlainEngine(module),
            batch,
            config,
            prepare=build_preparation(config),
            epoch=0,
            step=step,
            rank=rank,
        )
        return [kept.numpy().tobytes() for kept in module.model.kept]

    found = {where: masks(*where) for where in ((0, 0), (0, 1), (1, 0), (1, 1))}
    for forwards in found.values():  # the sums before the step, the step, and where asked for the losses after it
        assert len(forwards) == (6 if balancing == "famo" else 4)
        assert all(forwards[place] == forwards[place % 2] for place in range(len(forwards)))
    drawn = {mask for forwards in found.values() for mask in forwards[:2]}
    assert len(drawn) == 8, "each of two steps, two ranks and two micro-batches draws its own"
    assert masks(1, 1) == found[1, 1]
    seed_dropout(1, 0, 0, 0)  # another run's seed
    other = nn.functional.dropout(torch.ones(2, 1, 22), 0.5)
    assert other.numpy().tobytes() not in drawn


@pytest.mark.parametrize(("rows", "parts", "passes"), [(24, 3, 3), (21, 2, 3), (10, 4, 1)])
def test_micro_batches_hold_every_row_once_and_each_task_in_its_part(rows, parts, passes):
    numbers = torch.arange(rows)
    batch = Batch(numbers, numbers, Labels(*[numbers] * 6), numbers, numbers)
    found = split_batch(batch, parts=parts, passes=passes)
    assert len(found) == parts
    assert sorted(torch.cat([part.inputs for part in found]).tolist()) == list(range(rows))
    for part in found:
        rest = (part.valid, *part.labels, part.rows, part.samples)
        assert all(torch.equal(column, part.inputs) for column in rest)
        task = (part.inputs * passes // rows).reshape(passes, -1)
        assert (task == torch.arange(passes)[:, None]).all()


def test_the_order_of_a_whole_epoch_is_that_without_the_setting(shards, tmp_path):
    """epoch_fraction 1 and masked sampling are the defaults."""
    from mtl_dist.data.cache import Cache
    from mtl_dist.data.order import Order
    from mtl_dist.data.samples import open_samples
    from mtl_dist.training.plan import build_order

    config = config_of(shards, tmp_path, "run")
    data = open_data(config)
    samples = open_samples(data.train, config, Cache())
    order = build_order(config, data, samples)
    mine = order.plan(epoch=2, rank=0, num_ranks=1).samples_of(0, data.steps_per_epoch)
    plain = Order(data.train.indexes[0].shard_rows, 8, 8, 4, 0).plan(epoch=2, rank=0, num_ranks=1)
    np.testing.assert_array_equal(mine, plain.samples_of(0, data.steps_per_epoch))
