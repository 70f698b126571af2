"""The weights a run's backbone starts with: `model.weights`, a file or what `open_weights` takes, local or on s3://."""

from __future__ import annotations

from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.errors import InputError
from mtl_dist.models import build_model, non_finite
from mtl_dist.models.backbones import check_backbone
from mtl_dist.runs.checkpoint import MODEL, on_rank_0
from mtl_dist.runs.weights import open_weights

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # a run's name may hold dots too


def check_pretrained(config: Config) -> None:
    """Raise `InputError` for an unknown backbone, or weights that are not there. Builds and downloads nothing."""
    weights = "none" if config.run.start else config.model.weights
    check_backbone(config.model.backbone, imagenet=weights == "imagenet")
    if weights in ("none", "imagenet"):
        return
    uri = find_weights(weights)[0]
    if not storage.exists(uri):
        raise _not_there(uri)


def build_pretrained(config: Config) -> nn.Module:
    """Build the configured model with the weights that it names. Raises `InputError`."""
    model = _build(config)
    if wrong := non_finite(model):
        raise InputError(
            f"model.weights {config.model.weights} holds what is not finite ({', '.join(wrong[:3])}); give others"
        )
    return model


def _build(config: Config) -> nn.Module:
    weights = config.model.weights
    if weights in ("none", "imagenet") or _is_local_file(weights):
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size)
    # Rank 0 chooses: the best checkpoint of a run that still trains may be another one a second later. Nodes may have
    # the run at paths of their own.
    place, sha256 = on_rank_0(lambda: _place_of_weights(weights))
    uri = weights.rstrip("/") + place
    with storage.scratch_directory("weights") as scratch:
        path = scratch / uri.rpartition("/")[2]
        try:
            storage.download(uri, path)
        except FileNotFoundError:
            raise _not_there(uri) from None
        if sha256 and storage.sha256_of(path) != sha256:
            raise InputError(f"model.weights {uri} is damaged: its sha256 is not what its checkpoint says")
        return build_model(config.model, seed=config.run.seed, input_size=config.input_size, weights_file=path)


def _place_of_weights(weights: str) -> tuple[str, str | None]:
    """Return the file to read as what comes after `weights`, and its sha256 where that is known."""
    uri, sha256 = find_weights(weights)
    return storage.absolute(uri).removeprefix(storage.absolute(weights.rstrip("/"))), sha256


def find_weights(uri: str) -> tuple[str, str | None]:
    """Return the file to read for a URI, and its sha256 where that is known. Of a run it is the best checkpoint's."""
    uri = uri.rstrip("/")
    if _is_local_file(uri) or (storage.is_s3(uri) and (uri.endswith(FILE_SUFFIXES) or storage.exists(uri))):
        return uri, None
    checkpoint = open_weights(uri).checkpoint
    return storage.join(checkpoint.uri, MODEL), checkpoint.files[MODEL]["sha256"]


def _is_local_file(uri: str) -> bool:
    """Whether a URI is of a file here, which need not exist, and not of a directory or an object."""
    return not storage.is_s3(uri) and not storage.local_path(uri).is_dir()


def _not_there(uri: str) -> InputError:
    return InputError(
        f"model.weights {uri} does not exist; give a state dict, a run or checkpoint of ours, imagenet or none"
    )
