"""Data: the path of a batch, from shards, pictures and videos to the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from webdataset import WebDataset


def as_webdataset(uri: str, *, cache_dir: Path | None = None, cache_gib: float = 50.0, **options: Any) -> WebDataset:
    """Open a shard set, local or on s3://, as webdataset's own pipeline, for training loops of others.

    It yields webdataset's samples (`__key__`, `jpg`, `json`); go on with `.decode("pil").to_tuple("jpg")`. Shards
    come through a cache, as in training, and are checked against the index. `options` are those of
    `webdataset.WebDataset`; without `shardshuffle` shards come in the order of the index. Raises `InputError` where
    there is no such set.
    """
    from mtl_dist.data.stock import open_stock

    return open_stock(uri, cache_dir=cache_dir, cache_gib=cache_gib, options=options)
