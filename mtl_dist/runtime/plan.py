"""What a run will do, found out before anything starts: its data, its order, its checkpoints, its size."""

from __future__ import annotations

from typing import NamedTuple

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.index import Index, check_pair, check_stored, read_index
from mtl_dist.data.order import Order
from mtl_dist.errors import InputError


class Data(NamedTuple):
    """The two sets of a run and the order of the first."""

    train: Index
    val: Index
    order: Order

    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree with besides the configuration."""
        return {"training set": self.train.sha256, "validation set": self.val.sha256}


def open_data(config: Config) -> Data:
    """Read both indexes and check that they fit each other and the configuration. Raises `InputError`."""
    for flag, uri in (("data.train", config.data.train), ("data.val", config.data.val)):
        if not uri:
            raise InputError(f"--{flag} is not given; expected the directory or s3:// prefix that holds an index.json")
    train, val = read_index(config.data.train), read_index(config.data.val)
    check_pair(train, val)
    batch = config.train.global_batch
    if train.rows < batch:
        raise InputError(
            f"train.global_batch is {batch}, but {config.data.train} has {train.rows} rows; use a smaller one"
        )
    order = Order(train.shard_rows, batch, config.num_streams, config.data.block_shards, config.run.seed)
    return Data(train, val, order)


def plan_run(config: Config) -> str:
    """Check everything that can be checked before ranks start, and say what will happen. Raises `InputError`."""
    from mtl_dist.runtime.checkpoint import check_same_run, committed, read_state

    data = open_data(config)
    check_stored(config.data.train, data.train)
    check_stored(config.data.val, data.val)
    storage.check_writable(config.run.uri)
    found, _ = committed(config.run.uri)
    for checkpoint in reversed(found):
        try:
            state = read_state(checkpoint)
        except InputError:
            raise
        except ValueError:
            continue  # damaged: the run will pass it over too, and say so
        check_same_run(state, config, data.identity(), checkpoint.uri)
        break
    return _describe(config, data, done=found[-1].step if found else 0)


def _describe(config: Config, data: Data, *, done: int) -> str:
    train, val, order = data
    low, high = config.ray.num_ranks
    batch, steps = config.train.global_batch, order.num_steps
    size_mb = sum(shard.tar_bytes for shard in train.shards) / 1e6
    pixels_mb = batch * 3 * config.input_size**2 * 4 / 1e6
    ranks = f"{high}" if low == high else f"{low} to {high}"
    lines = [
        f"run     {config.run.uri}" + (f", continues from step {done}" if done else ""),
        f"train   {config.data.train}: {train.rows} rows of {train.view}, {len(train.shards)} shards, {size_mb:.1f} MB",
        f"val     {config.data.val}: {val.rows} rows, {len(val.shards)} shards",
        f"steps   {steps} an epoch, {steps * config.train.epochs} in all; {train.rows - steps * batch} rows an epoch "
        "are left out, others each time",
        f"batch   {batch} over {ranks} rank(s), {config.num_streams} streams, {pixels_mb:.0f} MB of pixels",
        f"model   {config.model.name}, backbone {config.model.backbone}, weights {config.model.weights}, "
        f"input {config.input_size} x {config.input_size}",
    ]
    if missing := train.labels.missing_tasks():
        lines.append(f"note    the training set has no labels for {', '.join(missing)}: these tasks are not trained")
    return "\n".join(lines)
