"""The order of several sets with shares: the same for every number of ranks, and no row twice in a pass."""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import build_config
from mtl_dist.data.cache import Cache
from mtl_dist.data.mixed import MixedOrder, build_mixed_order, pass_rows, shares_of, split_batch
from mtl_dist.data.order import EpochPlan
from mtl_dist.data.samples import open_samples
from mtl_dist.errors import InputError
from mtl_dist.shards.__main__ import create
from mtl_dist.training.plan import build_order, open_data, plan_run
from tests.conftest import write_dataset
from tests.test_recipes import FROZEN, config_of, run_ranks
from tests.test_training import losses

fast = settings(max_examples=30, deadline=None, derandomize=True)
num_ranks_st = st.integers(1, 17)


class World(NamedTuple):
    order: MixedOrder
    sizes: list[int]


@st.composite
def worlds(draw) -> World:
    """Two to four sets of some shards, with shares that stay or change over some epochs."""
    of_sets = draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=2, max_size=4))
    sizes = [sum(shards) for shards in of_sets]
    batch = draw(st.integers(len(of_sets), max(len(of_sets), min(map(pass_rows, sizes)))))
    shares = draw(st.lists(st.tuples(*[st.floats(0.1, 10)] * len(of_sets)), min_size=1, max_size=4))
    while any(max(c) > pass_rows(n) for c, n in zip(zip(*(split_batch(batch, s) for s in shares)), sizes)):
        batch -= 1
    how = {
        "num_steps": draw(st.integers(1, 9)),
        "block_shards": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
    }
    return World(build_mixed_order([np.array(shards) for shards in of_sets], shares, global_batch=batch, **how), sizes)


