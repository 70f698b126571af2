"""The weights a run's backbone starts with: `model.weights` may be a file, a run or a checkpoint, local or on s3://."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.errors import InputError
from mtl_dist.models import build_model
from mtl_dist.runtime.checkpoint import DIRECTORY, MODEL
from mtl_dist.runtime.members import open_checkpoint


def build_pretrained(config: Config) -> nn.Module:
    """Build the configured model with the weights that it names. Raises `InputError`."""
    weights = config.model.weights
    if weights in ("none", "imagenet") or (not storage.is_s3(weights) and not storage.local_path(weights).is_dir()):
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size)
    uri, sha256 = find_weights(weights)
    with tempfile.TemporaryDirectory(prefix="mtl_dist-weights-") as scratch:
        path = Path(scratch) / uri.rpartition("/")[2]
        try:
            storage.download(uri, path)
        except FileNotFoundError:
            raise InputError(
                f"model.weights {uri} does not exist; give a state dict, a run or checkpoint of ours, imagenet or none"
            ) from None
        if sha256 and storage.sha256_of(path) != sha256:
            raise InputError(f"model.weights {uri} is damaged: its sha256 is not what its checkpoint says")
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size, weights_file=path)


def find_weights(uri: str) -> tuple[str, str | None]:
    """Return the file to read for a URI, and its sha256 where that is known. Of a run it is the best checkpoint's."""
    uri = uri.rstrip("/")
    name = uri.rpartition("/")[2]
    if DIRECTORY.fullmatch(name):
        return storage.join(uri, MODEL), None
    if storage.is_s3(uri) and (Path(name).suffix or storage.exists(uri)):
        return uri, None
    checkpoint, _ = open_checkpoint(uri)
    return storage.join(checkpoint.uri, MODEL), checkpoint.files[MODEL]["sha256"]
