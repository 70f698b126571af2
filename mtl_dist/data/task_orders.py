"""An order for every task (data.sampling per_task): a step is a batch of each, of rows that carry its labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_dist.data.order import TASK_KEY, EpochPlan, Order, draw, in_turn


@dataclass(frozen=True)
class TaskOrders:
    """An order a task, over the samples that carry its labels; all have the same number of steps."""

    orders: dict[str, Order]

    def __post_init__(self):
        assert len({order.num_steps for order in self.orders.values()}) == 1, self.orders

    @property
    def num_steps(self) -> int:
        return next(iter(self.orders.values())).num_steps

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.orders)

    @property
    def version(self) -> int:
        return next(iter(self.orders.values())).version

    def shards_in_hand(self, num_ranks: int, *, num_steps: int) -> int:
        return sum(order.shards_in_hand(num_ranks, num_steps=num_steps) for order in self.orders.values())

    def of_version(self, version: int) -> TaskOrders:
        return TaskOrders({task: order.of_version(version) for task, order in self.orders.items()})

    def plan(self, *, epoch: int, rank: int, num_ranks: int) -> TaskPlans:
        plans = [order.plan(epoch=epoch, rank=rank, num_ranks=num_ranks) for order in self.orders.values()]
        return TaskPlans(plans)


def build_task_orders(
    labelled: dict[str, np.ndarray],
    shard_rows: np.ndarray,
    *,
    global_batch: int,
    streams: int,
    block_shards: int,
    seed: int,
    epoch_steps: int,
) -> TaskOrders:
    """Make the order of every task from the ascending numbers of the samples that carry its labels."""
    bounds = np.concatenate([[0], np.cumsum(shard_rows)])
    orders = {}
    for number, (task, samples) in enumerate(labelled.items()):
        rows_here = np.diff(np.searchsorted(samples, bounds))
        # A seed of its own: else sets that carry the labels of two tasks alike would give both the same batches.
        own_seed = int(draw(seed, TASK_KEY, number).integers(1 << 62))
        orders[task] = Order(rows_here, global_batch, streams, block_shards, own_seed, epoch_steps, samples)
    return TaskOrders(orders)


class TaskPlans:
    """One rank's part of one epoch of `TaskOrders`: the plans of all tasks side by side."""

    def __init__(self, plans: list[EpochPlan]):
        self.plans = plans

    def samples_of(self, step: int, num_steps: int) -> np.ndarray:
        """Return (num_steps, tasks * n) int64: every step's samples, those of the first task first, n of each."""
        return np.concatenate([plan.samples_of(step, num_steps) for plan in self.plans], axis=1)

    def shards_ahead(self, step: int, num_steps: int = 1) -> list[int]:
        """Return the shards that steps [step, step + num_steps) read from, in the order of need."""
        return in_turn([plan.shards_ahead(step, num_steps) for plan in self.plans])
