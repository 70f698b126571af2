"""Search loss weights and learning rates: every trial is a Ray Train run; ASHA stops the weak ones early.

Examples:
    ray job submit -- python -m tune.search --preset a --search.name weights --search.trials 20
        --run.storage s3://bucket/runs --data.train s3://bucket/faces/cropped/train --data.val s3://bucket/faces/cropped/val
    python -m mtl_dist.train --config s3://bucket/runs/weights/best.yaml --run.name cropped ...

The same command continues an interrupted search. It writes best.yaml and trials.csv to <run.storage>/<search.name>/.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field

from mtl_dist import storage
from mtl_dist.config import MAX_COUNT, Config, Section, flatten
from mtl_dist.errors import InputError, run_command
from mtl_dist.presets import CommandConfig, config_of, parse_command
from tune.space import build_param_space, default_space, read_space
from tune.trial import run_trial, trial_config

METRIC = "p"
DRIVER_CPUS = 0.1  # of a trial's driver, which only waits for its ranks
# What best.yaml leaves to the run that uses it.
OWN_SETTINGS = (
    "run.name",
    "run.storage",
    "data.train",
    "data.val",
    "data.cache_dir",
    "engine.device",
    "engine.threads",
)


class SearchConfig(Section):
    name: str = "search"
    """The search's name; its files go to <run.storage>/<name>/."""
    trials: int = Field(20, ge=1, le=100_000)
    """Trials to run."""
    space: Path | None = None
    """YAML such as 'optim.lr: {loguniform: [1.0e-4, 1.0e-2]}'. None: the loss weights and the learning rate."""
    algorithm: Literal["random", "optuna"] = "random"
    """optuna: TPE (needs the extra 'search')."""
    concurrent: int | None = Field(None, ge=1, le=100_000)
    """Trials at a time; None: as many as the cluster has room for."""
    grace_epochs: int = Field(1, ge=1, le=MAX_COUNT)
    """ASHA stops no trial before this many epochs."""
    reduction: int = Field(3, ge=2, le=1000)
    """ASHA keeps one in so many trials at each rung."""


class SearchCommand(CommandConfig):
    search: SearchConfig = SearchConfig()
    dry_run: bool = False
    """Print the space and the plan, and start nothing."""


def main(args: list[str] | None = None) -> None:
    command = parse_command(SearchCommand, args, prog="python -m tune.search", description=__doc__)
    config, search = config_of(command), command.search
    from mtl_dist.runtime.plan import plan_run

    space = read_space(search.space, config) if search.space else default_space(config)
    search_uri = storage.join(config.run.storage, search.name)
    probe = config.model_copy(update={"run": config.run.model_copy(update={"name": search.name})})
    plan = plan_run(probe)
    print(f"search  {search.trials} trials of {config.train.epochs} epochs over {json.dumps(space)}")
    if command.dry_run:
        print(plan)
        return
    _check_same_search(search_uri, config, search, space)
    results = run_search(config, search, build_param_space(space), search_uri)
    finish_search(config, results, search_uri)


