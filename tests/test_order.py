"""The order of training: sample-exact, the same for every number of ranks, and equal to a reference written out."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtl_dist.data.order import VERSIONS, EpochPlan, Order, eval_range
from mtl_dist.data.task_orders import TaskOrders, build_task_orders

fast = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def orders(draw) -> Order:
    streams = draw(st.integers(1, 17))
    share = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 23), min_size=1, max_size=18))
    batch = streams * share
    if sum(sizes) < batch:
        sizes.append(batch)
    return Order(
        shard_rows=np.array(sizes, np.int64),
        global_batch=batch,
        streams=streams,
        block_shards=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**40)),
        version=draw(st.sampled_from(VERSIONS)),
    )


epochs = st.integers(0, 1000)
num_ranks_st = st.integers(1, 17)


def plans(order: Order, epoch: int, num_ranks: int) -> list[EpochPlan]:
    return [EpochPlan(order, epoch=epoch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


def step_of_all(of_ranks: list[EpochPlan], step: int) -> list[int]:
    return [sample for plan in of_ranks for sample in plan.samples(step).tolist()]


def reference_epoch(order: Order, epoch: int) -> list[list[list[int]]]:
    """The whole epoch as lists: [step][stream] -> samples. Written from the description, slowly and without places."""

    def philox(*key):
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    first_of_shard, total = [], 0
    for rows in order.shard_rows.tolist():
        first_of_shard.append(total)
        total += rows
    # The line: every sample, and the number of its group of `block_shards` shards in the permuted row of shards.
    line = []
    for position, shard in enumerate(philox(order.seed, epoch, 1).permutation(len(first_of_shard)).tolist()):
        for row in range(int(order.shard_rows[shard])):
            line.append((position // order.block_shards, first_of_shard[shard] + row))

    def shuffled_blocks(part, begin, *key):
        found = []
        for group in sorted({group for group, _ in part}):
            block = [sample for g, sample in part if g == group]
            philox(order.seed, epoch, 2, *key, begin + len(found)).shuffle(block)
            found += block
        return found

    steps = total // order.global_batch
    share = order.global_batch // order.streams
    length = steps * share
    begins = [stream * length for stream in range(order.streams)]
    if order.version == 1:  # streams are cut first, and shuffled each for itself
        of_streams = [shuffled_blocks(line[b : b + length], b, s) for s, b in enumerate(begins)]
    else:
        circle = shuffled_blocks(line, 0)
        first = int(philox(order.seed, epoch, 3).integers(total))
        circle = circle[first:] + circle[:first]
        of_streams = [circle[b : b + length] for b in begins]
    return [[samples[step * share : (step + 1) * share] for samples in of_streams] for step in range(steps)]


@fast
@given(orders(), epochs, num_ranks_st)
def test_samples_are_those_of_the_reference(order, epoch, num_ranks):
    num_ranks = min(num_ranks, order.streams)
    expected = reference_epoch(order, epoch)
    assert order.num_steps == len(expected)
    for rank, plan in enumerate(plans(order, epoch, num_ranks)):
        for step, of_streams in enumerate(expected):
            mine = [sample for stream in range(rank, order.streams, num_ranks) for sample in of_streams[stream]]
            assert plan.samples(step).tolist() == mine


@fast
@given(orders(), epochs, num_ranks_st)
def test_a_step_has_the_same_samples_on_every_number_of_ranks(order, epoch, num_ranks):
    num_ranks = min(num_ranks, order.streams)  # whether or not it divides the streams
    alone, many = plans(order, epoch, 1), plans(order, epoch, num_ranks)
    for step in range(order.num_steps):
        samples = step_of_all(many, step)
        assert len(samples) == order.global_batch
        assert sorted(samples) == sorted(step_of_all(alone, step))


@fast
@given(orders(), epochs)
def test_an_epoch_has_no_sample_twice_and_leaves_out_less_than_a_batch(order, epoch):
    (plan,) = plans(order, epoch, 1)
    seen = [sample for step in range(order.num_steps) for sample in plan.samples(step).tolist()]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(order.num_rows))
    assert 0 <= order.num_rows - len(seen) < order.global_batch


@fast
@given(orders(), epochs, num_ranks_st)
def test_all_ranks_have_the_same_number_of_steps_and_a_batch_within_one_stream(order, epoch, num_ranks):
    num_ranks = min(num_ranks, order.streams)
    share = order.global_batch // order.streams
    of_ranks = plans(order, epoch, num_ranks)
    for step in (0, order.num_steps - 1):  # the last exists on every rank ...
        sizes = [len(plan.samples(step)) for plan in of_ranks]
        assert max(sizes) - min(sizes) in (0, share)
        assert min(sizes) >= share
    for plan in of_ranks:  # ... and none has one more
        with pytest.raises(AssertionError):
            plan.samples(order.num_steps)


@fast
@given(orders(), epochs, st.lists(num_ranks_st, min_size=2, max_size=5), st.data())
def test_a_run_stopped_anywhere_and_resumed_on_other_ranks_loses_and_repeats_nothing(order, epoch, worlds, data):
    undisturbed = Counter(
        sample for step in range(order.num_steps) for sample in step_of_all(plans(order, epoch, 1), step)
    )
    seen, step = Counter(), 0
    for number, num_ranks in enumerate(worlds):
        is_last = number == len(worlds) - 1
        stop = order.num_steps if is_last else data.draw(st.integers(step, order.num_steps))
        of_ranks = plans(order, epoch, min(num_ranks, order.streams))  # made anew: nothing but (epoch, step) survives
        for at in range(step, stop):
            seen.update(step_of_all(of_ranks, at))
        step = stop
    assert seen == undisturbed


@fast
@given(orders(), epochs, st.data())
def test_a_step_does_not_depend_on_what_was_asked_before(order, epoch, data):
    asked = data.draw(st.lists(st.integers(0, order.num_steps - 1), min_size=1, max_size=8))
    (plan,) = plans(order, epoch, 1)
    for step in asked:
        (fresh,) = plans(order, epoch, 1)
        assert plan.samples(step).tolist() == fresh.samples(step).tolist()


@fast
@given(orders(), epochs)
def test_the_same_seed_and_epoch_repeat(order, epoch):
    again = replace(order, shard_rows=order.shard_rows.copy())
    for step in range(order.num_steps):
        assert step_of_all(plans(order, epoch, 1), step) == step_of_all(plans(again, epoch, 1), step)


@fast
@given(orders(), epochs)
def test_epochs_and_seeds_differ(order, epoch):
    assume(order.num_rows > 15 and order.rows_per_stream > 7)  # smaller ones can be equal by chance
    other_seed = replace(order, seed=order.seed + 1)

    def line(order, epoch):
        return [sample for step in range(order.num_steps) for sample in step_of_all(plans(order, epoch, 1), step)]

    assert line(order, epoch) != line(order, epoch + 1)
    assert line(order, epoch) != line(other_seed, epoch)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """(steps, global_batch) samples."""
    return order.plan(epoch=epoch, rank=0, num_ranks=1).samples_of(0, order.num_steps)


@pytest.mark.parametrize(("sizes", "streams"), [([130], 6), ([13] * 10, 8), ([100, 30], 4), ([1, 60, 69], 1)])
def test_every_sample_is_as_likely_to_be_left_out_of_an_epoch_as_any_other(sizes, streams):
    """10 of 130 in each of 650 epochs: 50 times each, give or take 6.8."""
    order, left_out = Order(np.array(sizes), 24, streams, 2, seed=0), np.zeros(130)
    for epoch in range(650):
        left_out[np.setdiff1d(np.arange(130), epoch_of(order, epoch))] += 1
    assert left_out.sum() == 650 * (130 % 24)
    assert 25 < left_out.min() <= left_out.max() < 80


def test_all_pairs_of_a_set_of_one_shard_share_a_batch_equally_often():
    """Of 100 samples, 24 a batch, two share one with probability 4 batches x (24 x 23) / (100 x 99): 0.223."""
    order, together = Order(np.array([100]), 24, 24, 4, seed=1), np.zeros((100, 100))
    for epoch in range(400):
        for batch in epoch_of(order, epoch):
            together[np.ix_(batch, batch)] += 1
    pairs = together[np.triu_indices(100, 1)]
    assert pairs.mean() == pytest.approx(400 * 0.223, rel=1e-3)
    assert 50 < pairs.min() <= pairs.max() < 130  # 8.3 is one standard deviation
    neighbours = np.diag(together, 1)
    assert neighbours.mean() == pytest.approx(pairs.mean(), rel=0.05)


def test_streams_that_read_of_one_block_share_it():
    plan = Order(np.array([100_000]), 64, 64, 4, 0).plan(epoch=0, rank=0, num_ranks=1)
    tracemalloc.start()
    plan.samples_of(0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 100_000 * 8  # bytes of a few copies of it, not of one a stream


def test_the_first_version_is_what_runs_were_begun_with():
    """Sums over samples of several epochs, ranks and worlds, as the code that had no other version gave them."""
    sizes = np.array([13, 40, 1, 22, 17, 30, 9])
    labelled = {"va": np.arange(0, 132, 2), "au": np.arange(132)}
    of_tasks = build_task_orders(
        labelled, sizes, global_batch=12, streams=4, block_shards=2, seed=3, epoch_steps=5
    ).of_version(1)
    worlds = {
        "f61693744e3dc34f": Order(sizes, 24, 8, 2, 5, version=1),
        "d13b72b0abfa06e2": Order(np.array([100]), 24, 24, 4, 0, version=1),
        "ae81f2e2e096e6ed": Order(sizes, 12, 4, 2, 5, epoch_steps=6, version=1),
        "4a05efc885c9b2b2": of_tasks,
    }
    for expected, order in worlds.items():
        digest = hashlib.sha256()
        for epoch in (0, 1, 7):
            for rank, num_ranks in ((0, 1), (0, 3), (1, 3), (2, 3)):
                plan = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks)
                digest.update(plan.samples_of(0, order.num_steps).astype("<i8").tobytes())
        assert digest.hexdigest()[:16] == expected


@fast
@given(orders(), epochs, num_ranks_st, st.data())
def test_shards_ahead_are_all_that_the_steps_touch_and_no_more_than_their_blocks(order, epoch, num_ranks, data):
    num_ranks = min(num_ranks, order.streams)
    step = data.draw(st.integers(0, order.num_steps - 1))
    num_steps = data.draw(st.integers(1, order.num_steps - step))
    ends = np.cumsum(order.shard_rows)
    for plan in plans(order, epoch, num_ranks):
        ahead = plan.shards_ahead(step, num_steps)
        samples = np.concatenate([plan.samples(at) for at in range(step, step + num_steps)])
        touched = set(np.searchsorted(ends, samples, side="right").tolist())
        assert touched <= set(ahead)
        assert len(set(ahead)) == len(ahead)
        assert 0 <= min(ahead) <= max(ahead) < len(order.shard_rows)
        # Every block a stream touches within these steps has at most `block_shards` shards.
        num_blocks = len(plan.streams) * (num_steps * (order.global_batch // order.streams) + 1)
        assert len(ahead) <= num_blocks * order.block_shards


def test_shards_ahead_come_in_the_order_of_need():
    order = Order(np.full(64, 100), 64, 4, 4, seed=0)  # 4 streams of 16 shards
    plan = EpochPlan(order, epoch=0, rank=0, num_ranks=1)
    first_blocks, two_blocks = plan.shards_ahead(0, 1), plan.shards_ahead(0, 40)
    assert len(first_blocks) >= 4 * order.block_shards - 1
    assert len(two_blocks) > len(first_blocks)
    assert set(two_blocks[: len(first_blocks) - 4]) <= set(first_blocks)


def test_resuming_late_in_a_large_epoch_opens_few_shards():
    order = Order(np.full(1000, 1000), 1000, 10, 4, seed=3)
    plan = EpochPlan(order, epoch=5, rank=0, num_ranks=10)
    assert len(plan.shards_ahead(900, 64)) <= 3 * order.block_shards
    assert len(plan.samples(900)) == 100


def test_neighbours_in_a_shard_are_far_apart_in_training():
    order = Order(np.full(40, 100), 50, 5, 4, seed=0)
    (plan,) = plans(order, 0, 1)
    samples = np.concatenate([plan.stream_samples(2, step) for step in range(order.num_steps)])
    assert np.mean(np.abs(np.diff(samples)) == 1) < 0.02


# --------------------------------------------------------------------------------------------- a part of the samples


@st.composite
def partial_orders(draw) -> Order:
    """Orders over some of the samples of an index, whose epochs read some of these; shards may have none."""
    order = draw(orders())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    samples = np.flatnonzero(rng.random(order.num_rows) < draw(st.sampled_from([0.2, 0.7, 1.0])))
    assume(len(samples) >= order.global_batch)
    bounds = np.concatenate([[0], np.cumsum(order.shard_rows)])
    steps = draw(st.integers(1, len(samples) // order.global_batch))
    rows = np.histogram(samples, bounds)[0]
    return replace(order, shard_rows=rows, epoch_steps=steps, samples=samples)


@fast
@given(partial_orders(), epochs, num_ranks_st)
def test_a_part_has_the_same_samples_on_every_number_of_ranks_and_none_twice(order, epoch, num_ranks):
    num_ranks = min(num_ranks, order.streams)
    alone, many = plans(order, epoch, 1), plans(order, epoch, num_ranks)
    seen = []
    for step in range(order.num_steps):
        samples = step_of_all(many, step)
        assert len(samples) == order.global_batch
        assert sorted(samples) == sorted(step_of_all(alone, step))
        seen += samples
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(order.samples.tolist())


@fast
@given(partial_orders(), epochs, num_ranks_st, st.data())
def test_shards_ahead_of_a_part_are_all_that_it_touches_and_none_without_its_samples(order, epoch, num_ranks, data):
    num_ranks = min(num_ranks, order.streams)
    step = data.draw(st.integers(0, order.num_steps - 1))
    num_steps = data.draw(st.integers(1, order.num_steps - step))
    for plan in plans(order, epoch, num_ranks):
        ahead = plan.shards_ahead(step, num_steps)
        places = np.searchsorted(order.samples, plan.samples_of(step, num_steps).ravel())
        touched = set(np.searchsorted(np.cumsum(order.shard_rows), places, side="right").tolist())
        assert touched <= set(ahead)
        assert len(set(ahead)) == len(ahead)
        assert all(order.shard_rows[shard] for shard in ahead)


def test_every_sample_is_as_likely_to_be_in_an_epochs_part():
    """One shard, a few, and many; the binomial's mean of 1,200 epochs at 1/8 is 150, its spread 11."""
    for sizes in ([64], [30, 1, 33], [4] * 16):
        order = Order(np.array(sizes), 4, 2, 2, seed=0, epoch_steps=2)
        counts = Counter()
        for epoch in range(1200):
            (plan,) = plans(order, epoch, 1)
            counts.update(plan.samples_of(0, 2).ravel().tolist())
        assert len(counts) == 64
        assert 100 < min(counts.values()) <= max(counts.values()) < 200


