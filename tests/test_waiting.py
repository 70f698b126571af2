"""No step of training makes the host wait for the device, but for what is named here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_dist.constants import Constant
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import lend, train_batches
from mtl_dist.data.order import Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.objective.gradients import SOLVERS
from mtl_dist.training.pending import Pending
from mtl_dist.training.step import train_step
from mtl_dist.transfer import pin, pin_batch, receive, send
from tests.fake_gpus import fake_gpus
from tests.stand_in import META, pinning, waits
from tests.test_devices import STEPS, Engine, make_batch, make_config, make_module, no_autocast  # noqa: F401
from tests.windows import DIMS, make_windows

pytestmark = pytest.mark.whole

HERE = torch.ones(3)
THERE = torch.ones(3, device="meta")
FEATURES = {"model.sequence.dims": DIMS, "loss.expr_weights": "balanced", "loss.au_weights": "balanced"}
WEIGHED = {"loss.expr_weights": "balanced", "loss.au_weights": "balanced", "loss.expr_prior": 1.0}
MORE = [("small", WEIGHED), ("small-mae", {}), ("mae-tiny", {"train.accumulation": 2}), ("c", FEATURES)]
MORE += [("small-d", {}), ("c", FEATURES | {"model.sequence.encoder": "tcn"})]


def waits_of_steps(system, changes) -> list[str]:
    """What makes the host wait in the second and third step, whose losses are looked at when the next is queued."""
    config = make_config(system, **changes)
    is_sequence = config.model.backbone == "features"
    batch = make_windows((sum(DIMS),), dtype=torch.float16) if is_sequence else make_batch()
    module = make_module(config).to("meta")
    engine, how = Engine(module, config), {"prepare": build_preparation(config), "epoch": 0, "rank": 0}
    under_way = None
    with waits() as noted:
        for step in range(3):
            if step == 1:
                noted.found.clear()  # constants are made in the first step
            loss = train_step(engine, pin_batch(batch, META), config, step=step, **how)
            if under_way:
                seen = under_way.read()
                [float(value) for value in (seen.total, *seen.terms.values(), *seen.weights.values())]
                [bool(there) for there in seen.present.values()]
            under_way = Pending(loss)
    return noted.found


@pytest.mark.parametrize(
    ("system", "changes"),
    [pytest.param(*each, marks=pytest.mark.slow if each[0].endswith("-paper") else ()) for each in STEPS + MORE],
)
def test_a_steady_step_does_not_wait_for_the_device(system, changes, no_autocast):  # noqa: F811
    assert waits_of_steps(system, changes) == []


@pytest.mark.parametrize(
    ("system", "changes", "where"),
    [
        ("small-c", FEATURES, "mtl_dist/models/encoders.py"),
        *(("small", {"loss.balancing": way}, "mtl_dist/objective/gradients.py") for way in SOLVERS),
    ],
)
def test_these_wait_and_only_there(system, changes, where, no_autocast):  # noqa: F811
    """torch's packed sequences want lengths on the host; the weights of gradients are solved for there."""
    found = waits_of_steps(system, changes)
    assert found
    assert all(f" at {where}" in line for line in found)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: float(THERE.sum()),
        lambda: bool((THERE > 0).any()),
        lambda: THERE.cpu(),
        lambda: THERE.to("cpu", non_blocking=True),
        lambda: THERE.tolist(),
        lambda: HERE.to("meta"),
        lambda: HERE.to("meta", non_blocking=True),
        lambda: THERE.copy_(HERE),
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: THERE.new_tensor([1.0, 2.0]),
        lambda: THERE[THERE > 0],
        lambda: THERE[torch.tensor([0, 1])],
        lambda: torch.where(THERE > 0, THERE, torch.tensor(0.0)),
        lambda: Constant(torch.ones(2)).like(THERE),
    ],
)
def test_what_a_gpu_is_waited_for_is_noticed(wait):
    with waits() as noted:
        wait()
    assert noted.found