def run_search(config: Config, search: SearchConfig, param_space: dict[str, Any], search_uri: str):
    """Run the trials, or those that an interrupted search has left. Returns Ray Tune's results."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from mtl_dist.runtime.launch import connect, ray_storage

    connect(config)
    trainable = tune.with_resources(
        functools.partial(run_trial, base=json.loads(config.model_dump_json()), search_uri=search_uri),
        {"CPU": DRIVER_CPUS},
    )
    path, filesystem = ray_storage(search_uri)
    experiment = f"{path}/tune"
    if tune.Tuner.can_restore(experiment, storage_filesystem=filesystem):
        print(f"continuing the search at {search_uri}", flush=True)
        return tune.Tuner.restore(
            experiment,
            trainable=trainable,
            storage_filesystem=filesystem,
            resume_unfinished=True,
            restart_errored=True,
            param_space=param_space,
        ).fit()
    epochs = config.train.epochs
    tuner = tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=search.trials,
            search_alg=_build_searcher(search, config.run.seed),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=max(epochs, search.grace_epochs),
                grace_period=min(search.grace_epochs, epochs),
                reduction_factor=search.reduction,
            ),
            max_concurrent_trials=search.concurrent or _room_for_trials(config),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[build_reporter(search.trials)],
        ),
    )
    return tuner.fit()


def finish_search(config: Config, results, search_uri: str) -> None:
    """Write best.yaml and trials.csv, and print both. Raises `InputError` where no trial was scored."""
    from rich.console import Console
    from rich.table import Table

    trials = rank_trials(results)
    if not trials:
        raise InputError(
            f"none of {len(results)} trials has a score that is a number; their errors: "
            f"{[str(e) for e in results.errors][:1]}"
        )
    params = sorted(trials[0].result.config)
    header = ["trial", *params, "epochs", "best P", "last P"]
    rows = [_trial_row(trial, params) for trial in trials]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    storage.write_bytes(storage.join(search_uri, "trials.csv"), text.getvalue().encode())
    best = best_yaml(config, trials[0].result.config)
    storage.write_bytes(storage.join(search_uri, "best.yaml"), best.encode())

    table = Table(*header, title=f"{len(rows)} trials, the best first", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    print(f"\nbest configuration ({storage.join(search_uri, 'best.yaml')}):\n\n{best}")
    print(
        f"train with it: python -m mtl_dist.train --config {storage.join(search_uri, 'best.yaml')} --run.name NAME "
        "--run.storage ... --data.train ... --data.val ..."
    )
    if results.num_errors:
        print(f"{results.num_errors} trial(s) failed; the same command tries them again")


class RankedTrial(NamedTuple):
    result: Any  # Ray's
    best: float  # the highest P of its evaluations: that of the checkpoint that the ensemble and predict would take
    last: float


def rank_trials(results: Iterable[Any]) -> list[RankedTrial]:
    """Return the trials with a P that is a number, the highest first."""
    found = []
    for result in results:
        last = (result.metrics or {}).get(METRIC)
        frame = result.metrics_dataframe
        values = [] if frame is None or METRIC not in frame else frame[METRIC].tolist()
        finite = [float(value) for value in [*values, last] if value is not None and math.isfinite(value)]
        if finite:
            found.append(RankedTrial(result, max(finite), math.nan if last is None else float(last)))
    return sorted(found, key=lambda trial: trial.best, reverse=True)


def _trial_row(trial: RankedTrial, params: list[str]) -> list[str]:
    result = trial.result
    values = [result.config[key] for key in params]
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    epoch = str(result.metrics["epoch"])
    return [result.metrics["trial_id"], *shown, epoch, f"{trial.best:.4f}", f"{trial.last:.4f}"]


def best_yaml(config: Config, params: dict[str, Any]) -> str:
    """Write the whole configuration with a trial's settings, without what a run chooses for itself."""
    merged = flatten(trial_config(json.loads(config.model_dump_json()), params, "best", config.run.storage))
    nested: dict[str, dict[str, Any]] = {}
    for path, value in merged.items():
        if path not in OWN_SETTINGS and not path.startswith("ray."):
            section, key = path.split(".")
            nested.setdefault(section, {})[key] = value
    return yaml.safe_dump(nested, sort_keys=False)


def build_reporter(num_trials: int):
    """A callback that prints a line at each evaluation of a trial, with the time left."""
    from ray.tune import Callback

    class Reporter(Callback):
        def __init__(self):
            self.begun, self.finished = time.monotonic(), set()

        def on_trial_result(self, iteration, trials, trial, result, **info):
            if METRIC in result:
                print(f"trial {trial.trial_id}  epoch {result['epoch']}  P {result[METRIC]:.4f}", flush=True)

        def on_trial_complete(self, iteration, trials, trial, **info):
            self._line(trial, "finished")

        def on_trial_error(self, iteration, trials, trial, **info):
            self._line(trial, "failed")

        def _line(self, trial, what: str) -> None:
            self.finished.add(trial.trial_id)
            done, seconds = len(self.finished), time.monotonic() - self.begun
            left = seconds / done * (num_trials - done)
            print(f"trial {trial.trial_id} {what}: {done} of {num_trials} trials, about {left:.0f} s left", flush=True)

    return Reporter()


def _room_for_trials(config: Config) -> int:
    """How many trials' ranks the cluster has room for. Tune itself would count drivers only and start all at once."""
    import ray

    total, least = ray.cluster_resources(), config.ray.num_ranks[0]
    rooms = [int(total.get("CPU", 0) / (least * config.ray.cpus_per_rank + DRIVER_CPUS))]
    if config.ray.gpus_per_rank:
        rooms.append(int(total.get("GPU", 0) / (least * config.ray.gpus_per_rank)))
    return max(1, min(rooms))


def _build_searcher(search: SearchConfig, seed: int):
    if search.algorithm == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=seed)
    try:
        import optuna  # noqa: F401  Ray asserts where it is missing
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    except ImportError:
        raise InputError(
            "search.algorithm is optuna, which is not installed; pip install 'mtl_dist[search]' on every node"
        ) from None


def _check_same_search(search_uri: str, config: Config, search: SearchConfig, space: dict[str, Any]) -> None:
    """Raise where this name belongs to a search of other settings; a restored search would mix the two."""
    uri = storage.join(search_uri, "search.json")
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(("run.name", "ray."))}
    own = search.model_dump(include={"trials", "algorithm", "grace_epochs", "reduction"})
    wanted = {**settings, **{f"search.{key}": value for key, value in own.items()}, "space": space}
    if storage.exists(uri):
        stored = json.loads(storage.read_bytes(uri))
        for key in sorted(stored.keys() | wanted.keys()):
            if stored.get(key) != wanted.get(key):
                raise InputError(
                    f"search {search_uri} was begun with {key} {stored.get(key)!r}, not {wanted.get(key)!r}; give this "
                    "one another --search.name"
                )
    storage.write_bytes(uri, json.dumps(wanted, indent=1).encode())


if __name__ == "__main__":
    run_command(main)
