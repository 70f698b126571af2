"""Balanced sampling: rows of rare classes come more often, as exactly as expected, alike on every number of ranks."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import build_config
from mtl_dist.data.balanced import UNIT, BalancedOrder, build_balanced_order, deal_apart
from mtl_dist.data.cache import Cache
from mtl_dist.data.classes import Classes, join_classes
from mtl_dist.data.index import read_sets
from mtl_dist.data.order import Order
from mtl_dist.data.samples import open_samples
from mtl_dist.errors import InputError
from mtl_dist.shards.__main__ import create
from mtl_dist.training.audit import Audit, read_audit
from mtl_dist.training.plan import build_order, open_data, plan_run
from mtl_dist.unread import check_read
from tests.conftest import write_dataset
from tests.test_recipes import EVERY_STEP, FROZEN, assert_close_losses, assert_same_run, config_of, run_ranks
from tests.test_training import losses

fast = settings(max_examples=40, deadline=None, derandomize=True)
epochs_st = st.integers(0, 10_000)
num_ranks_st = st.integers(1, 17)


class World(NamedTuple):
    order: BalancedOrder
    classes: Classes
    power: float

    @property
    def rarest(self) -> list[int | None]:
        """Every row's rarest class, found row by row."""
        of_rows: list[list[int]] = [[] for _ in range(self.order.of_set.num_rows)]
        for row, number in zip(self.classes.samples.tolist(), self.classes.classes.tolist()):
            of_rows[row].append(number)
        counts = Counter(self.classes.classes.tolist())
        return [min(own, key=lambda n: (counts[n], n)) if own else None for own in of_rows]


@st.composite
def worlds(draw, *, one_block: bool = False) -> World:
    """Sets of some shards, whose rows have one class, several or none; epochs of all rows, or of a part of them."""
    streams, share = draw(st.integers(1, 17)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 23), min_size=1, max_size=12))
    if sum(sizes) < streams * share:
        sizes.append(streams * share)
    num_rows, num = sum(sizes), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    has = rng.random((num_rows, num)) < rng.dirichlet(np.ones(num)) * draw(st.sampled_from([0.5, 1, 2]))
    has[0, 0] = True
    classes = Classes(*np.nonzero(has), num)
    steps = draw(st.integers(1, num_rows // (streams * share)))
    block_shards = len(sizes) if one_block else draw(st.integers(1, 5))
    of_set = Order(np.array(sizes), streams * share, streams, block_shards, draw(st.integers(0, 2**40)), steps)
    power = draw(st.floats(0.05, 1))
    return World(build_balanced_order(classes, of_set, power=power), classes, power)


def steps_of(order: BalancedOrder, epoch: int, num_ranks: int) -> list[list[list[int]]]:
    """[step][rank] -> samples."""
    plans = [order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    return [[plan.samples_of(step, 1)[0].tolist() for plan in plans] for step in range(order.num_steps)]


# ------------------------------------------------------------------------------------------------ how often a row comes


@fast
@given(worlds())
def test_a_row_is_expected_by_the_weight_of_its_rarest_class_and_without_one_as_often_as_the_mean(world):
    order, classes, power = world
    counts, rarest = Counter(classes.classes.tolist()), world.rarest
    mean = order.num_steps * order.of_set.global_batch / len(rarest)
    weights = [None if own is None else counts[own] ** -power for own in rarest]
    labelled = [weight for weight in weights if weight is not None]
    scale = len(labelled) / sum(labelled)
    expected = [mean * (1 if weight is None else weight * scale) for weight in weights]
    np.testing.assert_allclose(order.expected, expected, rtol=1e-6)
    assert order.lengths.sum() == order.num_steps * order.of_set.global_batch * UNIT


@fast
@given(worlds(), epochs_st)
def test_an_epoch_has_a_row_and_a_class_floor_or_ceil_of_what_is_expected(world, epoch):
    counts, expected = world.order.counts(epoch), world.order.expected
    assert counts.sum() == world.order.num_steps * world.order.of_set.global_batch
    assert (np.abs(counts - expected) < 1).all()
    of_class, expected_of_class = Counter(), Counter()
    for own, count, length in zip(world.rarest, counts.tolist(), world.order.lengths.tolist()):
        of_class[own] += count
        expected_of_class[own] += Fraction(length, UNIT)
    assert all(abs(of_class[own] - expected_of_class[own]) < 1 for own in of_class)


@fast
@given(worlds(), epochs_st)
def test_counts_are_those_of_a_comb_laid_on_the_rows(world, epoch):
    """Written out: every tooth of the comb lies on one row of the line."""
    order = world.order
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((order.of_set.seed, 0, 6))))
    tooth = Fraction((int(rng.integers(2**32)) + epoch * 0x9E3779B9) % 2**32, 2**32)
    found, end = Counter(), Fraction(0)
    for row in order.line.tolist():
        end += Fraction(int(order.lengths[row]), 2**32)
        while tooth < end:
            found[row] += 1
            tooth += 1
    assert order.counts(epoch).tolist() == [found[row] for row in range(len(order.line))]
    own = [len(world.rarest) if n is None else n for n in np.array(world.rarest, object)[order.line]]
    assert own == sorted(own)


@fast
@given(worlds(), st.integers(0, 1000))
def test_over_epochs_the_sum_of_a_row_stays_within_a_logarithm_of_what_is_expected(world, first):
    """Chance would be off by the square root: 16 of 256 epochs, where a row comes every second time."""
    order, total = world.order, np.zeros(world.order.of_set.num_rows)
    for number in range(256):
        total += order.counts(first + number)
        assert np.abs(total - (number + 1) * order.expected).max() < 1.5 + 0.5 * math.log(number + 1)


def test_over_a_turn_of_the_comb_the_mean_is_exactly_what_is_expected():
    """Of lengths in eighths a turn is eight combs, an eighth apart."""
    lengths = np.array([1, 3, 8, 12, 17, 7]) * (UNIT // 8)
    order = BalancedOrder(Order(np.array([6]), 6, 1, 1, seed=5), lengths, np.array([4, 2, 0, 5, 1, 3]))
    begin = order.counts(0)
    offsets: dict[int, np.ndarray] = {}
    for epoch in range(100):
        offsets.setdefault(_eighth_of(order, epoch), order.counts(epoch))
    assert len(offsets) == 8
    assert sum(offsets.values()).tolist() == [1, 3, 8, 12, 17, 7]
    assert begin.tolist() == offsets[_eighth_of(order, 0)].tolist()


def _eighth_of(order: BalancedOrder, epoch: int) -> int:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((order.of_set.seed, 0, 6))))
    return (int(rng.integers(2**32)) + epoch * 0x9E3779B9) % 2**32 // 2**29


