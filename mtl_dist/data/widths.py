"""How many numbers a row of features has: read from the training set, so that nobody has to type it."""

from __future__ import annotations

from mtl_dist.config import Config
from mtl_dist.data.index import read_sets
from mtl_dist.families import FEATURES


def fill_in_widths(config: Config) -> Config:
    """Return the configuration with `model.sequence.dims` of the features that it is to train on.

    It stays as it is where they are given, where the model reads pictures, or where no set is named.
    """
    own = config.model
    if own.backbone != FEATURES or own.sequence.dims or not all(config.data.train or [""]):
        return config
    dims = tuple(extractor.width for extractor in read_sets(config.data.train).extractors)
    sequence = own.sequence.model_copy(update={"dims": dims})
    return config.model_copy(update={"model": own.model_copy(update={"sequence": sequence})})