@pytest.mark.parametrize(
    "go_on",
    [
        lambda: send(HERE, META),
        lambda: pin(HERE, META).to("meta", non_blocking=True),
        lambda: receive(THERE),
        lambda: Pending({"loss": THERE.sum(), "there": (THERE > 0).any()}).read(),
        lambda: torch.where(THERE > 0, THERE, 0.0),
        lambda: 2 * THERE + HERE.sum(),
        lambda: torch.arange(3, device="meta"),
        lambda: HERE[HERE > 0].tolist(),
        lambda: torch.tensor([1.0]),
    ],
)
def test_what_no_gpu_is_waited_for_is_not(go_on):
    with waits() as noted:
        go_on()
    assert noted.found == []


def test_numbers_of_a_step_arrive_as_they_were():
    values = {
        "loss": torch.tensor(0.1),
        "sums": torch.arange(6, dtype=torch.float64).view(2, 3) / 3,
        "present": (torch.tensor(True), torch.tensor(False)),
        "steps": torch.tensor(2**52 + 1),
        "nan": torch.tensor(float("nan")),
        "gram": None,
    }
    assert Pending(values).read()["sums"] is values["sums"]  # on the host nothing moves
    with fake_gpus() as gpus, pinning("cuda") as pinned:
        there = torch.utils._pytree.tree_map(lambda v: v if v is None else v.to("cuda:1"), values)
        pending = Pending(there)
        assert not pinned.num_waits
        found = pending.read()
        assert pinned.num_waits == 1
        assert list(gpus.used) == [1]
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    assert found["loss"].dtype == torch.float32
    assert found["gram"] is None


def make_samples(shards) -> ImageSamples:
    uri = f"{shards}/cropped/train"
    return ImageSamples(ShardReader(uri, read_index(uri), Cache()), 80)


WHICH = {"start_step": 0, "rank": 0, "num_ranks": 1, "workers": 2, "prefetch": 1}


def test_batches_for_a_gpu_are_pinned_and_those_that_a_cpu_gets(shards):
    samples, order = make_samples(shards), Order(make_samples(shards).group_sizes, 4, 4, 2, seed=0)
    expected = [batch.inputs.clone() for batch in train_batches(samples, order, epoch=0, **WHICH)]
    with pinning("meta") as pinned:
        samples.decode_for(META)
        batches = train_batches(samples, order, epoch=0, device=META, **WHICH)
        for batch, pixels in zip(lend(samples, batches, META), expected, strict=True):
            assert torch.equal(batch.inputs, pixels)
            for tensor in (batch.inputs, batch.valid, *batch.labels):
                assert pinned.is_pinned(tensor)
        assert pinned.num_waits == 1  # at the end


def test_memory_that_a_device_may_still_read_is_not_used_again(shards):
    samples, order = make_samples(shards), Order(make_samples(shards).group_sizes, 4, 4, 2, seed=0)
    with pinning("meta") as pinned:
        pinned.is_over = False
        samples.decode_for(META)
        which = WHICH | {"workers": 0}
        batches = lend(samples, train_batches(samples, order, epoch=0, device=META, **which), META)
        kept = [next(batches).inputs for _ in range(3)]
        copies = [pixels.clone() for pixels in kept]
        addresses = {pixels.data_ptr() for pixels in kept}
        assert len(addresses) == 3
        fourth = next(batches).inputs.data_ptr()
        assert fourth not in addresses
        assert all(torch.equal(pixels, copy) for pixels, copy in zip(kept, copies))
        pinned.is_over = True
        next(batches)
        assert next(batches).inputs.data_ptr() in {*addresses, fourth}
        assert not pinned.num_waits
        batches.close()
        assert pinned.num_waits == 1


def test_a_constant_is_copied_once_for_each_precision_and_may_be_trained_through():
    constant = Constant(torch.tensor([0.1, 0.2], dtype=torch.float64))
    with torch.inference_mode():
        first = constant.like(torch.zeros(1))
    assert constant.like(torch.zeros(5)) is first
    assert first.tolist() == torch.tensor([0.1, 0.2]).tolist()
    assert constant.like(torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
    weights = torch.ones(2, requires_grad=True)
    (weights * first).sum().backward()
    np.testing.assert_allclose(weights.grad, [0.1, 0.2], rtol=1e-6)