def test_a_small_example_by_hand():
    """Seven rows: four of class 0, two of class 1, one of none; three steps of two, so an epoch has six.

    Power 1: rows of class 0 weigh 1/4, of class 1 1/2, in all 2; their six rows are expected 6/7 x 6 times, each class
    half of it. So a row of class 0 comes 9/14 times, of class 1 9/7 times, and the one of none 6/7 times. Power 1/2:
    1/2 and 1/sqrt(2), in all 2 + sqrt(2).
    """
    classes = Classes(np.array([0, 1, 3, 4, 5, 6]), np.array([0, 1, 0, 0, 1, 0]), 2)
    of_set = Order(np.array([3, 4]), 2, 2, 1, seed=0)
    order = build_balanced_order(classes, of_set, power=1)
    np.testing.assert_allclose(order.expected * 14, [9, 18, 12, 9, 9, 18, 9], rtol=1e-8)
    half = build_balanced_order(classes, of_set, power=0.5).expected * (2 + 2**0.5) / 6 * 7 / 6
    np.testing.assert_allclose(half[[0, 1, 3, 4, 5, 6]], np.array([1, 2**0.5, 1, 1, 2**0.5, 1]) / 2, rtol=1e-8)
    # In fourteenths the rows 4, 0, 3, 6, 1, 5, 2 of the line end at 9, 18, 27, 36, 54, 72, 84; teeth are 14 apart.
    assert order.line.tolist() == [4, 0, 3, 6, 1, 5, 2]
    expected = [
        [0, 2, 1, 1, 1, 1, 0],  # 8.2 on row 4, 22.2 on 3, 36.2 and 50.2 on 1, 64.2 on 5, 78.2 on 2
        [1, 1, 1, 0, 1, 1, 1],  # 2.9 on row 4, 16.9 on 0, 30.9 on 6, 44.9 on 1, 58.9 on 5, 72.9 on 2
        [1, 2, 1, 1, 0, 1, 0],  # 11.5 on row 0, 25.5 on 3, 39.5 and 53.5 on 1, 67.5 on 5, 81.5 on 2
    ]
    assert [order.counts(epoch).tolist() for epoch in range(3)] == expected
    assert order.at_epoch(0).samples.tolist() == [1, 1, 2, 3, 4, 5]
    assert order.at_epoch(0).shard_rows.tolist() == [3, 3]


