"""Pictures to features: batches of a fixed size, decoded ahead, each computed on one thread or the GPU.

So a feature depends on the weights, on the picture and on how its shard's rows were cut into batches, which is the same
every time: not on the number of processes or threads, or on what ran before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import ahead
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.samples import ImageSamples
from mtl_dist.device import is_out_of_memory
from mtl_dist.errors import InputError
from mtl_dist.features.extractors import Network, build
from mtl_dist.features.pooling import Pooled
from mtl_dist.machine import allow_open_files
from mtl_dist.tasks import Batch

LARGEST = 6e4  # what float16 holds: up to 65,504
VANISHING = 6e-8  # what it has no number for
AHEAD = 2  # batches that wait for each thread


class Source(NamedTuple):
    """A set of pictures, for any process that reads it."""

    uri: str
    sha256: str
    cache_dir: Path | None


class How(NamedTuple):
    """How features are computed."""

    device: str  # cpu or cuda
    batch: int
    bf16: bool
    threads: int  # that compute
    workers: int  # that decode


class Described(NamedTuple):
    """Features of some rows of a shard."""

    places: np.ndarray  # (k,) int64 of the rows
    features: np.ndarray  # (k, D) float16
    num_vanished: int  # numbers that are not 0, and are in float16


def describe(
    source: Source, samples: np.ndarray, parts: list[tuple[tuple[Network, ...], np.ndarray]], how: How, rows: np.ndarray
) -> Iterator[Described]:
    """Yield features of samples (n,), in batches.

    Each of `parts` is what describes some of them, by their places: a network, or several whose mean is taken. `rows`
    (n,) are what messages call them. Raises `InputError` for features that float16 does not hold, and for batches that
    memory does not hold: smaller ones are those of another set.
    """
    pictures = _open_pictures(source, parts[0][0][0].image_size)
    device = torch.device(how.device)
    loads = _batches(pictures, samples, parts, how.batch)
    models = {network: _opened(network, how.device) for networks, _ in parts for network in networks}

    def compute(loaded: _Loaded) -> Described:
        try:
            return _compute(loaded, [models[network] for network in loaded.networks], pictures, how, device, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"out of memory with {how.batch} pictures in a batch, on {how.threads} thread(s): give a smaller "
                "--batch, and another DEST where some shards are made; or fewer --jobs"
            ) from None

    with contextlib.closing(ahead(loads, workers=how.workers, prefetch=AHEAD * (how.threads + how.workers))) as batches:
        calls = (functools.partial(compute, loaded) for loaded in batches)
        # One thread is this one: a GPU gets its batches in one stream.
        yield from ahead(calls, workers=how.threads if how.threads > 1 else 0, prefetch=AHEAD * how.threads)


class _Loaded(NamedTuple):
    batch: Batch
    places: np.ndarray
    networks: tuple[Network, ...]


class _Opened(NamedTuple):
    network: Network
    model: Pooled


def _batches(
    pictures: ImageSamples, samples: np.ndarray, parts: list[tuple[tuple[Network, ...], np.ndarray]], size: int
) -> Iterator[Callable[[], _Loaded]]:
    def load(networks: tuple[Network, ...], places: np.ndarray) -> Callable[[], _Loaded]:
        return lambda: _Loaded(pictures.read(samples[places]), places, networks)

    for networks, places in parts:
        for begin in range(0, len(places), size):
            yield load(networks, places[begin : begin + size])


def _compute(
    loaded: _Loaded, models: list[_Opened], pictures: ImageSamples, how: How, device: torch.device, rows: np.ndarray
) -> Described:
    if how.device == "cpu":
        torch.set_num_threads(1)  # it is this thread's own: sums depend on it
    count = len(loaded.places)
    with torch.inference_mode(), _exact(device), torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
        inputs = _fill_up(loaded.batch.inputs, how.batch).to(device, non_blocking=True)
        total = None
        for network, model in models:
            features = model(normalise(inputs, network.input_size)[:, 0]).float()
            total = features if total is None else total + features
        described = (total / len(models))[:count].cpu().numpy()
    pictures.give_back(loaded.batch)
    size = np.abs(described)
    if not (size <= LARGEST).all():
        place, column = np.unravel_index(int(np.argmin(size <= LARGEST)), size.shape)
        raise InputError(
            f"number {column} of the features of row {rows[loaded.places[place]]} is {described[place, column]:g}; "
            f"float16 holds up to {LARGEST:g} either way: were the weights trained on pictures like these? or take "
            "another network or --pool"
        )
    vanished = int(np.count_nonzero((size < VANISHING) & (size > 0)))
    return Described(loaded.places, described.astype(np.float16), vanished)


def _fill_up(inputs: Tensor, count: int) -> Tensor:
    """Return `count` pictures, black behind those there are: a smaller batch may be computed by another kernel."""
    if len(inputs) == count:
        return inputs
    return torch.cat([inputs, inputs.new_zeros(count - len(inputs), *inputs.shape[1:])])


def _exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Take the same kernels every time, on a GPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


@functools.lru_cache(maxsize=2)
def _open_pictures(source: Source, image_size: int) -> ImageSamples:
    """Open a set of pictures, once a process. Rows of a video are all over it: every shard stays open."""
    index = read_index(source.uri)
    if index.sha256 != source.sha256:
        raise InputError(f"{source.uri} was replaced meanwhile by another set; start again")
    pictures = ImageSamples(ShardReader(source.uri, index, Cache(source.cache_dir)), image_size)
    with contextlib.suppress(InputError):  # where so many files may not be open, shards are opened again and again
        allow_open_files(len(index.shards))
        pictures.keep_open(len(index.shards))
    return pictures


@functools.lru_cache(maxsize=32)
def _opened(network: Network, device: str) -> _Opened:
    """Build a network, once a process."""
    return _Opened(network, build(network).to(torch.device(device)))
