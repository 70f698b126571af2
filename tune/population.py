"""Train a population: generations of runs, of which the weak go on from the strong, with settings that are varied.

Examples:
    python -m tune.population --local --preset small --population.name weights --population.members 8 --train.epochs 12
        --population.generations 4 --data.train faces/cropped/train --data.val faces/cropped/val
    ray job submit -- python -m tune.population --preset a --population.name weights --run.storage s3://bucket/runs ...

Population-based training (Jaderberg et al. 2017, arXiv 1711.09846). Every member of a generation is an ordinary run,
which goes on from its parent's checkpoint with everything: weights, optimizer, place in the order and the schedule.
After a generation the worst share of the members is given up for copies of the best, whose settings are multiplied by
0.8 or 1.2. The same command continues, whatever was killed. It writes population.json, lineage.csv and lineage.png to
<run.storage>/<population.name>/, and names the run to take.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.data.widths import fill_in_widths
from mtl_dist.errors import InputError, NonFiniteLoss, program, run_command
from mtl_dist.families import objective_of
from mtl_dist.objective.scores import Score, find_score, flat_scores
from mtl_dist.presets import CommandConfig, config_of, parse_command
from mtl_dist.sealed import seal
from mtl_dist.settings import Name, Section, Varies, flatten, unflatten, varying
from tune.search import DRIVER_CPUS, check_same_settings, count_room
from tune.space import Space, default_space, draw_from, read_space

FACTORS = (0.8, 1.2)  # that a copied setting is multiplied by
ABOUT = "population.json"


class PopulationConfig(Section):
    name: Name = "population"
    """The population's name; its files go to <run.storage>/<name>/."""
    members: int = Field(8, ge=2, le=10_000)
    """Runs of a generation."""
    generations: int = Field(4, ge=1, le=10_000)
    """Parts that train.epochs are cut into; after each but the last the weak go on from the strong."""
    replaced: float = Field(0.25, gt=0, le=0.5)
    """Share of the members that are given up after a generation, and of those that are copied."""
    space: Path | None = None
    """YAML as of tune.search, of settings that may change within a run. None: loss weights and the learning rate."""
    metric: str | None = None
    """What members compete by, as of tune.search; scored on data.val."""


class PopulationCommand(CommandConfig):
    population: PopulationConfig = PopulationConfig()
    local: bool = False
    """Train in this process, one member after the other, without Ray."""
    dry_run: bool = False
    """Print the space and the plan, and start nothing."""


class Planned(NamedTuple):
    """A member of a generation, before it is trained."""

    generation: int
    member: int
    parent: int | None  # a member of the generation before; None: it begins
    params: dict[str, Any]

    @property
    def name(self) -> str:
        return f"g{self.generation:02d}-m{self.member:02d}"


def main(args: list[str] | None = None) -> None:
    command = parse_command(PopulationCommand, args, prog=program("tune.population"), description=__doc__)
    config, population = fill_in_widths(config_of(command)), command.population
    score = find_score(population.metric or objective_of(config.model.name).score, setting="population.metric")
    from mtl_dist.training.plan import check_scored, open_data, plan_run

    space = read_space(population.space, config) if population.space else default_space(config)
    check_population(config, population, space)
    uri = storage.join(config.run.storage, population.name)
    probe = config.model_copy(update={"run": config.run.model_copy(update={"name": population.name})})
    plan = plan_run(probe)
    check_scored(data := open_data(config), score, setting="population.metric", what="run")
    ends = epochs_of(config, population)
    print(f"population of {population.members}, up to epochs {', '.join(map(str, ends))}, over {json.dumps(space)}")
    if command.dry_run:
        print(plan)
        return
    _check_same(uri, config, population, space, data.identity())
    if not command.local:
        from mtl_dist.training.launch import connect

        connect(config)
    scored: list[dict[int, float]] = []
    plans: list[list[Planned]] = []
    for generation, end in enumerate(ends):
        members = plan_generation(space, population, seed=config.run.seed, plans=plans, scored=scored, score=score)
        runs = {each.member: run_config(config, each, uri, stop_epoch=end) for each in members}
        train(runs, local=command.local)
        plans.append(members)
        scored.append({member: last_score(run, score) for member, run in runs.items()})
        _tell(generation, len(ends), members, scored[-1], score)
        write_lineage(uri, plans, scored, score)
    best = rank(scored[-1], score)[0]
    if not math.isfinite(scored[-1][best]):
        raise InputError("no run of the last generation has a score that is a number; give a narrower space")
    print(f"best: {storage.join(uri, 'runs', plans[-1][best].name)}, {score.title} {scored[-1][best]:.4f}")