def task_orders(draw_seed: int = 0, *, seed: int = 0) -> tuple[TaskOrders, dict[str, np.ndarray]]:
    rng = np.random.default_rng(draw_seed)
    labelled = {
        task: np.flatnonzero(rng.random(400) < share) for task, share in (("va", 0.7), ("expr", 0.5), ("au", 1))
    }
    steps = min(map(len, labelled.values())) // 24
    built = build_task_orders(
        labelled, np.full(20, 20), global_batch=24, streams=8, block_shards=2, seed=seed, epoch_steps=steps
    )
    return built, labelled


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_every_task_has_a_batch_of_its_own_rows_in_every_step(num_ranks):
    """The same set for any number of ranks, no sample twice for a task in an epoch, from any step on."""
    built, labelled = task_orders()
    alone = built.plan(epoch=4, rank=0, num_ranks=1).samples_of(0, built.num_steps)
    seen = {task: [] for task in labelled}
    for step in range(built.num_steps):
        of_ranks = [
            built.plan(epoch=4, rank=rank, num_ranks=num_ranks).samples_of(step, 1)[0].reshape(3, -1)
            for rank in range(num_ranks)
        ]
        for task, batch, expected in zip(labelled, np.concatenate(of_ranks, axis=1), alone[step].reshape(3, -1)):
            assert sorted(batch.tolist()) == sorted(expected.tolist())
            assert len(batch) == 24
            assert set(batch.tolist()) <= set(labelled[task].tolist())
            seen[task] += batch.tolist()
    assert all(len(set(samples)) == len(samples) == 24 * built.num_steps for samples in seen.values())