# --------------------------------------------------------------------------------------------------------- the order


@fast
@given(worlds(), epochs_st, num_ranks_st)
def test_a_step_has_the_same_rows_on_any_number_of_ranks_and_an_epoch_those_that_were_drawn(world, epoch, num_ranks):
    order, num_ranks = world.order, min(num_ranks, world.order.of_set.streams)
    alone, many = steps_of(order, epoch, 1), steps_of(order, epoch, num_ranks)
    assert len(alone) == len(many) == order.num_steps
    for (whole,), of_ranks in zip(alone, many):
        assert len(whole) == order.of_set.global_batch
        assert sorted(sample for samples in of_ranks for sample in samples) == sorted(whole)
        sizes = [len(samples) for samples in of_ranks]
        assert max(sizes) - min(sizes) <= order.of_set.global_batch // order.of_set.streams
    found = Counter(sample for (whole,) in alone for sample in whole)
    assert [found[row] for row in range(order.of_set.num_rows)] == order.counts(epoch).tolist()


@fast
@given(worlds(), epochs_st, num_ranks_st, st.data())
def test_an_epoch_goes_on_at_any_step_on_any_rank(world, epoch, num_ranks, data):
    order, num_ranks = world.order, min(num_ranks, world.order.of_set.streams)
    rank = data.draw(st.integers(0, num_ranks - 1))
    first = data.draw(st.integers(0, order.num_steps - 1))
    count = data.draw(st.integers(1, order.num_steps - first))
    whole = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks).samples_of(0, order.num_steps)
    part = order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks).samples_of(first, count)
    np.testing.assert_array_equal(part, whole[first : first + count])


