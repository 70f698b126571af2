"""Train a run: one view's shards in, checkpoints and scores out. The same command continues it.

Examples:
    python -m mtl_dist.train --local --preset small --data.train faces/cropped/train --data.val faces/cropped/val
    torchrun --nproc-per-node 8 -m mtl_dist.train --preset a --data.train ... --data.val ...
    ray job submit -- python -m mtl_dist.train --preset a --run.name cropped --run.storage s3://bucket/runs
        --data.train s3://bucket/faces/cropped/train --data.val s3://bucket/faces/cropped/val --ray.num-ranks 1 8
    python -m mtl_dist.train --config best.yaml --dry-run      # or --check, of the machines
    python -m mtl_dist.train --status s3://bucket/runs/cropped
"""

from __future__ import annotations

from mtl_dist import storage
from mtl_dist.errors import program, run_command
from mtl_dist.presets import CommandConfig, config_of, parse_command
from mtl_dist.training.restarts import ending_restarts, is_torchrun, leaving_standing


class TrainCommand(CommandConfig):
    """Options of `python -m mtl_dist.train` beside the settings of a run."""

    local: bool = False
    """Train in this process, without Ray. Under torchrun this goes without saying."""
    dry_run: bool = False
    """Check data, storage, device and room, build the model with its weights (those of imagenet are downloaded), print
    the resolved configuration and the plan, and start nothing."""
    check: bool = False
    """Try storage, clock, cache disk, data, device, versions and ports, on every node; print a table, start nothing."""
    status: str | None = None
    """Print where the run at this <run.storage>/<run.name> is, from its storage alone, and start nothing."""


@ending_restarts()
def main(args: list[str] | None = None) -> None:
    """Read the command line, then train, or tell what would be done. Raises `InputError` for what the user can mend."""
    command = parse_command(TrainCommand, args, prog=program("mtl_dist.train"), description=__doc__)
    if command.status:
        from mtl_dist.training.status import print_status

        print_status(storage.absolute(command.status))
        return
    if command.check:
        from mtl_dist.training.health import check_health

        check_health(config_of(command), alone=command.local)
        return
    from mtl_dist.data.widths import fill_in_widths
    from mtl_dist.training.launch import connect, rehearse, run_local, run_ray
    from mtl_dist.training.plan import plan_run
    from mtl_dist.training.status import print_ending
    from mtl_dist.training.torchrun import is_first_of_node, torchrun_rank

    config = fill_in_widths(config_of(command))
    is_local = command.local or is_torchrun()
    rank, world = torchrun_rank()
    num_ranks = (world, world) if is_local else config.ray.num_ranks
    # What one rank refuses ends all of its node: one of each compares, so that no node waits for another's.
    plan = plan_run(config, num_ranks=num_ranks, compares=not is_local or is_first_of_node())
    if command.dry_run:
        if not rank:
            print(rehearse(config, plan, is_local=is_local, num_ranks=num_ranks))
        return
    if is_local:
        if not rank:
            print(plan, flush=True)
        run_local(config)
    else:
        connect(config)
        print(plan, flush=True)
        run_ray(config)
        print_ending(config)


def script() -> None:
    """Be `mtl-train`, or python -m mtl_dist.train."""
    with leaving_standing():
        run_command(main)


if __name__ == "__main__":
    script()