def steps_of(order: MixedOrder, epoch: int, num_ranks: int) -> list[list[list[int]]]:
    """[step][rank] -> samples."""
    plans = [order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    of_ranks = [[samples.tolist() for samples in plan.samples_of(0, order.num_steps)] for plan in plans]
    return [list(step) for step in zip(*of_ranks)]


def set_of(sizes: list[int], sample: int) -> int:
    return int(np.searchsorted(np.cumsum(sizes), sample, side="right"))


@fast
@given(worlds(), st.integers(0, 6), num_ranks_st)
def test_a_step_has_the_same_rows_on_any_number_of_ranks_as_many_of_each_set_as_its_share_says(world, epoch, num_ranks):
    order, sizes = world
    alone = steps_of(order, epoch, 1)
    for step, ((whole,), of_ranks) in enumerate(zip(alone, steps_of(order, epoch, num_ranks))):
        assert sorted(sample for samples in of_ranks for sample in samples) == sorted(whole), step
        found = Counter(set_of(sizes, sample) for sample in whole)
        assert tuple(found[number] for number in range(len(sizes))) == order.counts_at(epoch)
        least = sum(max(count // num_ranks - 1, 0) for count in order.counts_at(epoch))  # what `min_rows` says
        assert min(len(samples) for samples in of_ranks) >= least


@fast
@given(worlds())
def test_no_row_comes_twice_in_a_pass_over_its_set_and_few_are_left_out(world):
    order, sizes = world
    rows: list[list[int]] = [[] for _ in sizes]
    for epoch in range(6):
        for (samples,) in steps_of(order, epoch, 1):
            for sample in samples:
                rows[set_of(sizes, sample)].append(sample)
    for number, (taken, size) in enumerate(zip(rows, sizes)):
        length = pass_rows(size)
        assert size - length < min(64, size)
        assert len(taken) == order.before(6)[number]
        for begin in range(0, len(taken), length):
            assert len(set(taken[begin : begin + length])) == len(taken[begin : begin + length])
        assert order.passes(6)[number] == pytest.approx(len(taken) / length)


@fast
@given(worlds(), st.integers(0, 5), num_ranks_st, st.data())
def test_an_epoch_goes_on_at_any_step_on_any_rank(world, epoch, num_ranks, data):
    order, _ = world
    rank = data.draw(st.integers(0, num_ranks - 1))
    first = data.draw(st.integers(0, order.num_steps - 1))
    count = data.draw(st.integers(1, order.num_steps - first))
    whole = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks).samples_of(0, order.num_steps)
    part = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks).samples_of(first, count)
    assert [samples.tolist() for samples in part] == [samples.tolist() for samples in whole[first : first + count]]


@fast
@given(worlds(), st.integers(0, 5), num_ranks_st, st.data())
def test_the_shards_ahead_are_those_that_the_samples_are_in(world, epoch, num_ranks, data):
    order, _ = world
    plan = order.plan(epoch=epoch, rank=data.draw(st.integers(0, num_ranks - 1)), num_ranks=num_ranks)
    first = data.draw(st.integers(0, order.num_steps - 1))
    count = data.draw(st.integers(1, order.num_steps - first))
    bounds = np.cumsum(np.concatenate([of_set.shard_rows for of_set in order.orders]))
    read = {int(np.searchsorted(bounds, s, side="right")) for step in plan.samples_of(first, count) for s in step}
    ahead = plan.shards_ahead(first, count)
    assert len(ahead) == len(set(ahead))
    assert read <= set(ahead)


@fast
@given(worlds(), st.integers(0, 3))
def test_a_set_gives_what_its_own_order_has_pass_after_pass(world, epoch):
    """Written out: an endless row, of which every step takes the next."""
    order, _ = world
    start = 0
    for number, of_set in enumerate(order.orders):
        row: list[int] = []
        for which in range(order.before(epoch + 1)[number] // (of_set.num_steps * of_set.streams) + 1):
            plan = EpochPlan(of_set, epoch=which, rank=0, num_ranks=1)
            row += [start + sample for step in range(of_set.num_steps) for sample in plan.samples(step).tolist()]
        begin, count = order.before(epoch)[number], order.counts_at(epoch)[number]
        low, high = start, start + of_set.num_rows
        for step, (samples,) in enumerate(steps_of(order, epoch, 1)):
            expected = row[begin + step * count : begin + (step + 1) * count]
            assert [sample for sample in samples if low <= sample < high] == expected
        start = high


def test_shares_become_whole_rows_and_the_largest_remainders_are_rounded_up():
    assert split_batch(64, [0.7, 0.3]) == (45, 19)
    assert split_batch(10, [1, 1, 1]) == (4, 3, 3)
    assert split_batch(8, [3, 1]) == (6, 2)
    config = build_config({"data": {"mix": [1, 3], "mix_to": [1, 1]}, "train": {"epochs": 3}})
    np.testing.assert_allclose(shares_of(config), [(0.25, 0.75), (0.375, 0.625), (0.5, 0.5)])
    assert shares_of(build_config({"data": {"mix": [1, 3]}, "train": {"epochs": 3}})) == [(1, 3)]


# ------------------------------------------------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A second, smaller set; returns the directory of its shards."""
    path = tmp_path_factory.mktemp("other")
    create(str(write_dataset(path / "images", num_train=16, seed=1)), str(path / "shards"), frames_per_shard=5, jobs=1)
    return str(path / "shards")


def mixed(shards, other, storage, name, *layers):
    sets = {"train": [f"{shards}/cropped/train", f"{other}/cropped/train"], "mix": [0.75, 0.25], "mix_to": [0.5, 0.5]}
    return config_of(shards, storage, name, {"data": sets}, *layers)


@pytest.mark.whole
def test_a_mixed_run_has_one_outcome_on_1_2_and_3_ranks_and_when_killed(shards, other, tmp_path):
    frozen = (FROZEN, {"checkpoint": {"every_steps": 1, "keep_last": 99}})
    for num_ranks in (1, 2, 3):
        jobs = [(mixed(shards, other, tmp_path, f"run-{num_ranks}", *frozen), None)]
        if num_ranks == 2:
            jobs.append((mixed(shards, other, tmp_path / "killed", "run-2", *frozen), 3))
        run_ranks(num_ranks, jobs, tmp_path)
    config = mixed(shards, other, tmp_path, "run-1", *frozen)
    samples = open_samples(open_data(config).train, config, Cache())
    order = build_order(config, open_data(config), samples)
    expected = [sorted(step[0]) for epoch in range(config.train.epochs) for step in steps_of(order, epoch, 1)]
    for storage, name in (
        (tmp_path, "run-1"),
        (tmp_path, "run-2"),
        (tmp_path, "run-3"),
        (tmp_path / "killed", "run-2"),
    ):
        for mine, theirs in zip(losses(storage, name), losses(tmp_path, "run-1"), strict=True):
            assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6)
        begun = (
            3 if storage.name == "killed" else 0
        )  # what was read before is in the audit of the run that it continues
        assert audited(storage / "audit", name, len(expected))[begun:] == expected[begun:]


def audited(directory, name: str, num_steps: int) -> list[list[int]]:
    """Return the samples of every step, over all ranks."""
    files = sorted((directory / name).glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [
        sorted(sample for line in lines if line["step"] == step for sample in line["samples"]["all"])
        for step in range(1, num_steps + 1)
    ]


def test_the_plan_says_what_each_set_gives_and_how_often_it_is_read(shards, other, tmp_path):
    config = mixed(shards, other, tmp_path, "run")
    text = plan_run(config).text
    data = open_data(config)
    assert data.steps_per_epoch == 56 // 8
    assert "6, and 4 in the last epoch, of a step's 8 rows are of" in text
    assert f"rows are of {other}/cropped/train: read 2.6 times" in text  # 7 x 2 + 7 x 4 rows of 16


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"data": {"mix": [1.0]}}, r"mix_to has 2 share\(s\) and mix 1"),
        ({"data": {"mix": [1.0, 1.0, 1.0], "mix_to": []}}, r"data\.mix has 3 share\(s\) and data\.train 2 set\(s\)"),
        ({"data": {"mix": [0, 0]}}, "0 for every set"),
        ({"data": {"sampling": "per_task"}}, "what it has of each task; change one"),
        (
            {"data": {"mix": [0.2, 0.8], "mix_to": []}, "train": {"global_batch": 32}},
            "a row would come twice in a step",
        ),
        ({"data": {"mix": [1.0, 0.001], "mix_to": []}}, "its share is less than half a row"),
        ({"data": {"streams": 8}}, "with data.mix every set has its own; leave it out"),
    ],
)
def test_shares_that_cannot_be_had_are_refused(shards, other, tmp_path, layers, words):
    with pytest.raises(InputError, match=words):
        plan_run(mixed(shards, other, tmp_path, "run", layers))
