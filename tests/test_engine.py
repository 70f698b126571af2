"""DeepSpeed as we configure it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.runtime.engine import build_engine


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize(("clip_norm", "moved"), [(None, 500.0), (1.0, 1.0), (600.0, 500.0)])
def test_gradients_are_clipped_to_the_norm_asked_for_and_not_at_all_without_one(group, zero_stage, clip_norm, moved):
    """The loss is 300 x + 400 y: plain SGD at lr 1 moves the weights by its gradient."""
    optim = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": clip_norm}
    config = build_config({"optim": optim, "engine": {"zero_stage": zero_stage}, "train": {"global_batch": 1}})
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    engine = build_engine(module, config, num_ranks=1, device=torch.device("cpu"))
    engine.backward(engine(torch.tensor([[300.0, 400.0]])).sum() - module.bias.sum())
    engine.step()
    assert float((engine.module.weight.detach() - before).norm()) == pytest.approx(moved, rel=1e-4)
