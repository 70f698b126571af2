"""A shard set as webdataset's own pipeline: its stages, but for the one that opens tars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import WebDataset
from webdataset.cache import StreamingOpen

from mtl_dist import storage
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.index import ShardEntry, read_index


class OpenShards(NamedTuple):
    """The stage that opens tars: from the cache, or in place where they are local."""

    shards: dict[str, ShardEntry]  # by the tar's URI
    cache: Cache

    def __call__(self, urls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in urls:
            shard = self.shards[entry["url"]]
            with self.cache.open(entry["url"], sha256=shard.tar_sha256, size=shard.tar_bytes) as stream:
                yield entry | {"stream": stream}


def open_stock(uri: str, *, cache_dir: Path | None, cache_gib: float, options: dict[str, Any]) -> WebDataset:
    """See `mtl_dist.data.as_webdataset`."""
    shards = {storage.join(uri, f"{shard.name}.tar"): shard for shard in read_index(uri).shards}
    opener = OpenShards(shards, Cache(cache_dir, max_bytes=int(cache_gib * GIB)))
    dataset = WebDataset(list(shards), **{"shardshuffle": False} | options)
    dataset.pipeline = [opener if isinstance(stage, StreamingOpen) else stage for stage in dataset.pipeline]
    assert opener in dataset.pipeline
    return dataset
