"""DeepSpeed as we configure it, and with what a run goes on."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.reader import ShardReader
from mtl_dist.runtime.checkpoint import MODEL, TRAIN, committed, read_state, read_tensors
from mtl_dist.runtime.engine import build_engine
from mtl_dist.runtime.lives import begin_life, read_lives
from mtl_dist.runtime.loop import fit
from mtl_dist.runtime.plan import build_order, open_data
from mtl_dist.runtime.saving import Saver
from tests.test_recipes import EVERY_STEP, PER_TASK, Context, config_of
from tests.test_training import cut_back


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


@pytest.mark.parametrize("recipe", [{}, PER_TASK])
def test_a_run_begun_with_the_old_order_continues_with_it_and_a_new_one_has_the_new(recipe, shards, tmp_path, group):
    config = config_of(shards, tmp_path, "run", recipe, EVERY_STEP, {"train": {"epochs": 1, "eval_batch": 20}})
    fit(config, Context(0, 1, "first"))
    begun = committed(config.run.uri)[0][0]
    state = read_state(begun)
    assert state.pop("order") == 2
    tensors = [read_tensors(begun, name) for name in (MODEL, TRAIN)]
    cut_back(tmp_path, "run", 0)  # what is left is a checkpoint as earlier versions made it
    life = begin_life(config.run.uri, command="second", num_ranks=1)
    with Saver(config.run.uri, config.checkpoint, life=life) as saver:
        saver.save(*tensors, begun=0.0, state=state, scores={}, records={})
    fit(config, Context(0, 1, "third"))
    assert read_state(committed(config.run.uri)[0][-1])["order"] == 1

    data, reader = open_data(config), ShardReader(config.data.train, read_index(config.data.train), Cache())
    order = build_order(config, data, reader)
    first, *_, last = (life["life"] for life in read_lives(config.run.uri))
    for life, version in ((first, 2), (last, 1)):
        plan = order.of_version(version).plan(epoch=0, rank=0, num_ranks=1)
        (audit,) = (tmp_path / "audit" / "run").glob(f"{life}-*")
        for line in map(json.loads, audit.read_text().splitlines()):
            expected = reader.names().rows[plan.samples_of(line["step"] - 1, 1)[0]]
            assert [row for rows in line["rows"].values() for row in rows] == expected.tolist()
