"""Nothing stays on the host that a GPU computes with, and GPUs predict what the CPU does.

A GPU refuses to mix its tensors with the host's. So do, on any machine, torch's "meta" device, which has gradients and
shapes, for steps; and the GPUs of tests/fake_gpus.py, which have numbers, for predictions.
"""

import contextlib
import json
import os
from typing import get_args

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from mtl_dist.config import build_config
from mtl_dist.data.augment import build_preparation, normalise
from mtl_dist.ensemble import __main__ as ensemble
from mtl_dist.families import FAMILIES
from mtl_dist.label_counts import LabelCounts
from mtl_dist.models import build_model
from mtl_dist.objective.gradients import SOLVERS
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.predict import __main__ as predict
from mtl_dist.predicting import spread as parts
from mtl_dist.presets import PRESETS
from mtl_dist.runs.checkpoint import committed
from mtl_dist.sections import LossConfig
from mtl_dist.settings import unflatten
from mtl_dist.tasks import Batch, Labels, Outputs
from mtl_dist.training.engine import build_engine, build_optimizer
from mtl_dist.training.step import train_step
from tests import fake_gpus as gpus_that_are_not
from tests.fake_gpus import fake_gpus

pytestmark = pytest.mark.whole

SYSTEMS = ("a", "b", "baseline", "a-paper", "b-paper")
BACKBONES = ("timm:convnext_femto", "timm:vit_tiny_patch16_224", "torchvision:swin_t", "timm:efficientnet_b0")
# Those that see gradients wait for the device: they solve for their weights on the host.
BALANCERS = [way for way in get_args(LossConfig.model_fields["balancing"].annotation) if way not in SOLVERS]
STEPS = [(system, {}) for system in SYSTEMS]
STEPS += [("small", {"loss.balancing": way, "train.accumulation": n}) for way in BALANCERS for n in (1, 2)]
STEPS += [("small", {"data.sampling": "per_task", "train.accumulation": 2, "augment.hue": 0.1, "augment.erase": 0.5})]
ROWS, IMAGE_SIZE = 6, 112
COUNTS = LabelCounts(rows=9, va=9, expr=9, au=[9] * 12, expr_classes=[2] + [1] * 7, au_positives=[3] * 12, unlabelled=0)


