"""What a step's time goes into, who is slowest, and a profile: measured without anybody waiting for it."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl_dist import spans
from mtl_dist.config import build_config
from mtl_dist.spans import BACKWARD, DATA, FORWARD, OPTIMIZER, RANKS, SAVE, listening, span, spanned
from mtl_dist.training import instruments, pace
from mtl_dist.training.engine import build_engine, build_optimizer, gradient_norm, set_learning_rate
from mtl_dist.training.pace import Pace, describe_pace
from mtl_dist.training.pending import Pending
from mtl_dist.training.rates import group_rates
from mtl_dist.training.requests import ask_ranks
from mtl_dist.training.times import PARTS, REST, Times
from mtl_dist.training.tracking import read_records
from tests.conftest import assert_one_message, run_here
from tests.ranks import start_ranks
from tests.test_engine import group  # noqa: F401
from tests.test_recipes import Context
from tests.test_training import STEPS_PER_EPOCH, train, train_args

CPU = torch.device("cpu")


class Ticks:
    """A clock that goes on by what it is told."""

    def __init__(self):
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


NAMES = st.sampled_from([DATA, FORWARD, BACKWARD, RANKS, OPTIMIZER, SAVE])
TREES = st.recursive(st.integers(1, 9), lambda inner: st.tuples(NAMES, st.lists(inner, max_size=4)), max_leaves=12)


@given(steps=st.lists(st.lists(TREES, max_size=4), min_size=1, max_size=4))
def test_of_parts_within_parts_each_has_its_own_time_and_all_add_up_to_the_step(steps):
    clock = Ticks()
    times, expected = Times(clock), []

    def go(tree, within: str) -> None:
        if isinstance(tree, int):
            clock.now += tree
            expected[-1][within] += tree
            return
        name, inner = tree
        with span(name):
            for each in inner:
                go(each, name)

    with listening(times):
        found = []
        for step in steps:
            begun = clock.now
            expected.append(Counter())
            for tree in step:
                go(tree, REST)
            found.append(times.cut())
            assert sum(found[-1].read().values()) == clock.now - begun
    for parts, wanted in zip(found, expected):  # later is the same
        assert {name: value for name, value in parts.read().items() if value} == dict(wanted)
        assert list(parts.read()) == [name for name in PARTS if name in parts.read()]


def test_an_evaluation_is_no_part_of_a_step():
    clock = Ticks()
    times = Times(clock)
    with listening(times), span(spans.EVALUATION):
        clock.now += 100
        with span(RANKS):
            clock.now += 1
        clock.now += 1
    clock.now += 3
    assert sum(times.cut().read().values()) == 3


def test_spans_cost_and_change_nothing_where_nobody_listens():
    closed = []

    def items():
        try:
            yield from range(5)
        finally:
            closed.append(True)

    with span(DATA):
        assert list(spanned(DATA, items())) == list(range(5))
    some = spanned(DATA, items())
    assert next(some) == 0
    some.close()
    assert closed == [True, True]
    with pytest.raises(ZeroDivisionError):
        list(spanned(DATA, (1 // number for number in (1, 0))))


def test_the_wait_for_each_item_is_a_span_and_what_is_done_with_it_is_not():
    clock = Ticks()
    times = Times(clock)

    def slow():
        for _ in range(3):
            clock.now += 2
            yield

    with listening(times):
        for _ in spanned(DATA, slow()):
            clock.now += 5
    assert times.cut().read() == {DATA: 6, REST: 15}


def test_a_minute_is_told_once_with_the_slowest_rank_and_its_host():
    now = [0.0]
    kept = Pace(["a", "b", "c"], CPU, clock=lambda: now[0])
    assert kept.take(is_last=True) is None, "there was no step"
    for step in range(8):
        kept.add({DATA: 0.1, FORWARD: 0.2, RANKS: 0.5, OPTIMIZER: 0.1}, images=8, took_s=1.0)
        now[0] += 1
        assert kept.take() is None
        if step == 3:
            assert kept.own_s == pytest.approx(0.3), "of data and forward"
            kept.heard([0.3, 0.9, 0.4])
            assert kept.own_s == 0
            kept.heard(())
    kept.heard([0.3, 0.7, 0.2])
    now[0] = 61
    told = kept.take()
    assert told["steps"] == 8
    assert told["images_per_s"] == pytest.approx(8)
    assert told["seconds"] == pytest.approx({DATA: 0.1, FORWARD: 0.2, RANKS: 0.5, OPTIMIZER: 0.1})
    assert told["slowest"] == {"rank": 1, "host": "b", "own_s": pytest.approx(0.8), "median_s": pytest.approx(0.3)}
    line = describe_pace(told | {"gpu_gib": 3.25})
    assert line == (
        "0.900 s each (data 11%, forward 22%, ranks 56%, optimizer 11%), 8 frames/s; slowest rank 1 on b, 167% over "
        "the median; GPU memory 3.2 GiB at most"
    )
    assert kept.take() is None
    assert json.loads(json.dumps(told)) == told, "a record holds plain numbers"


def asking_rank(rank: int, init_file: str, messages) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=3)
    collectives, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **how: (collectives.append(1), all_reduce(*args, **how))
    context = Context(rank, 3, "job")
    heard = [ask_ranks(context, late=rank == 0, step=step, own_s=rank + 0.5) for step in (1, 8)]
    messages.put((rank, [(tuple(asked), len(collectives)) for asked in heard]))
    dist.destroy_process_group()


@pytest.mark.whole
def test_ranks_tell_their_times_with_the_question_that_they_ask_anyway(tmp_path):
    import multiprocessing

    with multiprocessing.Manager() as manager:
        messages = manager.Queue()
        start_ranks(asking_rank, (str(tmp_path / "init"), messages), 3)
        found = dict(messages.get() for _ in range(3))
    nothing, all_said = (False, False, False, ()), (False, False, True, (0.5, 1.5, 2.5))
    assert found == {rank: [(nothing, 1), (all_said, 1)] for rank in range(3)}  # one collective, at the second


@pytest.mark.parametrize("settings", [{"clip_norm": 0.01}, {"clip_norm": 1e6}, {"clip_norm": None}])
@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.whole
def test_the_norm_of_a_steps_gradients_is_that_before_they_are_clipped(group, settings, zero_stage):  # noqa: F811
    config = build_config({"optim": settings, "train": {"global_batch": 1}, "engine": {"zero_stage": zero_stage}})
    torch.manual_seed(0)
    engine = build_engine(nn.Linear(3, 2), config, num_ranks=1, device=CPU)
    for scale in (1.0, 3.0):
        inputs = scale * torch.arange(3.0)
        alone = torch.autograd.grad(engine.module(inputs).square().sum(), engine.module.parameters())
        expected = torch.cat([gradient.flatten() for gradient in alone])
        engine.backward(engine(inputs).square().sum())
        engine.step()
        found = gradient_norm(engine)
        if zero_stage and settings["clip_norm"] is None:
            assert found is None or float(found) == pytest.approx(float(expected.norm()), rel=1e-5)
        else:
            assert float(found) == pytest.approx(float(expected.norm()), rel=1e-5)


def test_rates_of_groups_are_told_where_they_differ():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    class Engine:
        def __init__(self, **optim):
            config = build_config({"optim": {"lr": 0.5, "warmup_steps": 0, **optim}})
            self.optimizer = build_optimizer(nn.ModuleDict({"model": Model()}), config)
            set_learning_rate(self, config, 0, 10)

    assert group_rates(Engine().optimizer.param_groups) == {}
    found = group_rates(Engine(backbone_lr=0.1).optimizer.param_groups)
    assert found == pytest.approx({"heads": 0.5, "backbone x0.1": 0.05})
    assert group_rates(Engine(freeze_backbone_for=0.5).optimizer.param_groups) == {"heads": 0.5, "backbone x1": 0.0}


class Queue:
    """A device that does what it is given when it is asked for a result: nothing behind that is there yet."""

    def __init__(self):
        self.given, self.done, self.num_read = 0, 0, 0

    def mark(self) -> int:
        self.given += 1
        return self.given

    def seconds(self, begin: int, end: int) -> float:
        assert begin <= end <= self.done, "this would wait for the device, or fail"
        self.num_read += 1
        return 0.5 * (end - begin)


@pytest.mark.whole
def test_times_are_read_when_the_device_has_done_the_step_and_never_before(shards, tmp_path, monkeypatch):
    clock = Queue()

    class Noted(Pending):
        def __init__(self, values):
            super().__init__(values)
            self.place = clock.given

        def read(self):
            clock.done = max(clock.done, self.place)
            return super().read()

    monkeypatch.setattr("mtl_dist.training.loop.Pending", Noted)
    monkeypatch.setattr(instruments, "build_times", lambda device: Times(clock))
    train(shards, tmp_path, "run", "--train.epochs", "1", "--checkpoint.every-steps", "2")
    assert clock.num_read > 5 * STEPS_PER_EPOCH


@pytest.mark.whole
def test_a_run_tells_its_times_its_norms_and_a_profile_and_the_status_shows_them(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "EVERY_S", 0.0)  # every step
    more = ["--run.profile", "3", "--optim.backbone-lr", "0.5", "--checkpoint.every-steps", "2"]
    done = train(shards, tmp_path, "run", *more)
    records = read_records(f"{tmp_path}/run")
    paces, steps = ([record for record in records if record["kind"] == kind] for kind in ("pace", "step"))
    assert [record["step"] for record in paces] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert [record["steps"] for record in paces] == [1] * len(paces)
    for record in paces:
        assert all(record["seconds"][name] > 0 for name in (DATA, FORWARD, BACKWARD, OPTIMIZER, REST))
        assert math.isfinite(record["images_per_s"])
    assert sum(SAVE in record["seconds"] for record in paces) > 1
    for record in steps:
        assert record["gradient_norm"] > 0
        assert record["rates"] == pytest.approx({"heads": record["lr"], "backbone x0.5": record["lr"] / 2})
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("profile ")]
    assert line == f"profile {tmp_path}/run/profile/step-000003.json.gz (opens in ui.perfetto.dev)"
    trace = json.loads(gzip.decompress(Path(line.split()[1]).read_bytes()))
    names = Counter(event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X")
    for part in (DATA, FORWARD, BACKWARD, OPTIMIZER):
        assert names[f"mtl_dist.{part}"] == 3, part  # of three steps
    assert names["aten::convolution"] > 3
    told = run_here("mtl_dist.train", "--status", f"{tmp_path}/run").stdout
    assert f"steps        {describe_pace(paces[-1])}; norm of the gradient" in told
    again = train(shards, tmp_path, "run", *more)
    assert "run.profile is 3, and step 10 is done: there is no profile" in again.stdout


@pytest.mark.whole
def test_a_profile_of_a_step_that_never_comes_is_refused(shards, tmp_path):
    done = run_here(*train_args(shards, tmp_path, "run"), "--run.profile", "11", "--dry-run")
    assert_one_message(done, "run.profile is 11, and the run ends at step 10; give an earlier step")


@pytest.mark.whole
def test_a_profile_of_the_last_steps_has_those_that_there_are(shards, tmp_path):
    train(shards, tmp_path, "run", "--run.profile", "5", "--train.epochs", "1")
    trace = json.loads(gzip.decompress((tmp_path / "run/profile/step-000005.json.gz").read_bytes()))
    names = Counter(event.get("name") for event in trace["traceEvents"])
    assert names[f"mtl_dist.{OPTIMIZER}"] == 1


def test_the_chart_of_a_report_shows_the_records_and_older_runs_have_none(tmp_path):
    from mtl_dist.report.pace import draw_pace

    step = {"kind": "step", "epoch": 0, "lr": 0.1, "loss": {"total": 1.0}}
    lines = [step | {"step": number, "gradient_norm": float(number)} for number in range(1, 201)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_pace("A", "run", str(tmp_path), 1) is None
    seconds = {DATA: 0.25, FORWARD: 0.5}
    for number in (100, 200):
        about = {"kind": "pace", "step": number, "epoch": 0, "steps": 100}
        lines.append(about | {"images_per_s": 9.0, "seconds": seconds})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figure = draw_pace("A", "run", str(tmp_path), 1)
    rows = [line.split(",") for line in figure.csv.decode().splitlines()]
    assert [row for row in rows if row[0] == DATA] == [[DATA, "100", "0.25"], [DATA, "200", "0.25"]]
    norms = np.array([float(row[2]) for row in rows if row[0] == "gradient_norm"])
    assert len(norms) == 60
    assert (norms[0], norms[-1]) == (2.5, 199.0)  # of 1 to 4, and of 198 to 200
    assert "0.750 s each (data 33%, forward 67%), 9 frames/s" in figure.caption
    assert figure.png.startswith(b"\x89PNG")