@fast
@given(worlds(one_block=True), epochs_st)
def test_a_set_of_one_block_has_a_row_in_different_steps_and_twice_in_none_unless_it_must(world, epoch):
    counts, num_steps = world.order.counts(epoch), world.order.num_steps
    for (whole,) in steps_of(world.order, epoch, 1):
        found = Counter(whole)
        assert all(count // num_steps <= found[row] <= -(-count // num_steps) for row, count in enumerate(counts))


@fast
@given(
    st.integers(1, 12), st.lists(st.integers(0, 11), max_size=30), st.lists(st.integers(1, 12), max_size=30), st.data()
)
def test_copies_are_dealt_to_different_steps_where_there_are_as_many(num_steps, more, copies, data):
    """Steps have a place, and some of them more; no row has more copies than steps have the most places."""
    steps = np.array([*range(num_steps), *(step % num_steps for step in more)])
    places = Counter(steps.tolist())
    room = sum(count == max(places.values()) for count in places.values())
    rows = [row for row, count in enumerate(copies) for _ in range(min(count, room))][: len(steps)]
    rows = np.array([*rows, *range(1000, 1000 + len(steps) - len(rows))])
    dealt = deal_apart(rows, steps, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert sorted(dealt.tolist()) == list(range(len(steps)))
    assert len(set(zip(rows[dealt].tolist(), steps.tolist()))) == len(steps)


def example(*, rows: int = 100, shards: int = 64) -> World:
    """A set of many shards with eight classes, each half as common as the one before."""
    shares = 0.5 ** np.arange(8)
    numbers = np.random.default_rng(0).choice(8, rows * shards, p=shares / shares.sum())
    of_set, classes = Order(np.full(shards, rows), 64, 16, 4, 0), Classes(np.arange(len(numbers)), numbers, 8)
    return World(build_balanced_order(classes, of_set, power=1), classes, 1)


def test_a_set_of_many_shards_has_no_row_twice_in_a_step_where_chance_would_have_many():
    order = example().order
    assert 10 < order.counts(0).max() < order.num_steps == 100
    twice = sum(len(whole) - len(set(whole)) for (whole,) in steps_of(order, 0, 1))
    assert twice == 0
    plain = np.random.default_rng(0).permutation(order.at_epoch(0).samples).reshape(-1, 64)
    assert sum(len(step) - len(set(step)) for step in plain.tolist()) > 50


def test_every_class_comes_as_often_with_power_1_and_is_spread_over_all_steps():
    order, classes, _ = example()
    found = np.array([np.bincount(classes.classes[whole], minlength=8) for (whole,) in steps_of(order, 0, 1)])
    assert np.abs(found.sum(0) - 6400 / 8).max() <= 1
    assert 1 <= found.min() <= found.max() <= 20


@fast
@given(worlds(), epochs_st, num_ranks_st, st.data())
def test_the_shards_ahead_are_those_that_the_samples_are_in_and_no_more_than_their_blocks(
    world, epoch, num_ranks, data
):
    order = world.order
    num_ranks = min(num_ranks, order.of_set.streams)
    plan = order.plan(epoch=epoch, rank=data.draw(st.integers(0, num_ranks - 1)), num_ranks=num_ranks)
    first = data.draw(st.integers(0, order.num_steps - 1))
    count = data.draw(st.integers(1, order.num_steps - first))
    ends = np.cumsum(order.of_set.shard_rows)
    read = set(np.searchsorted(ends, plan.samples_of(first, count).ravel(), side="right").tolist())
    ahead = plan.shards_ahead(first, count)
    assert len(ahead) == len(set(ahead))
    assert read <= set(ahead)
    num_blocks = len(plan.streams) * (count * (order.of_set.global_batch // order.of_set.streams) + 1)
    assert len(ahead) <= num_blocks * order.of_set.block_shards


@pytest.mark.parametrize("steps", [100, 25])
def test_few_shards_are_in_hand_at_a_time_though_a_part_of_an_epoch_is_of_all(steps):
    """320 shards in 16 streams: 20 a stream, which 10 steps of 25 read 8 of, and 10 of 100 two."""
    _, classes, _ = example(rows=20, shards=320)
    order = build_balanced_order(classes, Order(np.full(320, 20), 64, 16, 1, 0, steps), power=0.5)
    for num_ranks in (4, 16):
        most = order.shards_in_hand(num_ranks, num_steps=10)
        assert most == 16 // num_ranks * (10 * 20 // steps + 2)
        for epoch in range(3):
            plan = order.plan(epoch=epoch, rank=1, num_ranks=num_ranks)
            ahead = [len(plan.shards_ahead(step, 10)) for step in range(0, steps, 10)]
            assert most / 4 < max(ahead) <= most


# ------------------------------------------------------------------------------------------------- classes of a set


def annotated(dataset: Path) -> list[list[str]]:
    """The training rows of the annotation file, split up."""
    return [line.split(",") for line in (dataset / "training_set_annotations.txt").read_text().splitlines()[1:]]


def classes_of_rows(shards: Path, by: str) -> dict[int, set[int]]:
    """Row number -> its classes, as a set of pictures says it."""
    samples = open_samples(read_sets([f"{shards}/cropped/train"]), build_config(), Cache())
    found, rows = samples.classes(by), samples.names().rows.tolist()
    assert found.counts.tolist() == np.bincount(found.classes, minlength=found.num).tolist()
    assert (np.diff(found.samples) >= 0).all()
    of_rows: dict[int, set[int]] = {}
    for sample, number in zip(found.samples.tolist(), found.classes.tolist()):
        of_rows.setdefault(rows[sample], set()).add(number)
    return of_rows


def test_classes_are_those_of_the_annotations(dataset, shards):
    expr, au = {}, {}
    for row, (_, _, _, expression, *units) in enumerate(annotated(dataset)):
        if expression != "-1":
            expr[row] = {int(expression)}
        if units != ["-1"] * 12:
            au[row] = {place for place, unit in enumerate(units) if unit == "1"} or {12}
    assert classes_of_rows(shards, "expr") == expr
    assert classes_of_rows(shards, "au") == au


def test_a_row_is_of_the_video_whose_directory_it_is_in(dataset, shards):
    of_rows = classes_of_rows(shards, "video")
    directory = {row: entry[0].partition("/")[0] for row, entry in enumerate(annotated(dataset))}
    assert of_rows.keys() == directory.keys()
    pairs = {(directory[row], *own) for row, own in of_rows.items()}
    assert len(pairs) == len({name for name, _ in pairs}) == len({number for _, number in pairs}) == 5


def test_a_row_without_a_unit_on_is_a_class_and_one_without_labels_of_units_has_none():
    from mtl_dist.data.classes import read_classes
    from mtl_dist.data.sidecar import Sidecar

    au, mask = np.zeros((4, 12), np.uint8), np.ones((4, 12), np.uint8)
    au[0, [2, 5]] = 1
    au[1, 3], mask[1, 3] = 1, 0  # not labelled: nobody knows
    mask[3] = 0
    blank = np.zeros(4, np.uint8)
    sidecar = Sidecar(np.arange(4), *[blank] * 3, blank[:, None], None, blank, au, blank, blank, mask)
    found = read_classes("au", [sidecar, sidecar])
    one = [(0, 2), (0, 5), (1, 12), (2, 12)]
    assert list(zip(found.samples.tolist(), found.classes.tolist())) == [*one, *((row + 4, n) for row, n in one)]


def test_several_sets_share_expressions_and_no_videos():
    one, other = Classes(np.array([0, 2]), np.array([1, 0]), 8), Classes(np.array([0, 1]), np.array([1, 7]), 8)
    expr = join_classes("expr", [one, other], [0, 10])
    assert (expr.samples.tolist(), expr.classes.tolist(), expr.num) == ([0, 2, 10, 11], [1, 0, 1, 7], 8)
    video = join_classes("video", [one, other], [0, 10])
    assert (video.samples.tolist(), video.classes.tolist(), video.num) == ([0, 2, 10, 11], [1, 0, 9, 15], 16)


# ------------------------------------------------------------------------------------------------------------ in a run


EXPR = {"data": {"balance": "expr", "balance_power": 1.0}}


def order_of(config) -> BalancedOrder:
    data = open_data(config)
    return build_order(config, data, open_samples(data.train, config, Cache()))


@pytest.mark.whole
def test_a_balanced_run_has_one_outcome_on_1_2_and_3_ranks_and_when_killed(shards, tmp_path):
    for num_ranks in (1, 2, 3):
        jobs = [(config_of(shards, tmp_path, f"run-{num_ranks}", EXPR, FROZEN, EVERY_STEP), None)]
        if num_ranks == 2:
            jobs.append((config_of(shards, tmp_path / "killed", "run-2", EXPR, FROZEN, EVERY_STEP), 3))
        run_ranks(num_ranks, jobs, tmp_path)
    config = config_of(shards, tmp_path, "run-1", EXPR, FROZEN)
    order = order_of(config)
    assert order.num_steps == 5
    assert order.counts(0).max() > 1
    for name in ("run-2", "run-3"):
        assert_close_losses(losses(tmp_path, name), losses(tmp_path, "run-1"))
    assert_same_run((tmp_path / "killed", "run-2"), (tmp_path, "run-2"))
    for name in ("run-1", "run-2", "run-3"):
        report = read_audit(tmp_path / "audit", name, global_batch=8, num_steps=10, order=order)
        assert (report.samples_lost, report.samples_twice, report.steps_repeated) == (0, 0, 0)
        assert [step for _, step in report.finished_at] == list(range(1, 11))


def write_audit(directory: Path, order: BalancedOrder, *, num_epochs: int) -> Path:
    """An audit as one rank writes it; returns its file."""
    with Audit(directory, "run", life="0001", rank=0) as audit:
        for epoch in range(num_epochs):
            for step, (samples,) in enumerate(steps_of(order, epoch, 1)):
                audit.finished(epoch * order.num_steps + step + 1, epoch, np.array(samples))
    return next((directory / "run").iterdir())


def test_the_audit_of_rows_that_repeat_tells_what_was_lost_and_what_came_more_often_than_it_should(tmp_path):
    order = example(shards=4).order
    file = write_audit(tmp_path, order, num_epochs=2)
    how = {"global_batch": 64, "num_steps": 2 * order.num_steps}
    whole = read_audit(tmp_path, "run", order=order, **how)
    assert (whole.samples_lost, whole.samples_twice) == (0, 0)
    assert read_audit(tmp_path, "run", **how).samples_twice > 0  # of an order that it is not told of
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    # One sample of the second step of the second epoch was not read, and another one in its place.
    samples = lines[order.num_steps + 1]["samples"]["all"]
    lost = samples[3]
    samples[3] = next(row for row in range(400) if row not in samples)
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:3], *lines[4:]]))
    report = read_audit(tmp_path, "run", order=order, **how)
    assert lost not in samples
    assert (report.samples_lost, report.samples_twice) == (64 + 1, 1)


