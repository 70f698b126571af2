"""What the storage of a run tells of it, whoever trains it and wherever: `python -m mtl_dist.train --status RUN`."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.errors import Damaged, InputError, plain
from mtl_dist.families import FEATURES, objective_of
from mtl_dist.objective.scores import FIRST, NO_SCORE, constant_scores, label_sums
from mtl_dist.presets import read_config_file
from mtl_dist.progress import progress_bar
from mtl_dist.runs import CONFIG_NAME
from mtl_dist.runs.checkpoint import Checkpoint, best, committed, find_damage, read_state
from mtl_dist.runs.lives import read_lives
from mtl_dist.runs.patience import ENDED
from mtl_dist.runs.start import BEGAN_FROM, describe_start
from mtl_dist.runs.teacher import TAUGHT_BY
from mtl_dist.training.pace import describe_pace
from mtl_dist.training.plan import open_data
from mtl_dist.training.tracking import print_scores, read_records


def print_status(run_uri: str) -> None:
    """Print where a run is, its starts, its checkpoints and whether each is whole, and its scores.

    Every file of every checkpoint is read. Raises `InputError` where there is no run.
    """
    where = storage.join(run_uri, CONFIG_NAME)
    if not storage.exists(where):
        raise InputError(f"no run at '{run_uri}': {CONFIG_NAME} does not exist; expected <run.storage>/<run.name>")
    config = build_config(read_config_file(where))
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    lives, records = read_lives(run_uri), read_records(run_uri)
    checkpoints, torn = committed(run_uri)

    step, newest = max([checkpoint.step for checkpoint in checkpoints], default=0), _newest_state(checkpoints)
    total = _total_steps(config, newest)
    console.print(f"run          {run_uri}")
    if total:
        epochs = config.train.epochs
        state = "finished" if step >= total else "the same command continues it from there"
        if config.last_epoch < epochs and step >= total // epochs * config.last_epoch:
            state = f"finished, at train.stop_epoch {config.last_epoch}"
        elif step < total and ENDED in newest:
            state = f"finished, {newest[ENDED]}"
        console.print(f"saved        step {step} of {total} (epoch {step / total * epochs:.2f} of {epochs}); {state}")
    else:
        console.print(f"saved        step {step}; of how many its data tells, which is not to be read here")
    if began_from := newest.get(BEGAN_FROM):
        console.print(f"began with   {plain(describe_start(began_from))}", markup=False, soft_wrap=True)
    if taught_by := newest.get(TAUGHT_BY):
        console.print(f"taught by    {plain(taught_by['uri'])}, step {taught_by['step']}", markup=False, soft_wrap=True)
    console.print(f"starts       {len(lives)}, so {max(len(lives) - 1, 0)} restarts")
    if lives and lives[-1].get("typed"):
        console.print(f"command      {plain(lives[-1]['typed'])}", markup=False, soft_wrap=True)
    console.print(_lives_table(lives))

    if paces := [record for record in records if record["kind"] == "pace"]:
        norms = [record["gradient_norm"] for record in records if "gradient_norm" in record]
        norm = f"; norm of the gradient {norms[-1]:.3g}" if norms else ""
        console.print(f"steps        {plain(describe_pace(paces[-1]))}{norm}", markup=False, soft_wrap=True)

    top, damage = best(checkpoints), {}
    with progress_bar("reading checkpoints", len(checkpoints)) as advance:
        for checkpoint in checkpoints:
            damage[checkpoint.uri] = find_damage(checkpoint)
            advance(1)
    console.print(_checkpoints_table(checkpoints, top, damage))
    for reason in [*filter(None, damage.values()), *torn]:
        console.print(f"passed over  {plain(reason)}", markup=False, soft_wrap=True)

    evaluations = [record for record in records if record["kind"] == "eval"]
    if evaluations:
        rows = _constant_row(config, evaluations)
        print_scores(rows | {f"epoch {record['epoch'] + 1}": record["scores"] for record in evaluations})
    else:
        console.print(f"scores       {'none yet' if _is_scored(config) else NO_SCORE}")


def print_ending(config: Config) -> None:
    """Print the best and the last scores of a finished run, where its best checkpoint is, and what to do with it.

    Without a validation set: where its last checkpoint is.
    """
    uri = config.run.uri
    checkpoints, _ = committed(uri)
    if not _is_scored(config):
        last = f"last    {checkpoints[-1].uri}\n{_next_commands(config)}" if checkpoints else ""
        print(f"run {uri}: {NO_SCORE}\n{last}", flush=True)
        return
    top = best(checkpoints)
    evaluations = [record for record in read_records(uri) if record["kind"] == "eval"]
    rows = _constant_row(config, evaluations)
    if top:
        rows |= {f"best: epoch {it['epoch'] + 1}": it["scores"] for it in evaluations if it["step"] == top.step}
    rows |= {
        f"last: epoch {it['epoch'] + 1}": it["scores"] for it in evaluations[-1:] if not top or it["step"] > top.step
    }
    print_scores(rows, title=f"run {uri}")
    if not top:
        return
    print(f"best    {top.uri} ({top.competes_by.title} {top.score:.4f})\n{_next_commands(config)}", flush=True)


def _next_commands(config: Config) -> str:
    """Say what to do with a finished run."""
    uri = config.run.uri
    run, report = shlex.quote(uri), shlex.quote(f"{config.run.name}-report")
    if not objective_of(config.model.name).reads_labels:
        begin = f"--run.start {run} --run.start-with backbone --model.backbone {config.model.backbone}"
        return (
            f"next    python -m mtl_dist.report {run} --out {report}\n"
            f"        python -m mtl_dist.train --local --preset small --run.name NAME {begin} "
            "--data.train ... --data.val ..."
        )
    ensemble = shlex.quote(storage.join(config.run.storage, "ensemble"))
    what = "--extractors EXTRACTOR --input VIDEO" if config.model.backbone == FEATURES else "--input PICTURES"
    commands = [
        f"next    python -m mtl_dist.predict --runs {run} {what} --out predictions.csv",
        f"        python -m mtl_dist.report {run} --out {report}",
    ]
    if config.data.fold:
        others = f"{run} RUNS_OF_OTHER_FOLDS"
        commands.append(f"        python -m mtl_dist.ensemble --runs {others} --out {ensemble}")
    elif _is_scored(config):
        commands.append(f"        python -m mtl_dist.ensemble --runs {run} OTHER_RUN --out {ensemble}")
    return "\n".join(commands)


def _is_scored(config: Config) -> bool:
    return bool(config.data.val or config.data.fold)


def _newest_state(checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """Return what the newest readable checkpoint notes."""
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(Damaged, FileNotFoundError):  # damaged, or deleted meanwhile
            return read_state(checkpoint)
    return {}


def _total_steps(config: Config, newest: dict[str, Any]) -> int | None:
    """Return the steps of the whole run, as its newest checkpoint notes, else as its data tells; else None."""
    if isinstance(total := newest.get("total_steps"), int):
        return total
    try:
        return open_data(config).steps_per_epoch * config.train.epochs
    except InputError:  # not to be read from here: the storage alone tells of a run
        return None


def _constant_row(config: Config, evaluations: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the constant predictor's row, as it was recorded, else what label counts tell of it.

    Nothing, and a note, where neither is to be read here.
    """
    if evaluations and "constant" in evaluations[-1]:
        return {"constant predictor": evaluations[-1]["constant"]}
    try:
        return {"constant predictor": constant_scores(label_sums(open_data(config).val.labels))}
    except InputError as error:
        print(f"note: without the constant predictor's row: {plain(str(error))}", flush=True)
        return {}


def _lives_table(lives: list[dict[str, Any]]) -> Table:
    table = Table("started", "from step", "ranks", "rank 0 on")
    for life in lives:
        cells = life["started"], "" if life["step"] is None else life["step"], life["num_ranks"], life["host"]
        table.add_row(*(escape(plain(str(cell))) for cell in cells))
    return table


def _checkpoints_table(checkpoints: list[Checkpoint], top: Checkpoint | None, damage: dict[str, str | None]) -> Table:
    competes_by = (top or checkpoints[-1]).competes_by.title if checkpoints else FIRST.title
    table = Table("checkpoint", "step", "saved", "MB", competes_by, "whole")
    for checkpoint in checkpoints:
        score = "" if checkpoint.score is None else f"{checkpoint.score:.4f}{' best' if checkpoint is top else ''}"
        table.add_row(
            checkpoint.uri.rpartition("/")[2],
            str(checkpoint.step),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.saved_at)),
            f"{sum(about['bytes'] for about in checkpoint.files.values()) / 1e6:.1f}",
            score,
            "no" if damage[checkpoint.uri] else "yes",
        )
    return table
