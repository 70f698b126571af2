"""What describes pictures: a network by what a user calls it, its identity, and the network itself.

A `Network` is a handful of words that any process opens to the same weights: the best checkpoint of a run is chosen
once, by who begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mtl_dist import storage
from mtl_dist.data.index import Extractor
from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES, min_input_size, objective_of, patch_size
from mtl_dist.features.options import CreateOptions, Pool
from mtl_dist.features.pooling import Pooled
from mtl_dist.models import non_finite
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.face_nets import Embedding
from mtl_dist.models.foreign import load_backbone_weights, load_embedding
from mtl_dist.predicting.members import unique_names
from mtl_dist.runs.checkpoint import MODEL
from mtl_dist.runs.weights import EXPORTED_CONFIG, FILE_SUFFIXES, Weights, is_local_file, load_weights, open_weights

EMBEDDED_SIZE = 112  # pixels a side of what ArcFace embeds, and of files of weights that say no other


class Network(NamedTuple):
    """What describes pictures, by words: it is opened where it is needed."""

    uri: str  # of a checkpoint, an exported directory, or a file of weights
    given: str  # what the user called it
    is_file: bool
    name: str  # backbone and origin, for people
    directory: str  # what its features are called
    backbone: str
    sha256: str  # of its weights
    image_size: int  # pixels a side, that pictures are decoded to
    input_size: int  # and that it reads
    pool: Pool
    train_sha256: str  # of the set whose labels it has seen; empty where it saw none, or that is not known


class FeatureNet(NamedTuple):
    """What makes one set of features: a network, or one for every fold of videos."""

    name: str  # of its directory
    networks: tuple[Network, ...]
    width: int

    @property
    def num_folds(self) -> int:
        """How many folds rows are of; 1: one network for all."""
        return len(self.networks)

    @property
    def extractor(self) -> Extractor:
        """What the index says of it."""
        first = self.networks[0]
        sha256, name = first.sha256, first.name
        if self.num_folds > 1:
            sha256 = hashlib.sha256(json.dumps([network.sha256 for network in self.networks]).encode()).hexdigest()
            name = "; ".join(network.name for network in self.networks)[:1000]
        return Extractor(
            name=name,
            sha256=sha256,
            input_size=first.input_size,
            pool=first.pool,
            width=self.width,
            folds=self.num_folds,
        )


def find_feature_nets(options: CreateOptions) -> list[FeatureNet]:
    """Find, build and check what `--runs` names. Raises `InputError` for what is not there or does not fit."""
    networks = [_find(uri, options) for uri in options.runs]
    for flag, value in (("--backbone", options.backbone), ("--image-size", options.image_size)):
        if value is not None and not any(network.is_file for network in networks):
            raise InputError(f"{flag} is for files of weights, and --runs has none: a run knows its own; leave it out")
    widths = [_width(network) for network in networks]
    if options.folds is None:
        names = options.names or unique_names([network.directory for network in networks])
        return [FeatureNet(*parts) for parts in zip(names, ((network,) for network in networks), widths)]
    first = networks[0]
    for network, width in zip(networks[1:], widths[1:]):
        mine, other = (
            (n.backbone, n.image_size, n.input_size, w) for n, w in ((first, widths[0]), (network, width))
        )  # fmt: skip
        if mine != other:
            raise InputError(
                f"--folds: {first.given} is {_describe(*mine)}, and {network.given} {_describe(*other)}; all folds "
                "need networks of one kind, trained on pictures of one size"
            )
    if len({network.sha256 for network in networks}) < len(networks):
        raise InputError("--folds: two of --runs have the same weights; each fold needs a run that has not seen it")
    return [FeatureNet((options.names or (f"{first.directory}-folds",))[0], tuple(networks), widths[0])]


def build(network: Network) -> Pooled:
    """Open and build a network with its weights on the CPU, in evaluation mode. Raises `InputError`."""
    embedding = Embedding() if network.pool == "embedding" else None
    if network.is_file:
        with _local_file(network) as path:
            try:
                backbone = build_backbone(network.backbone, network.input_size)
                load_backbone_weights(backbone, path, source=network.given)
            except InputError as error:  # the flags of training have longer names
                raise InputError(str(error).replace("--model.", "--")) from None
            if embedding is not None:
                load_embedding(embedding, path, source=network.given)
    else:
        weights = open_weights(network.uri)
        if weights.checkpoint.files[MODEL]["sha256"] != network.sha256:
            raise InputError(f"{network.uri} was replaced meanwhile by other weights; start again")
        backbone = load_weights(weights, objective=FAMILIES[weights.config.model.name].objective).backbone
    if wrong := non_finite(backbone):
        raise InputError(f"{network.given} holds what is not finite ({', '.join(wrong[:3])}); give other weights")
    return Pooled(backbone, network.pool, embedding).eval().requires_grad_(False)


def _width(network: Network) -> int:
    """Return how many numbers it makes of a picture. Raises `InputError` where it has not what the pool takes."""
    pooled = build(network)
    try:
        return pooled.width(network.input_size)
    except InputError as error:
        raise InputError(f"--pool {network.pool}: {network.given}: {error}; take --pool mean") from None


def _find(given: str, options: CreateOptions) -> Network:
    uri = storage.absolute(given.rstrip("/"))
    if is_local_file(uri) or (storage.is_s3(uri) and uri.endswith(FILE_SUFFIXES)):
        return _find_file(given, uri, options)
    weights = open_weights(uri)
    network = _network_of(given, weights, options.pool)
    if network.backbone == "features":
        raise InputError(f"{given} is a model of features, and has no network of pictures; give one that has")
    _check_pool(network)
    return network


def _network_of(given: str, weights: Weights, pool: Pool) -> Network:
    config, checkpoint = weights.config, weights.checkpoint
    is_exported = storage.exists(storage.join(weights.uri, EXPORTED_CONFIG))
    directory = weights.uri.rpartition("/")[2] if is_exported else config.run.name
    return Network(
        uri=weights.uri,
        given=given,
        is_file=False,
        name=f"{config.model.backbone} of {'' if is_exported else 'run '}{directory}, step {checkpoint.step}",
        directory=directory,
        backbone=config.model.backbone,
        sha256=checkpoint.files[MODEL]["sha256"],
        image_size=config.data.image_size,
        input_size=config.input_size,
        pool=pool,
        train_sha256=weights.train_sha256 if objective_of(config.model.name).reads_labels else "",
    )


def _find_file(given: str, uri: str, options: CreateOptions) -> Network:
    if not storage.exists(uri):
        raise InputError(
            f"--runs {given} does not exist; give a run, a checkpoint, an exported directory or a file of weights"
        )
    file_name, backbone, size = uri.rpartition("/")[2], options.backbone, options.image_size or EMBEDDED_SIZE
    if backbone is None:
        raise InputError(
            f"--runs {given} is a file of weights; say with --backbone which network they are of, such as iresnet100"
        )
    if size < min_input_size(backbone) or (patch_size(backbone) and size % patch_size(backbone)):
        raise InputError(
            f"--image-size is {size}, which {backbone} does not read: "
            + (f"give a multiple of {patch_size(backbone)}" if patch_size(backbone) else "give a larger one")
        )
    with _fetched(uri) as path:
        sha256 = storage.sha256_of(path)
    stem = file_name.rpartition(".")[0] or file_name
    name = f"{backbone} of {file_name}"
    network = Network(uri, given, True, name, stem, backbone, sha256, size, size, options.pool, "")
    _check_pool(network)
    return network


def _check_pool(network: Network) -> None:
    if network.pool != "embedding":
        return
    if not network.is_file or not network.backbone.startswith("iresnet"):
        raise InputError(
            f"--pool embedding is for files of insightface's IResNet, and {network.given} is "
            f"{network.backbone}{'' if network.is_file else ' of a run'}; take --pool mean"
        )
    if network.input_size != EMBEDDED_SIZE:
        raise InputError(
            f"--pool embedding is of pictures of {EMBEDDED_SIZE} pixels a side, and --image-size is "
            f"{network.input_size}; give --image-size {EMBEDDED_SIZE}, or --pool mean"
        )


@contextlib.contextmanager
def _local_file(network: Network) -> Iterator[Path]:
    """Give the file of a network's weights. Raises `InputError` where it is not what it was."""
    with _fetched(network.uri) as path:
        if storage.sha256_of(path) != network.sha256:
            raise InputError(f"{network.uri} changed meanwhile; start again")
        yield path


@contextlib.contextmanager
def _fetched(uri: str) -> Iterator[Path]:
    if not storage.is_s3(uri):
        yield storage.local_path(uri)
        return
    with storage.scratch_directory("weights") as scratch:
        path = scratch / uri.rpartition("/")[2]
        storage.download(uri, path)
        yield path


def _describe(backbone: str, image_size: int, input_size: int, width: int) -> str:
    return f"{backbone} of pictures of {image_size} pixels ({input_size} into the network, {width} numbers out)"