def check_population(config: Config, population: PopulationConfig, space: Space) -> None:
    """Raise `InputError` where the settings of a run that goes on could not be these."""
    if population.generations > config.train.epochs:
        raise InputError(
            f"population.generations is {population.generations} and train.epochs {config.train.epochs}: a generation "
            "has an epoch at least; give fewer generations, or more epochs"
        )
    if config.run.start or config.train.stop_epoch:
        raise InputError("run.start and train.stop_epoch are the population's own here; leave them out")
    if config.train.patience:  # members are compared after as many epochs each
        raise InputError(
            f"train.patience is {config.train.patience}, which ends a run by itself; a population gives its weak "
            "members up: leave it out"
        )
    if fixed := [key for key in space if key not in varying(Config, Varies.BY_RUN)]:
        raise InputError(
            f"the space has {', '.join(fixed)}, which cannot change within a run; give settings such as loss.va, "
            "optim.lr, or search over it with tune.search"
        )


def epochs_of(config: Config, population: PopulationConfig) -> list[int]:
    """Return after which epoch every generation ends."""
    return [config.train.epochs * (n + 1) // population.generations for n in range(population.generations)]


# ------------------------------------------------------------------------------------------------ generations: pure


def plan_generation(
    space: Space,
    population: PopulationConfig,
    *,
    seed: int,
    plans: list[list[Planned]],
    scored: list[dict[int, float]],
    score: Score,
) -> list[Planned]:
    """Return the members of the next generation: a function of the seed, and of the scores of those before."""
    generation, members = len(plans), range(population.members)
    if not plans:
        draws = (np.random.default_rng([seed, 0, member]) for member in members)
        drawn = [{key: draw_from(distribution, rng) for key, distribution in space.items()} for rng in draws]
        return [Planned(0, member, None, params) for member, params in enumerate(drawn)]
    order, whole = rank(scored[-1], score), [m for m in members if math.isfinite(scored[-1][m])]
    if not whole:
        raise InputError("no member of the population has a score that is a number; give a narrower space")
    count = max(1, math.floor(population.replaced * len(order)))
    best = order[: min(count, len(whole))]
    given_up = order[-max(count, len(order) - len(whole)) :]
    parents = dict(zip(order, order)) | dict(zip(given_up, itertools.cycle(best)))
    planned = []
    for member in members:
        parent, rng = parents[member], np.random.default_rng([seed, generation, member])
        params = plans[-1][parent].params
        if parent != member:
            params = {key: vary(params[key], distribution, rng) for key, distribution in space.items()}
        planned.append(Planned(generation, member, parent, params))
    return planned


def rank(scored: dict[int, float], score: Score) -> list[int]:
    """Return members, the best first; those without a score last, and of equals the first."""

    def place(member: int) -> tuple[float, int]:
        value = scored[member]
        return (-score.sign * value if math.isfinite(value) else math.inf), member

    return sorted(scored, key=place)


def vary(value: Any, distribution: dict[str, list], rng: np.random.Generator) -> Any:
    """Return a setting near one: times 0.8 or 1.2, within the ends; of a choice a neighbour in its list, or itself."""
    ((kind, values),) = distribution.items()
    if kind == "choice":
        place = values.index(value) + int(rng.integers(-1, 2))
        return values[min(max(place, 0), len(values) - 1)]
    varied = min(max(value * FACTORS[rng.integers(2)], values[0]), values[1])
    return round(varied) if kind == "integer" else float(varied)


# ------------------------------------------------------------------------------------------------------------- runs


def run_config(config: Config, member: Planned, uri: str, *, stop_epoch: int) -> Config:
    """Return the configuration of a member's run."""
    runs = storage.join(uri, "runs")
    own: dict[str, Any] = {"run.name": member.name, "run.storage": runs, "train.stop_epoch": stop_epoch}
    if member.parent is not None:
        own["run.start"] = storage.join(runs, f"g{member.generation - 1:02d}-m{member.parent:02d}")
        own["run.start_with"] = "everything"
    return build_config(json.loads(config.model_dump_json()), unflatten(member.params), unflatten(own))


def train(runs: dict[int, Config], *, local: bool) -> None:
    """Train the runs that are not at their end. A run whose loss is no longer finite has no score: that is a result."""
    todo = {member: run for member, run in runs.items() if not is_over(run)}
    if local:
        for run in todo.values():
            _train_here(run)
    elif todo:
        _train_over_cluster(list(todo.values()))


def _train_over_cluster(todo: list[Config]) -> None:
    """Train as many runs at a time as the cluster has room for."""
    import ray

    # Ray would start all drivers at once, and these could take the CPUs that ranks wait for.
    room = count_room(todo[0], [node["Resources"] for node in ray.nodes() if node["Alive"]]) or len(todo)
    task = ray.remote(num_cpus=DRIVER_CPUS, max_retries=3)(_train_on_ray)
    waiting: list[Any] = []
    for place, run in enumerate(todo, start=1):
        waiting.append(task.remote(run.model_dump(mode="json")))
        while len(waiting) >= (room if place < len(todo) else 1):
            done, waiting = ray.wait(waiting)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None


def _train_here(run: Config) -> None:
    import torch

    from mtl_dist.training.launch import run_local

    try:
        run_local(run)
    except NonFiniteLoss as error:
        torch.distributed.destroy_process_group()
        print(f"{run.run.name} diverged: {error}", flush=True)
    finally:  # from here on they end the population
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _train_on_ray(run: dict[str, Any]) -> None:
    from mtl_dist.training.launch import run_ray

    try:
        run_ray(build_config(run))
    except NonFiniteLoss as error:
        print(f"{run['run']['name']} diverged: {error}", flush=True)


def is_over(run: Config) -> bool:
    """Whether a run was scored at its end, and has the checkpoint: scores are stored before it."""
    from mtl_dist.training.launch import newest_step

    steps = [record["step"] for record in _evaluations(run) if record["epoch"] + 1 >= run.last_epoch]
    return bool(steps) and newest_step(run.run.uri) >= steps[-1]


def last_score(run: Config, score: Score) -> float:
    """Return the score at a run's end; NaN where it has none."""
    ends = [record for record in _evaluations(run) if record["epoch"] + 1 >= run.last_epoch]
    found = flat_scores(ends[-1]["scores"]).get(score.key) if ends else None
    return math.nan if found is None else float(found)


def _evaluations(run: Config) -> list[dict[str, Any]]:
    from mtl_dist.training.tracking import read_records

    return [record for record in read_records(run.run.uri) if record["kind"] == "eval"]


# ---------------------------------------------------------------------------------------------------- what is told


def _tell(generation: int, num: int, members: list[Planned], scored: dict[int, float], score: Score) -> None:
    print(f"generation {generation + 1} of {num}, the best first")
    for member in rank(scored, score):
        each = members[member]
        origin = "" if each.parent in (None, member) else f"  from m{each.parent:02d}"
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in each.params.values())
        params = "  ".join(f"{key} {value}" for key, value in zip(each.params, shown))
        print(f"  {each.name}  {score.title} {scored[member]:.4f}  {params}{origin}", flush=True)


