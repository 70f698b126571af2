"""The whole configuration tree. The same dotted paths serve flags (`--optim.lr`), YAML and the search space.

Precedence: preset < `--config FILE` < flags. Everything is frozen and unknown keys are refused with the nearest name.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from mtl_dist import clashes, sections
from mtl_dist.model_config import ModelConfig
from mtl_dist.settings import Section, check_keys, merge

MAX_AUTO_STREAMS = 64


class Config(Section):
    run: sections.RunConfig = sections.RunConfig()
    data: sections.DataConfig = sections.DataConfig()
    augment: sections.AugmentConfig = sections.AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: sections.LossConfig = sections.LossConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    engine: sections.EngineConfig = sections.EngineConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    ray: sections.RayConfig = sections.RayConfig()

    @model_validator(mode="after")
    def _goes_together(self):
        clashes.check_images(self.model, self.augment, size=self.input_size)
        clashes.check_losses(self.loss, self.model, self.data, self.train)
        clashes.check_order(self.data, self.train, self.model)
        clashes.check_compiled(self.engine, self.loss)
        clashes.check_ranks(self.ray, self.engine, streams=self.num_streams)
        return self

    @property
    def last_epoch(self) -> int:
        """After how many epochs training ends: of train.epochs, or at train.stop_epoch."""
        return min(self.train.stop_epoch or self.train.epochs, self.train.epochs)

    @property
    def num_streams(self) -> int:
        """Canonical streams of the order: as configured, or the largest divisor of the batch up to 64.

        With data.mix every set has streams of its own; here they count as many as a step has samples.
        """
        if self.data.streams is not None:
            return self.data.streams
        if self.data.mix:
            return self.train.global_batch
        return max(d for d in clashes.divisors(self.train.global_batch) if d <= MAX_AUTO_STREAMS)

    @property
    def input_size(self) -> int:
        """Side in pixels of the images that the model sees."""
        return self.model.image_size or self.data.image_size


def build_config(*layers: dict[str, Any]) -> Config:
    """Merge nested dicts, later ones first in rank, and validate. Raises `InputError` naming key, value and remedy."""
    merged: dict[str, Any] = {}
    for layer in layers:
        check_keys(layer, Config, path="")
        merge(merged, layer)
    return Config(**merged)
