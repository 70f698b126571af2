"""Train a run: one view's shards in, checkpoints and scores out. The same command continues it.

Examples:
    python -m mtl_dist.train --local --preset small --data.train faces/cropped/train --data.val faces/cropped/val
    ray job submit -- python -m mtl_dist.train --preset a --run.name cropped --run.storage s3://bucket/runs
        --data.train s3://bucket/faces/cropped/train --data.val s3://bucket/faces/cropped/val --ray.num-ranks 1 8
    python -m mtl_dist.train --config best.yaml --dry-run
"""

from __future__ import annotations

from mtl_dist.config import dump_yaml
from mtl_dist.errors import run_command
from mtl_dist.presets import CommandConfig, config_of, parse_command


class TrainCommand(CommandConfig):
    local: bool = False
    """Train in this process (or as a rank of torchrun), without Ray."""
    dry_run: bool = False
    """Print the resolved configuration and the plan, and start nothing."""


def main(args: list[str] | None = None) -> None:
    command = parse_command(TrainCommand, args, prog="python -m mtl_dist.train", description=__doc__)
    config = config_of(command)
    from mtl_dist.runtime.plan import plan_run

    plan = plan_run(config)
    if command.dry_run:
        print(dump_yaml(config))
        print(plan)
        return
    if command.local:
        from mtl_dist.runtime.launch import run_local

        run_local(config)
        return
    from mtl_dist.runtime.launch import connect, run_ray

    connect(config)
    print(plan, flush=True)
    metrics = run_ray(config)
    print(
        f"run '{config.run.name}' is finished: {config.run.uri}" + (f", P {metrics['p']:.4f}" if "p" in metrics else "")
    )


if __name__ == "__main__":
    run_command(main)
