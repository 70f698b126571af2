"""The order at a size no test reaches, by simulation: no shard is opened.

    python -m benchmarks.scale [--rows 1000000000] [--shards 100000] [--ranks 4096]

One rank's plan of an epoch: seconds and memory. The rows of a step: milliseconds, most of them in blocks that have to
be shuffled first. Over all ranks: whether any row is read twice, and the share that an epoch reads (every step of some
ranks, every rank at some steps). Shuffle quality: how far apart, in the order of training, two samples come that were
neighbours in a shard, beside MosaicML Streaming's py1e; a perfect shuffle of everything gives a third of an epoch.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from mtl_dist.data.order import EpochPlan, Order

PART = 64
STREAMING_BLOCK = 1 << 18  # rows: its default from 16 canonical nodes on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--rows-per-rank", type=int, default=16, help="of a step")
    args = parser.parse_args()
    batch = args.ranks * args.rows_per_rank
    sizes = np.full(args.shards, args.rows // args.shards)
    order = Order(sizes, batch, args.ranks, 4, seed=0)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    plan = EpochPlan(order, epoch=0, rank=7, num_ranks=args.ranks)
    print(f"plan of an epoch            {time.perf_counter() - begun:.3f} s")
    print(f"steps of an epoch           {order.num_steps}")
    print_step_times(plan)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory above the start      {peak_mb - before_mb:.0f} MB (process {peak_mb:.0f} MB)")
    check_coverage(order, args.ranks)
    print_quality(order, args.ranks)


def print_step_times(plan: EpochPlan) -> None:
    steps = np.linspace(0, plan.order.num_steps - 1, 500).astype(int)
    times = []
    for step in steps:  # far apart: most fall into blocks that have to be shuffled first
        begun = time.perf_counter()
        plan.samples(int(step))
        times.append(time.perf_counter() - begun)
    print(f"rows of a step              median {np.median(times) * 1e3:.2f} ms, worst {max(times) * 1e3:.2f} ms")


def check_coverage(order: Order, ranks: int) -> None:
    """Streams are disjoint ranges of places, and a place is a sample: check both on whole streams and whole steps."""
    for rank in (0, 1, ranks // 2, ranks - 1):
        plan = EpochPlan(order, epoch=0, rank=rank, num_ranks=ranks)
        rows = np.concatenate([plan.samples(step) for step in range(order.num_steps)])
        assert len(np.unique(rows)) == len(rows) == order.rows_per_stream
    plans = [EpochPlan(order, epoch=0, rank=0, num_ranks=1)]
    for step in (0, order.num_steps - 1):
        rows = plans[0].samples(step)
        assert len(np.unique(rows)) == order.global_batch
    read = order.num_steps * order.global_batch
    floor = 1 - order.global_batch / order.num_rows
    print(f"rows read twice             0 (4 whole ranks, 2 whole steps over all {ranks})")
    print(f"share of rows read          {read / order.num_rows:.6f} (at least {floor:.6f})")
    assert read / order.num_rows >= floor


def print_quality(order: Order, ranks: int) -> None:
    """How far apart in training neighbours of a shard come, in epochs: ours, and Streaming's where it is installed.

    On 1/`PART` of the set with as many streams: a stream is then what it is in the whole.
    """
    part = Order(
        order.shard_rows[::PART], order.global_batch // PART, order.streams // PART, order.block_shards, seed=0
    )
    plan = EpochPlan(part, epoch=0, rank=0, num_ranks=1)
    share = part.global_batch // part.streams
    place = np.full(part.num_rows, -1)
    for stream in plan.streams:
        samples = np.concatenate([plan.stream_samples(stream, step) for step in range(part.num_steps)])
        place[samples] = np.arange(len(samples)) // share * share
    print("\nneighbours of a shard       mean distance   in the same step   shards read at a time, a stream")
    print_distances("mtl_dist", place, part, part.block_shards)
    try:
        from streaming.base.shuffle.py1e import get_shuffle_py1e
    except ImportError as error:
        print(f"Streaming is left out: {error}")
        return
    rows_per_shard = int(part.shard_rows[0])
    for what, block in (("py1e, its default block", STREAMING_BLOCK), ("py1e, our block", 4 * rows_per_shard)):
        samples = get_shuffle_py1e(part.shard_rows, part.streams, seed=0, epoch=0, block_size=block)
        place = np.empty(part.num_rows, np.int64)
        place[samples] = np.arange(part.num_rows) % (part.num_rows // part.streams) // share * share
        print_distances(f"Streaming {what}", place, part, block / rows_per_shard)


def print_distances(name: str, place: np.ndarray, order: Order, shards: float) -> None:
    """`place` (N,) of every row in its stream, -1 where it is not read."""
    starts = np.cumsum(order.shard_rows)[:-1]
    neighbours = (place[:-1] >= 0) & (place[1:] >= 0)
    neighbours[starts - 1] = False  # the last of a shard and the first of the next
    gaps = np.abs(np.diff(place))[neighbours]
    print(f"  {name:34}{gaps.mean() / order.rows_per_stream:>8.3f} epochs{np.mean(gaps == 0):>15.5f}{shards:>20.1f}")


if __name__ == "__main__":
    main()
