"""Gradients that are added up over ranks while the backward pass goes on."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.training import engine as engines
from mtl_dist.training.engine import build_engine, set_accumulation
from mtl_dist.training.overlap import Overlap, make_buckets, overlaps
from mtl_dist.unread import check_read
from tests.ranks import start_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
fast = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("layer", "device", "num_ranks", "expected"),
    [
        ({}, GPU, 2, True),
        ({}, GPU, 1, False),
        ({}, CPU, 2, False),
        ({"overlap": False}, GPU, 2, False),
        ({"zero_stage": 1}, GPU, 2, False),
        ({"batchnorm": "sync"}, GPU, 2, False),
    ],
)
def test_several_gpus_overlap_at_zero_0(layer, device, num_ranks, expected):
    assert overlaps(build_config({"engine": layer}), device, num_ranks) == expected


@pytest.mark.parametrize("layer", [{"zero_stage": 1}, {"device": "cpu"}])
def test_where_nothing_overlaps_the_setting_is_refused(layer):
    check_read(build_config({"engine": {"overlap": False}}))
    with pytest.raises(InputError, match=r"engine\.overlap is False, and nothing reads it: "):
        check_read(build_config({"engine": {"overlap": False, **layer}}))


@fast
@given(sizes=SIZES, most=st.integers(1, 20))
def test_every_parameter_is_in_one_bucket_from_the_last_to_the_first(sizes, most):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    buckets = make_buckets(parameters, most)
    assert [id(each) for bucket in buckets for each in bucket] == [id(each) for each in reversed(parameters)]
    assert all(len(bucket) == 1 or sum(each.numel() for each in bucket) <= most for bucket in buckets)


class Added(SimpleNamespace):
    """A group's sums of one rank, which are what they were."""

    def wait(self) -> None: ...


@fast
@given(data=st.data(), sizes=SIZES, most=st.integers(1, 20))
def test_whatever_order_gradients_are_made_in_buckets_are_added_up_in_theirs(data, sizes, most):
    """And whatever parameters have none: every rank has to add up the same."""
    module = nn.ParameterList(torch.full((size,), float(number)) for number, size in enumerate(sizes))
    order = data.draw(st.permutations(list(module)))[: data.draw(st.integers(1, len(sizes)))]
    engine = SimpleNamespace(module=module, seq_data_parallel_group=None)
    engine.is_gradient_accumulation_boundary = lambda: True
    overlap, sent = Overlap(engine, most), []

    def all_reduce(flat, **how):
        sent.append(len(flat))
        return Added()

    expected = [sum(each.numel() for each in bucket) for bucket in make_buckets(list(module), most)]
    with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(dist, "get_world_size", return_value=2):
        for _ in range(2):
            module.zero_grad()
            sent.clear()
            sum(parameter.sum() * (place + 1) for place, parameter in enumerate(order)).backward()
            if len(order) == len(sizes):
                assert sent == expected  # before the pass was over
            overlap()
            assert sent == expected
            for parameter in module:
                place = next((place for place, each in enumerate(order) if each is parameter), -1)
                assert parameter.grad.tolist() == [(place + 1) / 2] * parameter.numel()


class Branches(nn.Module):
    """Two branches of one trunk, and a layer that nobody reads: its buckets are the last, so others go before.

    A rank without rows passes them in another order.
    """

    def __init__(self):
        super().__init__()
        self.unread, self.trunk, self.one, self.other = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, rows):
        if not len(rows):
            return 0.0 * sum(own.sum() for part in (self.one, self.trunk, self.other) for own in part.parameters())
        hidden = self.trunk(rows).relu()
        return self.one(hidden).square().mean() + (self.other(hidden.tanh()) * hidden).sum()


def train(rank: int, num_ranks: int, layer: dict, *, overlap: bool, rows_of: list[int]) -> list[torch.Tensor]:
    """Train a few steps of as many rows a rank; return the weights."""
    torch.manual_seed(0)
    module, parts = Branches(), layer.get("train", {}).get("accumulation", 1)
    config = build_config({"train": {"global_batch": 8}, "optim": {"lr": 0.1, "clip_norm": 1.0}}, layer)
    made: list[Overlap] = []

    def make(engine) -> Overlap:
        made.append(Overlap(engine, most=30))
        made[0]._send = mock.Mock(side_effect=made[0]._send)
        return made[0]

    with mock.patch.object(engines, "overlaps", return_value=overlap), mock.patch.object(engines, "Overlap", make):
        engine = build_engine(module, config, num_ranks=num_ranks, device=CPU)
    engines.restore_optimizer(engine, config, {}, steps=0)
    for step in range(3):
        set_accumulation(engine, parts)
        for part in range(parts):
            generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
            engine.backward(engine(torch.randn(rows_of[rank], 5, generator=generator)))
            engine.step()
    assert [each._send.call_count for each in made] == ([3 * len(made[0]._buckets)] if overlap else [])
    return [parameter.detach().clone() for parameter in module.parameters()]


PARTS = {"train": {"accumulation": 2}}
CASES = [({}, [4, 4]), (PARTS, [3, 5]), ({}, [8, 0]), (PARTS, [0, 8])]


def compare(rank: int, num_ranks: int, init_file: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))  # DeepSpeed asks for them
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=num_ranks)
    for layer, rows_of in CASES:
        found, expected = (train(rank, num_ranks, layer, overlap=overlap, rows_of=rows_of) for overlap in (True, False))
        assert all(torch.equal(one, other) for one, other in zip(found, expected)), (layer, rows_of)
    dist.destroy_process_group()


@pytest.mark.whole
def test_two_ranks_train_as_they_do_without_to_the_last_bit(tmp_path):
    """With clipping, in micro-batches, with a layer without gradients, and where a rank has no rows."""
    start_ranks(compare, (2, str(tmp_path / "store")), 2)
