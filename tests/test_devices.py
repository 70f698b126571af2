"""Nothing stays on the host that a GPU computes with: steps and predictions on devices that compute nothing.

A GPU refuses to mix its tensors with the host's, and so do torch's "meta" device, which has shapes only, and its fake
CUDA tensors. They show on any machine what a model, loss or balancer forgot to move.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl_dist.config import build_config, unflatten
from mtl_dist.data.augment import normalise
from mtl_dist.models import build_model
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.presets import PRESETS
from mtl_dist.runtime.engine import build_engine, build_optimizer
from mtl_dist.runtime.step import train_step
from mtl_dist.tasks import Batch, LabelCounts, Labels

SYSTEMS = ("a", "b", "baseline", "a-paper", "b-paper")
BACKBONES = ("torchvision:convnext_tiny", "torchvision:vit_b_16", "torchvision:swin_t", "timm:efficientnet_b0")
BALANCERS = ("fixed", "uncertainty", "dwa", "famo")
STEPS = [(system, {}) for system in SYSTEMS]
STEPS += [("small", {"loss.balancing": way, "train.accumulation": n}) for way in BALANCERS for n in (1, 2)]
STEPS += [("small", {"data.sampling": "per_task", "train.accumulation": 2, "augment.hue": 0.1, "augment.erase": 0.5})]
ROWS, IMAGE_SIZE = 6, 112
COUNTS = LabelCounts(rows=9, va=9, expr=9, au=[9] * 12, expr_classes=[2] + [1] * 7, au_positives=[3] * 12, unlabelled=0)


def make_batch():
    shape = (ROWS, 1)
    masks = torch.ones(shape, dtype=bool), torch.ones(shape, dtype=bool), torch.ones(*shape, 12, dtype=bool)
    labels = Labels(torch.zeros(*shape, 2), torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 12), *masks)
    inputs = torch.zeros(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    return Batch(inputs, torch.ones(ROWS, dtype=torch.int64), labels, torch.arange(ROWS)[:, None])


def make_config(system, **changes):
    return build_config(
        unflatten({**PRESETS[system], "data.train": "t", "data.val": "v", "model.weights": "none", **changes})
    )


def make_module(config):
    passes = 3 if config.data.sampling == "per_task" else 1
    return ObjectiveModule(build_model(config.model, input_size=config.input_size), config.loss, COUNTS, passes=passes)


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


def to_fake_gpu(module):
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(tensor, device="cuda"), requires_grad=False
                )
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty_like(tensor, device="cuda")
    return module


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # unknown to "meta"


@pytest.mark.parametrize(("system", "changes"), STEPS)
def test_a_step_computes_on_the_device_alone(system, changes, no_autocast):
    config = make_config(system, **changes)
    module = make_module(config).to("meta")
    loss = train_step(
        Engine(module, config), make_batch(), config, epoch=0, step=0, device=torch.device("meta"), rank=0
    )
    for tensor in (loss.total, loss.weights, *loss.tasks.values(), *loss.present.values()):
        assert tensor.device.type == "meta"


@pytest.fixture
def autocast_of_gpus(monkeypatch):
    """torch leaves it out where it sees no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)


@pytest.mark.parametrize("autocast", ["none", "bf16"])
@pytest.mark.parametrize(("system", "backbone"), [(s, None) for s in SYSTEMS] + [("a", b) for b in BACKBONES])
def test_predictions_and_sums_compute_on_a_gpu_alone(system, backbone, autocast, autocast_of_gpus):
    changes = {"model.backbone": backbone, "model.image_size": 224} if backbone else {}
    config, batch = make_config(system, **changes), make_batch()
    module = make_module(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake_gpu(module)
        inputs = normalise(batch.inputs.to("cuda"), config.input_size)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast == "bf16"):
            sums = module.sums(inputs, batch.labels.to("cuda"))
            outputs = module.model.eval()(inputs)
    assert {tensor.device.type for tensor in (*sums, *outputs)} == {"cuda"}
    assert {tensor.dtype for tensor in sums} == {torch.float64}
    assert (torch.bfloat16 in {tensor.dtype for tensor in outputs}) == (autocast == "bf16")


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_forgotten_tensor_is_refused(device):
    forgotten, moved = torch.full((3,), 2.0), torch.ones(3)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else contextlib.nullcontext()
    with fake, pytest.raises(RuntimeError, match="device"):
        moved.to(device) * forgotten


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
