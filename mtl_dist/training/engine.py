"""DeepSpeed, configured from our configuration. The only importer of deepspeed."""

from __future__ import annotations

import logging
import math
import os
from datetime import timedelta

import torch
from torch import nn

from mtl_dist.config import Config
from mtl_dist.training.clipping import Clipper
from mtl_dist.training.overlap import Overlap, overlaps
from mtl_dist.training.rates import Share, check_layers, learning_rate, share_of
from mtl_dist.training.times import name_parts


def build_engine(module: nn.Module, config: Config, *, num_ranks: int, device: torch.device):
    """Wrap `module` (on the CPU) in a DeepSpeed engine. torch.distributed must be initialised."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before the first import: it is read there
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # importing it set INFO again
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for inference: 30 s, a C++ compiler, of no use here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = torch.distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    # The group of all its collectives. One that it makes itself has NCCL's timeout of 10 minutes, whatever ours is.
    groups._WORLD_GROUP = torch.distributed.new_group(timeout=collective_timeout(config))
    # Weights stay contiguous (DeepSpeed broadcasts them as bytes, ZeRO views gradients flat); inputs are channels_last.
    module.to(device)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=build_optimizer(module, config, fused=device.type == "cuda"),
        config=_deepspeed_config(config, num_ranks),
        dist_init_required=False,
    )
    if not config.engine.zero_stage:
        # DeepSpeed's own copies two numbers from the host in every step, which waits for the device.
        engine.clip_fp32_gradients = clipper = Clipper(module.parameters(), config.optim.clip_norm)
        if not config.optim.clip_norm:  # DeepSpeed does not call it
            engine.optimizer.register_step_pre_hook(lambda *step: clipper())
    if overlaps(config, device, num_ranks):
        engine.allreduce_gradients = Overlap(engine)
    name_parts(engine)
    return engine


def gradient_norm(engine) -> torch.Tensor | float | None:
    """Return the norm of all gradients of the last step, before they were clipped, on the device; None: not known."""
    clipper = engine.clip_fp32_gradients
    return clipper.norm if isinstance(clipper, Clipper) else engine.get_global_grad_norm()


def set_accumulation(engine, parts: int) -> None:
    """Have steps of so many micro-batches, from the next one on; what the passes of this one have made is dropped."""
    if engine.gradient_accumulation_steps() != parts:
        rows = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()  # nominal
        micro_batch = math.ceil(rows / parts)
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(micro_batch * parts * engine.dp_world_size)
    engine.micro_steps = 0  # DeepSpeed's step is where their number is divisible


def collective_timeout(config: Config) -> timedelta:
    """Longer than the watchdog waits, which knows who hangs and says so; NCCL's own 10 minutes are not."""
    return timedelta(seconds=max(1800.0, 2 * config.engine.hang_s))


def build_optimizer(module: nn.Module, config: Config, *, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW; only what features are multiplied with is decayed. `fused`: torch's few kernels for all of it."""
    check_layers(module, config)
    groups: dict[tuple[Share, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            share = share_of(name, module, config)
            groups.setdefault((share, is_decayed(module, name)), []).append(parameter)
    groups = [
        {"params": groups[share, decayed], "weight_decay": config.optim.weight_decay * decayed, "share": share}
        for share, decayed in sorted(groups, reverse=True)
    ]
    if config.optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=fused or None)
    momentum = config.optim.momentum
    nesterov = config.optim.nesterov and momentum > 0
    return torch.optim.SGD(groups, lr=config.optim.lr, momentum=momentum, nesterov=nesterov, fused=fused or None)


def is_decayed(module: nn.Module, name: str) -> bool:
    """Whether weight decay is for the parameter of this name: a matrix or kernel that its layer calls a weight.

    Biases, scales of norms and layers, tokens, positions (all of any shape) and log-variances are no weights.
    """
    owner, _, own_name = name.rpartition(".")
    layer = module.get_submodule(owner)
    is_matrix = (own_name.endswith("weight") or own_name.startswith("weight_")) and layer.get_parameter(
        own_name
    ).ndim > 1
    return is_matrix and not isinstance(layer, nn.Embedding) and "norm" not in type(layer).__name__.lower()


def set_learning_rate(engine, config: Config, step: int, total_steps: int) -> float:
    """Give all parameters the learning rate of a step; return the whole one."""
    lr = learning_rate(config, step, total_steps)
    is_frozen = step < config.optim.freeze_backbone_for * total_steps
    for group in engine.optimizer.param_groups:
        share: Share = group["share"]
        group["lr"] = 0.0 if share.waits and is_frozen else lr * share.of_lr
    return lr


def read_optimizer(engine, config: Config) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as "exp_avg/<parameter>" -> whole tensor, whatever the ZeRO stage and ranks.

    All ranks must call it: at ZeRO 1 and 2 every tensor is gathered. A parameter that was never stepped has none.
    """
    keys = _state_keys(config)
    tensors = {}
    for name, parameter in _trained(engine):
        for key in keys:
            if config.engine.zero_stage:
                tensors[f"{key}/{name}"] = parameter.get_full_hp_param(key)
            elif key in engine.optimizer.state.get(parameter, {}):
                tensors[f"{key}/{name}"] = engine.optimizer.state[parameter][key]
    return tensors


def restore_optimizer(engine, config: Config, tensors: dict[str, torch.Tensor], *, steps: int) -> None:
    """Give a new engine the state that `read_optimizer` returned after `steps` steps (0: none), on any number of ranks.

    Must be called for a new run too.
    """
    keys, optimizer = _state_keys(config), engine.optimizer
    if config.engine.zero_stage:
        # Each rank holds slices of the flattened parameter groups. torch would make their state in the first step, and
        # DeepSpeed 0.19.8 links all of it to the parameters after the first *group's*: the second's would be lost.
        for flat in optimizer.single_partition_of_fp32_groups:
            state = {key: torch.zeros_like(flat) for key in keys}
            optimizer.optimizer.state[flat] = _with_steps(state, config, steps)
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in _trained(engine):
        state = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys if f"{key}/{name}" in tensors}
        if config.engine.zero_stage:
            for key, value in state.items():
                parameter.set_full_hp_param(value, key)
        elif state:
            optimizer.state[parameter] = _with_steps(state, config, steps)


def _trained(engine) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _state_keys(config: Config) -> tuple[str, ...]:
    if config.optim.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.optim.momentum else ()


def _with_steps(state: dict[str, torch.Tensor], config: Config, steps: int) -> dict[str, torch.Tensor]:
    """Put AdamW's number of steps beside a parameter's state: on its device, where fused kernels read it."""
    if config.optim.name != "adamw":
        return state
    return state | {"step": torch.tensor(float(steps), device=next(iter(state.values())).device)}


def _deepspeed_config(config: Config, num_ranks: int) -> dict:
    accumulation = config.train.least_parts  # `set_accumulation` has the last word
    micro_batch = math.ceil(config.train.global_batch / (num_ranks * accumulation))
    settings = {
        # Nominal: ranks may hold unequal parts of the global batch, which our losses account for.
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm or 0.0,  # 0: off
        # ZeRO allocates a bucket of float32 in every backward: 0.2 GB, where the default is 2.
        "zero_optimization": {"stage": config.engine.zero_stage, "reduce_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it makes the device wait twice a step
    }
    if config.engine.autocast == "bf16":
        # No module's gradients are added up in bfloat16, as ZeRO would: any stage has the same.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings
