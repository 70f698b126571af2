"""What each step of calibration gains on videos that it was not fitted on: for score.json, and as a table."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Column, Table

from mtl_dist.ensemble import by_task
from mtl_dist.ensemble.by_task import ByTask
from mtl_dist.ensemble.calibrated import Fitted
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.bootstrap import FEW_VIDEOS
from mtl_dist.objective.gains import NUM_DRAWS, Compared, measure_gains
from mtl_dist.objective.metrics import AU_THRESHOLD, grouped_sums
from mtl_dist.objective.scores import FIRST, find_score
from mtl_dist.progress import progress_bar
from mtl_dist.shards.splits import group_rows
from mtl_dist.tasks import TASKS

TITLE = "what each step gains on videos that it was not fitted on, with 95% intervals over the videos"
WIDTH = 140  # of a log or a file, as the tables of scores have


def about_gains(
    fitted: Fitted | None, chosen: ByTask | None, mean: PredictedRows, videos: list[str]
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return {step: {score: {gain, low, high, videos}}} by the names of steps and the keys of scores.

    `mean` is the plain mean of rows in `videos`: what taking each task from its best checkpoint is compared with.
    """
    compared = fitted.compared if fitted else {}
    if chosen:
        video, (_, predictions, targets) = group_rows(pa.array(videos), None), mean
        au_on = predictions.au > AU_THRESHOLD
        plain = grouped_sums(predictions, targets, video, len(chosen.video_sums), au_on=au_on)
        compared |= {by_task.NAME: Compared(plain, chosen.video_sums, TASKS)}
    if not compared:
        return {}
    with progress_bar("drawing videos", NUM_DRAWS) as advance:
        gains = measure_gains(compared, progress=advance)
    return {name: {key: gain._asdict() for key, gain in of_step.items()} for name, of_step in gains.items()}


def render_gains(report: dict[str, Any]) -> str:
    """Return the gains that score.json has as a table of text; nothing where there are none."""
    console = Console(highlight=False, file=io.StringIO())
    print_gains(report, console)
    return console.file.getvalue()


def print_gains(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the gains that score.json has as a table; nothing where there are none."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    if report["gains"]:
        console.print(TITLE, soft_wrap=True)
        console.print(_gains_table(report["gains"], report["calibration"] or {}))
        for note in _notes(report):
            console.print(note, soft_wrap=True)


def _gains_table(gains: dict[str, dict[str, Any]], calibration: dict[str, Any]) -> Table:
    keys, has_choices = (FIRST.key, *TASKS), "kept" in calibration
    chosen = ("kept", f"kept by how many of {len(calibration['folds'])} folds") if has_choices else ()
    table = Table(Column("", no_wrap=True), *(find_score(key).title for key in keys), *chosen)
    for name, of_step in gains.items():
        cells = [_cell(of_step.get(key)) for key in keys]
        table.add_row(name, *cells, *(_choice(name.removeprefix("+ "), calibration) if has_choices else ()))
    return table


def _choice(step: str, calibration: dict[str, Any]) -> tuple[str, str]:
    """Say for which tasks a step is kept, and by how many folds for each."""
    if step not in calibration["kept_by_folds"]:
        return "", ""
    tasks = ", ".join(task.upper() for task in calibration["kept"].get(step, ()))
    counts = calibration["kept_by_folds"][step]
    return tasks or "left out", ", ".join(f"{task.upper()} {count}" for task, count in counts.items())


def _cell(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    between = "" if gain["low"] is None else f"\n{gain['low']:+.4f} to {gain['high']:+.4f}"
    few = f"\nrough: {gain['videos']} videos" if between and gain["videos"] < FEW_VIDEOS else ""
    return f"{gain['gain']:+.4f}{between}{few}"


def _notes(report: dict[str, Any]) -> list[str]:
    """Say what the numbers of a table are of."""
    notes = []
    if "kept" in (report["calibration"] or {}):
        notes.append(
            "Each step was tried on top of what is kept of those above it, for all its tasks together; units at "
            "thresholds fitted with it, where thresholds are among the steps. What is kept is for new data; the "
            "calibrated score is of folds that each chose on the others alone."
        )
    if by_task.NAME in report["gains"]:
        notes.append(f"'{by_task.NAME}' is compared with the plain mean.")
    return notes
