"""How well the orders of training mix: rows never read, and how often two rows share a batch. No shard is opened.

    python -m benchmarks.mixing [--epochs 60] [--batch 24]

Both orders, the first and today's, over sets of 1 to 142 shards. "Neighbours" are rows that lie side by side in a shard
(rows lie shuffled in their shards, so they are no neighbours in time). How often such a pair shares a batch, and how
often any pair of one shard does, is told relative to a full shuffle of everything, which has 1.00.
"""

from __future__ import annotations

import argparse

import numpy as np

from mtl_dist.data.order import VERSIONS, Order

SETS = ((1, 100), (1, 500), (1, 1000), (3, 1000), (10, 1000), (142, 1000))  # shards, rows of each
MANY_ROWS = 20_000  # from here on a fifth of the epochs will do
BLOCK_SHARDS = 4  # the default of data.block_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=24, help="rows of a batch, each from a stream of its own")
    args = parser.parse_args()
    print("shards x rows   order   never read   neighbours   rows of one shard")
    for shards, rows in SETS:
        for version in VERSIONS:
            order = Order(np.full(shards, rows), args.batch, args.batch, BLOCK_SHARDS, seed=0, version=version)
            epochs = args.epochs if order.num_rows < MANY_ROWS else max(args.epochs // 5, 1)
            unread, neighbours, of_shard = measure(order, epochs)
            name = f"{shards} x {rows:,}"
            print(f"{name:<15} {version:<7} {unread:<12} {neighbours:<12.2f} {of_shard:.2f}", flush=True)


def measure(order: Order, epochs: int) -> tuple[int, float, float]:
    """Return the rows that no epoch read, and how often pairs of neighbours and of one shard share a batch."""
    num_rows, num_shards, batch = order.num_rows, len(order.shard_rows), order.global_batch
    rows = num_rows // num_shards
    seen, neighbours, of_shard = np.zeros(num_rows, bool), 0, 0
    for epoch in range(epochs):
        batches = np.sort(order.plan(epoch=epoch, rank=0, num_ranks=1).samples_of(0, order.num_steps), axis=1)
        seen[batches] = True
        shard = batches // rows
        neighbours += int(((np.diff(batches) == 1) & (np.diff(shard) == 0)).sum())
        cells = np.arange(len(batches))[:, None] * num_shards + shard
        counts = np.bincount(cells.ravel(), minlength=len(batches) * num_shards)
        of_shard += int((counts * (counts - 1) // 2).sum())
    shared = epochs * order.num_steps * batch * (batch - 1) / (num_rows * (num_rows - 1))  # of any pair, fully shuffled
    pairs = num_shards * rows * (rows - 1) / 2
    return int((~seen).sum()), neighbours / (num_shards * (rows - 1) * shared), of_shard / (pairs * shared)


if __name__ == "__main__":
    main()
