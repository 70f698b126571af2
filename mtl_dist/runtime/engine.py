"""DeepSpeed, configured from our configuration. The only importer of deepspeed."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from mtl_dist.config import Config

CHECKPOINT_TAG = "engine"


def build_engine(module: nn.Module, config: Config, *, num_ranks: int, device: torch.device):
    """Wrap `module` (on the CPU) in a DeepSpeed engine. torch.distributed must be initialised."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before the first import: it is read there
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # importing it set INFO again
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for inference: 30 s, a C++ compiler, of no use here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = torch.distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    # Weights stay contiguous (DeepSpeed broadcasts them as bytes, ZeRO flattens them); inputs are channels_last.
    module.to(device)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=build_optimizer(module, config),
        config=_deepspeed_config(config, num_ranks),
        dist_init_required=False,
    )
    return engine


def build_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD (Nesterov) or AdamW; biases, norms and log-variances are not decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.optim.lr)
    momentum = config.optim.momentum
    return torch.optim.SGD(groups, lr=config.optim.lr, momentum=momentum, nesterov=momentum > 0)


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to `final_lr` of the peak: a pure function of the step."""
    peak, warmup = config.optim.lr, min(config.optim.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total_steps - warmup, 1)
    return peak * (config.optim.final_lr + (1 - config.optim.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def save_engine(engine, directory: Path) -> None:
    """Write the engine's state of this rank below `directory`. All ranks must call it."""
    engine.save_checkpoint(str(directory), tag=CHECKPOINT_TAG, save_latest=False)
    # A recovery script of DeepSpeed's that nothing here uses.
    for script in directory.rglob("zero_to_fp32.py"):
        script.unlink()


def load_engine(engine, directory: Path) -> None:
    """Load what `save_engine` wrote. DeepSpeed unpickles: only ever give it files whose COMMIT verified."""
    path, _ = engine.load_checkpoint(str(directory), tag=CHECKPOINT_TAG)
    if path is None:  # DeepSpeed's way to say that a file is missing
        raise RuntimeError(f"DeepSpeed found no engine state in {directory}")
    shutil.rmtree(directory, ignore_errors=True)


def _deepspeed_config(config: Config, num_ranks: int) -> dict:
    accumulation = config.train.accumulation
    micro_batch = math.ceil(config.train.global_batch / (num_ranks * accumulation))
    settings = {
        # Nominal: ranks may hold unequal parts of the global batch, which our losses account for.
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.engine.autocast == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings
