"""Search loss weights and learning rates: every trial is a Ray Train run; ASHA stops the weak ones early.

Examples:
    ray job submit -- python -m tune.search --preset a --search.name weights --search.trials 20
        --run.storage s3://bucket/runs --data.train s3://bucket/faces/cropped/train --data.val s3://bucket/faces/cropped/val
    python -m mtl_dist.train --config s3://bucket/runs/weights/best.yaml --run.name cropped ...

The same command continues an interrupted search, and tries trials that failed again. It writes best.yaml and trials.csv
to <run.storage>/<search.name>/.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import pickle
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.widths import fill_in_widths
from mtl_dist.errors import Damaged, InputError, program, run_command
from mtl_dist.families import objective_of
from mtl_dist.objective.scores import FIRST, Score, find_score
from mtl_dist.presets import CommandConfig, config_of, parse_command
from mtl_dist.sealed import seal, unseal
from mtl_dist.sections import MAX_COUNT
from mtl_dist.settings import Name, Section, flatten, unflatten
from tune.space import Space, build_param_space, default_space, is_own, read_space
from tune.trial import DIVERGED, EPOCH, run_trial, trial_config

EXPERIMENT = "tune"  # where Ray Tune keeps what it needs to continue, in the search's storage
DRIVER_CPUS = 0.1  # of a trial's driver, which only waits for its ranks
DRIVER_RESTARTS = 3  # of a trial whose driver dies with its node
# Ray's own tables and lines would bury ours; its warnings stay, and what trials die of is in our lines. The files for
# TensorBoard are ours, not Ray's: trials/trial-<id>/tensorboard.
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


class SearchConfig(Section):
    name: Name = "search"
    """The search's name; its files go to <run.storage>/<name>/."""
    trials: int = Field(20, ge=1, le=100_000)
    """Trials to run."""
    space: Path | None = None
    """YAML such as 'optim.lr: {loguniform: [1.0e-4, 1.0e-2]}'; kinds are uniform, loguniform, integer (both ends may
    come) and choice. None: the loss weights and the learning rate."""
    metric: str | None = None
    """What trials compete by: a score as metrics.jsonl names it, such as va or rmse_v (the lowest is the best). None:
    what checkpoints of the model compete by, p or masked_loss."""
    algorithm: Literal["random", "optuna"] = "random"
    """optuna: TPE (needs the extra 'search')."""
    concurrent: int | None = Field(None, ge=1, le=100_000)
    """Trials at a time; None: as many as the cluster has room for, or all where it adds nodes (ray.autoscaling)."""
    grace_epochs: int = Field(1, ge=1, le=MAX_COUNT)
    """ASHA stops no trial before this many epochs."""
    reduction: int = Field(3, ge=2, le=1000)
    """ASHA keeps one in so many trials at each rung."""


class SearchCommand(CommandConfig):
    search: SearchConfig = SearchConfig()
    dry_run: bool = False
    """Print the space and the plan, and start nothing."""


def main(args: list[str] | None = None) -> None:
    command = parse_command(SearchCommand, args, prog=program("tune.search"), description=__doc__)
    config, search = fill_in_widths(config_of(command)), command.search
    score = find_score(metric_of(config, search), setting="search.metric")
    from mtl_dist.training.plan import check_scored, open_data, plan_run

    space = read_space(search.space, config) if search.space else default_space(config)
    search_uri = storage.join(config.run.storage, search.name)
    probe = config.model_copy(update={"run": config.run.model_copy(update={"name": search.name})})
    plan = plan_run(probe)
    check_scored(data := open_data(config), score, setting="search.metric", what="trial")
    print(f"search  {search.trials} trials of {config.train.epochs} epochs over {json.dumps(space)}")
    if command.dry_run:
        from mtl_dist.joining import has_cluster
        from mtl_dist.training.launch import connect
        from mtl_dist.training.learner import check_start
        from tune.experiment import build_searcher

        has_gpu = config.ray.gpus_per_rank > 0
        start = check_start(probe, has_gpu=has_gpu, num_ranks=config.ray.num_ranks, begins=plan.begins)
        build_searcher(search.algorithm, seed=config.run.seed, limit=search.concurrent)
        if has_cluster():
            connect(config)
        print(f"{plan}\n{start}")
        return
    check_same_search(search_uri, config, search, space, data=data.identity())
    results = run_search(config, search, space, search_uri)
    finish_search(config, results, search_uri, score=score)


def metric_of(config: Config, search: SearchConfig) -> str:
    """Return what trials compete by."""
    return search.metric or objective_of(config.model.name).score


def run_search(config: Config, search: SearchConfig, space: Space, search_uri: str):
    """Run the trials, or those that an interrupted search has left. Returns Ray Tune's results."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    from mtl_dist.training.launch import connect, ray_storage
    from tune.experiment import Asha, Reporter, build_searcher

    connect(config)
    room = count_room(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    base, score = json.loads(config.model_dump_json()), find_score(metric_of(config, search))
    trainable = tune.with_resources(
        functools.partial(run_trial, base=base, search_uri=search_uri, metric=score.key),
        {"CPU": DRIVER_CPUS},
    )
    path, filesystem = ray_storage(search_uri)
    earlier, num_ended = _read_earlier(search_uri, score.key)
    if earlier:
        print(f"continuing the search at {search_uri}", flush=True)
    reporter = Reporter(num_trials=search.trials, num_ended=num_ended, score=score)
    kept = tune.ResumeConfig.ResumeType.RESUME  # under their ids, so that their runs continue
    analysis = tune.run(
        trainable,
        name=EXPERIMENT,
        storage_path=path,
        storage_filesystem=filesystem,
        config=build_param_space(space),
        num_samples=search.trials,
        metric=score.key,
        mode="max" if score.sign > 0 else "min",
        search_alg=build_searcher(search.algorithm, seed=config.run.seed, limit=search.concurrent or room),
        scheduler=Asha(
            epochs=config.train.epochs, grace_epochs=search.grace_epochs, reduction=search.reduction, earlier=earlier
        ),
        max_failures=DRIVER_RESTARTS,
        raise_on_failed_trial=False,
        resume_config=tune.ResumeConfig(unfinished=kept, errored=kept) if earlier else None,
        callbacks=[reporter, JsonLoggerCallback()],
        verbose=0,
    )
    if reporter.num_ended < search.trials:  # Ctrl-C: Ray stores where the search is, and returns
        raise KeyboardInterrupt
    return tune.ResultGrid(analysis)


def _read_earlier(search_uri: str, metric: str) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """Return what the trials of an interrupted search scored, by their ids, and how many of them have ended well."""
    from ray import tune

    from mtl_dist.training.launch import ray_storage
    from tune.experiment import evaluations

    where = storage.join(search_uri, EXPERIMENT)
    if not any(found.name.startswith("experiment_state-") for found in storage.list_objects(where)):
        return {}, 0
    path, filesystem = ray_storage(where)
    try:
        analysis = tune.ExperimentAnalysis(path, storage_filesystem=filesystem)
        frames = analysis.trial_dataframes
        ended = [trial for trial in analysis.trials if trial.status == trial.TERMINATED]
        scored = {trial.trial_id: evaluations(frames.get(trial.trial_id), metric) for trial in analysis.trials}
        return scored, len(ended)
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, ImportError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{where}, which the search needs to continue, cannot be read ({type(error).__name__}: {error}); "
            "delete it to run all trials again, or give another --search.name"
        ) from None


def finish_search(config: Config, results, search_uri: str, *, score: Score = FIRST) -> None:
    """Write best.yaml and trials.csv, and print both. Raises `InputError` where no trial was scored."""
    from rich.console import Console
    from rich.table import Table

    trials = rank_trials(results, score)
    reasons = _reasons(results)
    if not trials:
        raise InputError("\n".join([f"none of {len(results)} trials has a score that is a number", *reasons]))
    params = sorted(trials[0].result.config)
    header = ["trial", *params, "epochs", f"best {score.title}", f"last {score.title}", "end"]
    ranked = {id(trial.result) for trial in trials}
    rows = [_trial_row(trial, params, config) for trial in trials]
    rows += [_trial_row(_score(result, score), params, config) for result in results if id(result) not in ranked]
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
    print(f"train with it: {_train_command(config, search_uri)}")
    if results.num_errors:
        print(f"{results.num_errors} trial(s) failed; the same command tries them again")
    for reason in reasons:
        print(reason)


def _train_command(config: Config, search_uri: str) -> str:
    """Return a command that trains with what was found, on the data and the cluster of the search."""
    args = ["python", "-m", "mtl_dist.train", "--config", storage.join(search_uri, "best.yaml")]
    args += ["--run.name", f"{search_uri.rpartition('/')[2]}-best", "--run.storage", config.run.storage]
    args += ["--data.train", *config.data.train]
    args += ["--data.fold", config.data.fold] if config.data.fold else ["--data.val", *config.data.val]
    if config.run.start:  # best.yaml leaves out what is a run's own
        args += ["--run.start", config.run.start, "--run.start-with", config.run.start_with]
    usual = Config().ray
    for name in type(usual).model_fields:
        if (value := getattr(config.ray, name)) != getattr(usual, name):
            flag = f"--ray.{name.replace('_', '-')}"
            args += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(args)


class RankedTrial(NamedTuple):
    result: Any  # Ray's
    best: float  # of its evaluations: of P, that of the checkpoint that the ensemble and predict would take
    last: float


def rank_trials(results: Iterable[Any], score: Score) -> list[RankedTrial]:
    """Return the trials with a score that is a number, the best first, and none that diverged: it would again."""
    trials = [_score(result, score) for result in results if not (result.metrics or {}).get(DIVERGED)]
    scored = [trial for trial in trials if math.isfinite(trial.best)]
    return sorted(scored, key=lambda trial: (-score.sign * trial.best, trial.result.metrics["trial_id"]))


def _score(result: Any, score: Score) -> RankedTrial:
    """Return a trial with its scores, NaN where it has none."""
    metrics, frame = result.metrics or {}, result.metrics_dataframe
    if frame is not None and score.key in frame:
        values = (frame if DIVERGED not in frame else frame[frame[DIVERGED].isna()])[score.key].tolist()
    else:
        values = []
    if score.key in metrics and not metrics.get(DIVERGED):
        values.append(metrics[score.key])
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    best = max(finite, key=lambda value: score.sign * value, default=math.nan)
    return RankedTrial(result, best, float(values[-1]) if values else math.nan)


def _trial_row(trial: RankedTrial, params: list[str], config: Config) -> list[str]:
    metrics, own = trial.result.metrics or {}, trial.result.config or {}
    values = [own.get(key, "") for key in params]
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    epochs = metrics.get(EPOCH, 0)
    if metrics.get(DIVERGED):
        end = "diverged"
    elif trial.result.error:
        end = "failed"
    else:
        end = "finished" if epochs >= config.train.epochs else "stopped early"
    return [metrics.get("trial_id", ""), *shown, str(epochs), f"{trial.best:.4f}", f"{trial.last:.4f}", end]


def _reasons(results: Iterable[Any]) -> list[str]:
    """Say in full why trials failed or diverged, each reason once."""
    from tune.experiment import explain

    trials_of: dict[str, list[str]] = {}
    for result in results:
        metrics = result.metrics or {}
        if why := explain(result.error) if result.error else metrics.get(DIVERGED):
            trials_of.setdefault(why, []).append(metrics.get("trial_id", "?"))
    return [f"{', '.join(names)}: {why}" for why, names in trials_of.items()]


def best_yaml(config: Config, params: dict[str, Any]) -> str:
    """Write the whole configuration with a trial's settings, without what a run chooses for itself."""
    merged = flatten(trial_config(json.loads(config.model_dump_json()), params, "best", config.run.storage))
    return yaml.safe_dump(
        unflatten({path: value for path, value in merged.items() if not is_own(path)}), sort_keys=False
    )


def count_room(config: Config, nodes: list[dict[str, float]]) -> int | None:
    """Return how many trials' ranks these nodes have room for; None where the cluster makes room.

    Tune itself would count drivers only and start all at once. Raises `InputError` where not one fits.
    """
    if config.ray.autoscaling:
        return None
    least = config.ray.num_ranks[0]
    each = {"CPU": config.ray.cpus_per_rank, "GPU": config.ray.gpus_per_rank}
    num_ranks = sum(min(int(node.get(name, 0) / share) for name, share in each.items() if share) for node in nodes)
    total_cpus, cpus = sum(node.get("CPU", 0) for node in nodes), least * config.ray.cpus_per_rank + DRIVER_CPUS
    room = min(num_ranks // least, int(total_cpus / cpus))
    if not room:
        raise InputError(
            f"a trial needs {cpus:g} CPU, {DRIVER_CPUS} of them for its driver; the cluster has {total_cpus:g}: lower "
            "ray.num_ranks or ray.cpus_per_rank, or add nodes (--ray.autoscaling where they come by themselves)"
        )
    return room


def check_same_search(
    search_uri: str, config: Config, search: SearchConfig, space: Space, *, data: dict[str, str]
) -> None:
    """Raise where this name belongs to a search of other settings, or of other data, which has checksums by the names
    of its sets; a restored search would mix the two."""
    uri = storage.join(search_uri, "search.json")
    wanted = _settings(config, search) | {"space": space} | data
    check_same_settings(uri, wanted, usual=_settings(Config(), SearchConfig()) | data, what=f"search {search_uri}")
    storage.write_bytes(uri, seal(wanted))


def check_same_settings(uri: str, wanted: dict[str, Any], *, usual: dict[str, Any], what: str) -> None:
    """Raise where the file at `uri` says that `what` was begun with other settings. One that was unknown then was what
    its default is, and data as it is now: `usual`."""
    if not storage.exists(uri):
        return
    kind = what.partition(" ")[0]
    try:
        stored = usual | unseal(storage.read_bytes(uri), unsealed=wanted)
    except Damaged as error:
        raise InputError(f"{uri} is damaged ({error}); restore it, or give this {kind} another --{kind}.name") from None
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise InputError(
                f"{what} was begun with {key} {stored.get(key)!r}, not {wanted.get(key)!r}; give this one another "
                f"--{kind}.name"
            )


def _settings(config: Config, search: SearchConfig) -> dict[str, Any]:
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(("run.name", "ray."))}
    own = search.model_dump(include={"trials", "algorithm", "grace_epochs", "reduction"})
    own["metric"] = metric_of(config, search)
    return settings | {f"search.{key}": value for key, value in own.items()}


def script() -> None:
    """Be `mtl-search`, or python -m tune.search."""
    run_command(main)


if __name__ == "__main__":
    script()