def write_lineage(uri: str, plans: list[list[Planned]], scored: list[dict[int, float]], score: Score) -> None:
    """Write lineage.csv, a row a run, and lineage.png, a line a lineage."""
    params = list(plans[0][0].params)
    rows: list[list[Any]] = [["run", "generation", "parent", score.key, *params]]
    for members, of_members in zip(plans, scored):
        for each in members:
            parent = "" if each.parent is None else f"g{each.generation - 1:02d}-m{each.parent:02d}"
            rows.append([each.name, each.generation, parent, of_members[each.member], *each.params.values()])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    storage.write_bytes(storage.join(uri, "lineage.csv"), text.getvalue().encode())
    storage.write_bytes(storage.join(uri, "lineage.png"), draw_lineage(plans, scored, score))


def draw_lineage(plans: list[list[Planned]], scored: list[dict[int, float]], score: Score) -> bytes:
    """Draw the scores of all runs, joined to those of their parents; colours are of the first ancestors."""
    from mtl_dist.report.drawing import COLOURS, canvas, save_png

    ancestors = [list(range(len(plans[0])))]
    for members in plans[1:]:
        ancestors.append([ancestors[-1][each.parent] for each in members])
    with canvas(6.0, 3.6) as figure:
        axes = figure.subplots()
        for generation, members in enumerate(plans):
            for each, ancestor in zip(members, ancestors[generation]):
                colour, here = COLOURS[ancestor % len(COLOURS)], scored[generation][each.member]
                axes.plot([generation + 1], [here], "o", color=colour, markersize=4)
                if each.parent is not None:
                    before = scored[generation - 1][each.parent]
                    style = "-" if each.parent == each.member else "--"
                    axes.plot([generation, generation + 1], [before, here], style, color=colour, linewidth=1.2)
        title = "A line a run and its parent; dashed: settings were varied"
        axes.set(xlabel="generation", ylabel=score.title, title=title)
        axes.set_xticks(range(1, len(plans) + 1))
        return save_png(figure)


def _check_same(uri: str, config: Config, population: PopulationConfig, space: Space, data: dict[str, str]) -> None:
    """Raise where this name belongs to a population of other settings, or of other data."""
    where = storage.join(uri, ABOUT)
    wanted = json.loads(json.dumps(_settings(config, population) | {"space": space} | data))
    usual = json.loads(json.dumps(_settings(Config(), PopulationConfig()))) | data
    check_same_settings(where, wanted, usual=usual, what=f"population {uri}")
    storage.write_bytes(where, seal(wanted))


def _settings(config: Config, population: PopulationConfig) -> dict[str, Any]:
    """Return what decides the outcome: not what a run chooses for itself, or may change in its midst."""
    free = {*varying(Config, Varies.BY_PART), "run.name"}
    own = {f"population.{key}": value for key, value in population.model_dump(exclude={"space"}).items()}
    return {key: value for key, value in flatten(config).items() if key not in free} | own


def script() -> None:
    """Be `mtl-population`, or python -m tune.population."""
    run_command(main)


if __name__ == "__main__":
    script()