@pytest.mark.parametrize(("data", "turns"), [({}, [0, 0, 0, 0, 0, 1]), (EXPR["data"], [0, 1, 2, 3, 4, 5])])
def test_what_an_epoch_may_read_twice_is_augmented_otherwise_each_time(shards, tmp_path, data, turns, monkeypatch):
    from mtl_dist.training import step as training_step

    class Enough(Exception): ...

    drawn: list[int] = []

    def draw(*args, epoch, **about):
        drawn.append(epoch)
        raise Enough

    monkeypatch.setattr(training_step, "draw_passes", draw)
    config = config_of(shards, tmp_path, "run", {"data": data})
    engine = type("Engine", (), {"module": type("Module", (), {"passes": 1})})
    batch = type("Batch", (), {"rows": None})
    for step in range(6):
        with pytest.raises(Enough):
            training_step.train_step(engine, batch, config, prepare=None, epoch=step // 5, step=step, rank=0)
    assert drawn == turns
    assert config.data.repeats_rows == bool(data)


@pytest.mark.parametrize("by", ["expr", "au", "video"])
def test_the_plan_says_what_an_epoch_has_of_every_class_before_and_after(shards, tmp_path, by):
    config = config_of(shards, tmp_path, "run", {"data": {"balance": by, "balance_power": 1.0}})
    text = plan_run(config).text
    counts = open_data(config).train.labels
    assert "5 an epoch, 10 in all; of rows that are drawn anew for every epoch" in text
    if by == "expr":
        even = counts.expr / sum(count > 0 for count in counts.expr_classes)
        assert f"Neutral {counts.expr_classes[0]} -> {even:.0f}, " in text
        assert f"{40 - counts.expr} rows without labels of expr come as often as before" in text
    if by == "au":
        assert f"AU1 {counts.au_positives[0]} -> " in text
    if by == "video":
        assert "balance 5 videos of 8 to 8 -> 8 to 8 rows an epoch (power 1)" in text
    assert "a row comes" in text
    assert text == plan_run(config).text
    assert "balance" not in plan_run(config, compares=False).text


def test_the_plan_notes_weights_that_are_of_the_set_as_it_is(shards, tmp_path):
    layers = EXPR, {"loss": {"expr_weights": "balanced", "expr_prior": 1.0, "au_weights": "balanced"}}
    text = plan_run(config_of(shards, tmp_path, "run", *layers)).text
    assert "note    loss.expr_weights and loss.expr_prior with data.balance expr: weights are of the labels" in text
    alone = {"loss": {"expr_weights": "none", "au_weights": "balanced"}}
    assert "with data.balance" not in plan_run(config_of(shards, tmp_path, "run", EXPR, alone)).text


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"data": {"sampling": "per_task"}}, "per_task gives every task a batch of its own; change one of them"),
        ({"data": {"mix": [0.5, 0.5]}}, "data.mix how often those of a set do; change one of them"),
        ({"model": {"name": "c"}}, "model.name c reads windows of videos; leave it out"),
        ({"data": {"balance_power": 0}}, "balance_power"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(shards, tmp_path, layers, words):
    with pytest.raises(InputError, match=words):
        config_of(shards, tmp_path, "run", EXPR, layers)


def test_what_cannot_be_balanced_is_refused(dataset, shards, tmp_path):
    often = {"train": {"global_batch": 20}}
    with pytest.raises(InputError, match=r"would come \d times in the 2 steps of an epoch: .* than 1$"):
        plan_run(config_of(shards, tmp_path, "run", EXPR, often))
    one = write_dataset(tmp_path / "one", num_train=8)
    create(str(one), str(tmp_path / "shards"), views=("cropped",), jobs=1)
    with pytest.raises(InputError, match=r"labelled rows of .* have 1 video\(s\): nothing is to be balanced"):
        plan_run(config_of(tmp_path / "shards", tmp_path, "run", {"data": {"balance": "video"}}))


def test_a_power_that_nothing_reads_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"data\.balance_power is 0\.7, and nothing reads it: data\.balance is none"):
        check_read(build_config({"data": {"balance_power": 0.7}}))
    check_read(build_config({"data": {"balance_power": 0.7, "balance": "video"}}))
