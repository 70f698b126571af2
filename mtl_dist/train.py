"""Train a run: one view's shards in, checkpoints and scores out. The same command continues it.

Examples:
    python -m mtl_dist.train --local --preset small --data.train faces/cropped/train --data.val faces/cropped/val
    torchrun --nproc-per-node 8 -m mtl_dist.train --preset a --data.train ... --data.val ...
    ray job submit -- python -m mtl_dist.train --preset a --run.name cropped --run.storage s3://bucket/runs
        --data.train s3://bucket/faces/cropped/train --data.val s3://bucket/faces/cropped/val --ray.num-ranks 1 8
    python -m mtl_dist.train --config best.yaml --dry-run
    python -m mtl_dist.train --status s3://bucket/runs/cropped
"""

from __future__ import annotations

import os

from mtl_dist import storage
from mtl_dist.config import Config, dump_yaml
from mtl_dist.errors import run_command
from mtl_dist.presets import CommandConfig, config_of, parse_command


class TrainCommand(CommandConfig):
    local: bool = False
    """Train in this process, without Ray. Under torchrun this goes without saying."""
    dry_run: bool = False
    """Print the resolved configuration and the plan, and start nothing."""
    status: str | None = None
    """Print where the run at this <run.storage>/<run.name> is, from its storage alone, and start nothing."""


def main(args: list[str] | None = None) -> None:
    command = parse_command(TrainCommand, args, prog="python -m mtl_dist.train", description=__doc__)
    if command.status:
        from mtl_dist.runtime.status import print_status

        print_status(storage.absolute(command.status))
        return
    config = config_of(command)
    from mtl_dist.runtime.plan import plan_run

    plan = plan_run(config)
    if command.dry_run:
        print(dump_yaml(config))
        print(plan)
        return
    from mtl_dist.runtime.launch import connect, is_torchrun, run_local, run_ray

    if command.local or is_torchrun():
        if os.environ.get("RANK", "0") == "0":
            print(plan, flush=True)
        run_local(config)
    else:
        connect(config)
        print(plan, flush=True)
        run_ray(config)
        finish_run(config)


def finish_run(config: Config) -> None:
    """Print the scores of a run's evaluations, as its storage has them."""
    from mtl_dist.data.index import read_index
    from mtl_dist.objective.metrics import constant_scores
    from mtl_dist.runtime.tracking import print_scores, read_records

    evaluations = [record for record in read_records(config.run.uri) if record["kind"] == "eval"]
    rows = {"constant predictor": constant_scores(read_index(config.data.val).labels)}
    rows |= {f"epoch {record['epoch'] + 1}": record["scores"] for record in evaluations}
    print_scores(rows, title=f"run {config.run.uri}")


if __name__ == "__main__":
    run_command(main)