def make_batch():
    shape = (ROWS, 1)
    masks = torch.ones(shape, dtype=bool), torch.ones(shape, dtype=bool), torch.ones(*shape, 12, dtype=bool)
    labels = Labels(torch.zeros(*shape, 2), torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 12), *masks)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (*shape, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    return Batch(inputs, torch.ones(shape, dtype=bool), labels, torch.arange(ROWS)[:, None], torch.arange(ROWS))


def make_config(system, **changes):
    return build_config(
        unflatten({**PRESETS[system], "data.train": "t", "data.val": "v", "model.weights": "none", **changes})
    )


def make_module(config):
    passes = 3 if config.data.sampling == "per_task" else 1
    model, objective = build_model(config.model, input_size=config.input_size), build_objective(config, COUNTS)
    return ObjectiveModule(
        model, objective, balancing=config.loss.balancing, passes=passes, shared=FAMILIES[config.model.name].shared
    )


class Engine:
    """DeepSpeed's part of a step, without DeepSpeed, which knows no such device."""

    def __init__(self, module, config):
        self.module, self.optimizer = module, build_optimizer(module, config)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # unknown to "meta"


@pytest.mark.parametrize(("system", "changes"), STEPS)
def test_a_step_computes_on_the_device_alone(system, changes, no_autocast):
    config = make_config(system, **changes)
    module = make_module(config).to("meta")
    how = {"prepare": build_preparation(config), "epoch": 0, "step": 0, "rank": 0}
    loss = train_step(Engine(module, config), make_batch(), config, **how)
    for tensor in (loss.total, *loss.weights.values(), *loss.terms.values(), *loss.present.values()):
        assert tensor.device.type == "meta"


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


@no_gpu
@pytest.mark.parametrize(
    ("system", "backbone", "autocast"),
    [(s, None, cast) for s in SYSTEMS for cast in ("none", "bf16")] + [("a", b, "none") for b in BACKBONES],
)
def test_the_second_gpu_computes_what_the_cpu_does(system, backbone, autocast):
    changes = {"model.backbone": backbone, "model.image_size": 224} if backbone else {}
    config, batch = make_config(system, **changes), make_batch()
    module, found, bf16 = make_module(config).eval(), {}, autocast == "bf16"
    for name in ("cpu", "cuda:1"):
        device = torch.device(name)
        with fake_gpus(2) if name != "cpu" else contextlib.nullcontext() as gpus, torch.no_grad():
            module.to(device)
            there = batch.to(device)
            there = there._replace(inputs=normalise(there.inputs, config.input_size))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                sums, outputs = module.sums(there), module.model(there.inputs, there.valid)
            assert {tensor.device for tensor in (*sums.values(), *outputs)} == {device}
            assert {tensor.dtype for tensor in sums.values()} == {torch.float64}
            assert (torch.bfloat16 in {tensor.dtype for tensor in outputs}) == bf16
            found[name] = {key: tensor.double().cpu() for key, tensor in zip(Outputs._fields, outputs)}
    assert list(gpus.used) == [1]
    # Which operations are in bf16 is not the same on CPUs.
    assert_close(found["cuda:1"], found["cpu"], rtol=0, atol=0.05 if bf16 else 1e-5)


def outputs_of(path):
    table = (pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table)(path)
    assert table.num_rows
    numbers = [name for name in table.column_names if name.startswith(("p_", "valence", "arousal"))]
    return table["image"].to_pylist(), np.stack([table[name].to_numpy() for name in numbers])


@no_gpu
def test_predict_gives_each_gpu_a_process_and_writes_what_the_cpu_does(runs, dataset, tmp_path, monkeypatch):
    faces = dataset / "cropped"
    first, last = (checkpoint.uri for checkpoint in committed(str(runs / "cropped"))[0])
    args = ["--runs", first, last, "--input", str(faces), "--batch", "5"]
    predict.main([*args, "--out", str(tmp_path / "cpu.csv"), "--device", "cpu"])
    monkeypatch.setattr(parts, "_part_main", gpus_that_are_not.part_main)
    monkeypatch.setenv("FAKE_GPUS", "2")
    monkeypatch.setenv(gpus_that_are_not.USED_DIR, str(tmp_path))
    with fake_gpus(2) as gpus:
        predict.main([*args, "--out", str(tmp_path / "cuda.csv"), "--device", "cuda"])
    assert not gpus.used  # nothing is left on a GPU by the process that waits
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert [(part["current"], part["used"]) for part in told] == [(0, [0]), (1, [1])]
    assert len({os.getpid(), *(part["pid"] for part in told)}) == 3
    (names, mine), (same_names, theirs) = outputs_of(tmp_path / "cuda.csv"), outputs_of(tmp_path / "cpu.csv")
    assert names == same_names
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@no_gpu
def test_an_ensemble_on_a_gpu_writes_what_the_cpu_does(runs, tmp_path):
    args = ["--runs", str(runs / "cropped"), str(runs / "cropped_aligned"), "--local", "--steps", "weights"]
    for device in ("cpu", "cuda"):
        with fake_gpus() if device == "cuda" else contextlib.nullcontext() as gpus:
            ensemble.main([*args, "--out", str(tmp_path / device), "--device", device])
    assert list(gpus.used) == [0]
    mine, theirs = (outputs_of(tmp_path / device / "predictions.parquet")[1] for device in ("cuda", "cpu"))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@no_gpu
@pytest.mark.parametrize(("device", "forgotten"), [("meta", "cpu"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_a_forgotten_tensor_is_refused(device, forgotten):
    with fake_gpus(2):
        left, moved = torch.full((3,), 2.0, device=forgotten), torch.ones(3).to(device)
        with pytest.raises(RuntimeError, match="device"):
            moved * left


@no_gpu
def test_these_gpus_refuse_what_a_gpu_refuses():
    with fake_gpus(2):
        here, there = torch.ones(3, device="cuda"), torch.ones(3).to("cuda:1")
        for wrong in (
            lambda: torch.cat([here, there]),
            lambda: here.add_(torch.ones(3)),
            lambda: nn.Linear(3, 1)(there),
            lambda: here.to("cuda:2"),
            lambda: here.numpy(),
        ):
            with pytest.raises(RuntimeError):
                wrong()


def test_deepspeeds_collectives_wait_as_long_as_ours(monkeypatch):
    """A group that DeepSpeed makes itself has NCCL's 10 minutes: ranks would abort before the watchdog names one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = make_config("small", **{"engine.hang_s": 7200.0})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        build_engine(make_module(config), config, num_ranks=1, device=torch.device("cpu"))
        from deepspeed.utils import groups

        backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 14400
    finally:
        dist.destroy_process_group()
