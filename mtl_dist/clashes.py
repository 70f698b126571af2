"""Settings of different sections that cannot go together: each check raises `ValueError`, naming them and a remedy."""

from __future__ import annotations

from typing import get_args

from mtl_dist.families import min_input_size, patch_size, reads_videos
from mtl_dist.model_config import PARTS, ModelConfig
from mtl_dist.sections import (
    EMA,
    AugmentConfig,
    DataConfig,
    EngineConfig,
    GradientBalancing,
    LossConfig,
    RayConfig,
    TrainConfig,
)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def check_images(model: ModelConfig, augment: AugmentConfig, *, size: int) -> None:
    """Check what becomes of images, and that the model can read them: `size` pixels a side."""
    if size < (least := min_input_size(model.backbone)):
        raise ValueError(
            f"the model's input would be {size} pixels a side (data.image_size, or model.image_size); "
            f"the backbone needs {least} at least"
        )
    if (patch := patch_size(model.backbone)) and size % patch:
        raise ValueError(
            f"model.backbone {model.backbone} reads patches of {patch} pixels a side, and images have "
            f"{size} (model.image_size, or data.image_size); give a multiple of it"
        )
    if augment.resize is not None and augment.resize < size:
        raise ValueError(
            f"augment.resize is {augment.resize}, less than the model's input of {size} pixels a "
            "side (data.image_size, or model.image_size), which is cut out of it; make it larger"
        )


def check_losses(loss: LossConfig, model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """Check that every epoch trains something, and that what is weighed or fed is trained."""
    if loss.va_after and loss.va_after >= train.epochs:
        raise ValueError(
            f"loss.va_after is {loss.va_after} and train.epochs {train.epochs}: no epoch is left for VA; "
            "give more epochs, or loss.va 0"
        )
    if loss.va_after and not (loss.expr or loss.au):
        raise ValueError("loss.va_after is given, and nothing but VA has a weight: its first epochs train nothing")
    if loss.balancing in get_args(GradientBalancing) and data.sampling == "per_task":
        raise ValueError(
            f"loss.balancing is {loss.balancing}, which compares the tasks' gradients of the same rows, and "
            "data.sampling per_task, which gives every task rows of its own; change one of them"
        )
    for source in model.sequence.feed_source if reads_videos(model.name) else ():
        if not loss.weight(PARTS[source]):
            raise ValueError(
                f"model.sequence.feed_source has {source}, and loss.{PARTS[source]} is 0: what it feeds would be "
                "untrained; give that loss a weight, or leave the source out"
            )
    if loss.teacher:
        _check_teacher(loss, data, train)


def _check_teacher(loss: LossConfig, data: DataConfig, train: TrainConfig) -> None:
    if loss.teacher == EMA and not train.ema:
        raise ValueError(
            "loss.teacher is ema, the run's own average of weights, and train.ema is 0: there is none; set it, such as "
            "to 0.999, or give a run as the teacher"
        )
    if loss.teacher_after >= train.epochs:
        raise ValueError(
            f"loss.teacher_after is {loss.teacher_after} and train.epochs {train.epochs}: no epoch is left for the "
            "teacher; give more epochs, or begin earlier"
        )
    if data.sampling == "per_task":
        raise ValueError(
            "loss.teacher stands where labels are missing, and data.sampling per_task hides labels that are there, of "
            "all tasks but one in every row; change one of them"
        )


def check_order(data: DataConfig, train: TrainConfig, model: ModelConfig) -> None:
    """Check what is read, by a run, an epoch and a step."""
    _check_balance(data, model)
    if data.fold and data.val:
        raise ValueError(
            f"data.fold is {data.fold}, which validates on a part of data.train, and data.val is "
            f"{' '.join(data.val)}; leave one of them out"
        )
    if data.streams is not None and train.global_batch % data.streams:
        raise ValueError(
            f"data.streams {data.streams} does not divide train.global_batch {train.global_batch}: every stream gives "
            f"the same number of samples to a step; use one of {divisors(train.global_batch)}"
        )
    if data.mix and data.sampling == "per_task":
        raise ValueError(
            "data.mix says what a step has of each set, and data.sampling per_task what it has of each task; "
            "change one of them"
        )
    if data.mix and data.streams is not None:
        raise ValueError("data.streams is for one order, and with data.mix every set has its own; leave it out")
    if train.stop_epoch and train.stop_epoch > train.epochs:
        raise ValueError(
            f"train.stop_epoch is {train.stop_epoch} and train.epochs {train.epochs}: training ends "
            "before it; give a smaller one, or leave it out"
        )


def _check_balance(data: DataConfig, model: ModelConfig) -> None:
    """Check that the rows of an epoch can be drawn by their classes."""
    if data.balance == "none":
        return
    if data.sampling == "per_task":
        raise ValueError(
            f"data.balance is {data.balance}, which draws one batch for all tasks, and data.sampling per_task gives "
            "every task a batch of its own; change one of them"
        )
    if data.mix:
        raise ValueError(
            f"data.balance is {data.balance}, which says how often a row comes, and data.mix how often those of a set "
            "do; change one of them"
        )
    if reads_videos(model.name):
        raise ValueError(
            f"data.balance is {data.balance}, which draws single pictures, and model.name {model.name} reads windows "
            "of videos; leave it out"
        )


def check_compiled(engine: EngineConfig, loss: LossConfig) -> None:
    """Check that what is compiled is run: not where every step looks inside the model."""
    if engine.compile and loss.balancing in get_args(GradientBalancing):
        raise ValueError(
            f"engine.compile is set, and loss.balancing {loss.balancing} takes the model apart in every step, which a "
            "compiled one does not allow; leave engine.compile out, or choose fixed, uncertainty, dwa or famo"
        )


def check_ranks(ray: RayConfig, engine: EngineConfig, *, streams: int) -> None:
    """Check that ranks have what each needs: `streams` of the order, one at least, and a device."""
    if ray.gpus_per_rank not in (0, 1):
        raise ValueError(f"ray.gpus_per_rank is {ray.gpus_per_rank:g}; a rank computes on one GPU: 0 or 1")
    if engine.device == "cpu" and ray.gpus_per_rank:
        raise ValueError("engine.device is cpu and ray.gpus_per_rank is not 0; change one of them")
    if streams < ray.num_ranks[1]:
        raise ValueError(
            f"ray.num_ranks goes up to {ray.num_ranks[1]} but there are {streams} streams (data.streams, a "
            "divisor of train.global_batch): a rank needs one at least"
        )