def test_tasks_with_the_same_rows_do_not_get_the_same_batches():
    every = np.arange(400)
    built = build_task_orders(
        {"va": every, "au": every}, np.full(20, 20), global_batch=24, streams=8, block_shards=2, seed=0, epoch_steps=16
    )
    va, au = built.plan(epoch=0, rank=0, num_ranks=1).samples_of(0, 16).reshape(16, 2, 24).transpose(1, 0, 2)
    shared = [len(set(mine) & set(theirs)) for mine, theirs in zip(va.tolist(), au.tolist())]
    assert np.mean(shared) < 4


@fast
@given(st.integers(1, 5000), st.integers(1, 40))
def test_evaluation_covers_every_row_once_whatever_the_number_of_ranks(num_rows, num_ranks):
    ranges = [eval_range(num_rows, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert [sample for start, stop in ranges for sample in range(start, stop)] == list(range(num_rows))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("batch", "streams", "rows"), [(8, 3, 100), (8, 4, 7)])
def test_an_impossible_order_is_our_own_mistake(batch, streams, rows):
    with pytest.raises(AssertionError):
        Order(np.array([rows]), batch, streams, 4, 0)


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 5), (2, 2), (-1, 2)])
def test_a_rank_outside_its_world_is_our_own_mistake(rank, num_ranks):
    with pytest.raises(AssertionError):
        EpochPlan(Order(np.array([100]), 8, 4, 4, 0), epoch=0, rank=rank, num_ranks=num_ranks)


@fast
@given(orders(), st.integers(1, 9), epochs, num_ranks_st, st.data())
def test_steps_need_no_more_shards_than_are_in_hand(order, size, epoch, num_ranks, data):
    order = replace(order, shard_rows=np.full(-(-order.num_rows // size), size))
    step = data.draw(st.integers(0, order.num_steps - 1))
    num_steps = data.draw(st.integers(1, order.num_steps - step))
    num_ranks = min(num_ranks, order.streams)
    for plan in plans(order, epoch, num_ranks):
        assert len(plan.shards_ahead(step, num_steps)) <= order.shards_in_hand(num_ranks, num_steps=num_steps)
