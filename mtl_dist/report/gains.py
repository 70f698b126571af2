"""What every step of an ensemble's calibration gains, with intervals over videos, and for which tasks it is kept."""

from __future__ import annotations

import statistics
from typing import Any

from mtl_dist.objective.bootstrap import FEW_VIDEOS
from mtl_dist.objective.scores import FIRST, find_score
from mtl_dist.report.results import ENSEMBLE, Result
from mtl_dist.report.tables import NOT_KNOWN, Cell, Table, text
from mtl_dist.tasks import TASKS

KEYS = (FIRST.key, *TASKS)


def gains_tables(results: list[Result]) -> list[Table]:
    """The gains that score.json has, a table for all ensembles of one method; what was made before has none."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if (result.score_file or {}).get("gains"):
            alike.setdefault(result.method, []).append(result.score_file)
    return [_gains_table(f"gains_{n}", method, abouts) for n, (method, abouts) in enumerate(alike.items(), start=1)]


def _gains_table(name: str, method: str, abouts: list[dict[str, Any]]) -> Table:
    has_choices = "kept" in (abouts[0].get("calibration") or {})
    rows = []
    for step in abouts[0]["gains"]:
        of_step = [about["gains"].get(step, {}) for about in abouts]
        cells = [_cell([gains[key] for gains in of_step if key in gains]) for key in KEYS]
        rows.append([text(step), *cells, *([_choice(step.removeprefix("+ "), abouts)] if has_choices else ())])
    note = "On videos that a step was not fitted on. Bold: the interval does not hold 0, and the labels are of "
    note += f"{FEW_VIDEOS} videos at least."
    if has_choices:
        note += (
            " Each step was tried on top of what is kept of those above it, for all its tasks together. Kept: what new "
            "data gets; the calibrated score is of folds that each chose on the others alone."
        )
    if len(abouts) > 1:
        note += f" Means of {len(abouts)} ensembles, with their standard deviation."
    for other in (step for step in abouts[0]["gains"] if not step.startswith("+ ")):
        note += f" '{other}' is compared with the plain mean."
    caption = "What each step gains, with its 95% interval over the videos"
    caption += "" if method == ENSEMBLE else f": {method}"
    columns = ("Step", *(find_score(key).title for key in KEYS), *(("kept",) if has_choices else ()))
    return Table(name, caption, columns, rows, note)


def _cell(gains: list[dict[str, Any]]) -> Cell:
    """One gain with its interval, or the mean of several with their deviation; nothing of a task that is left alone."""
    if not gains:
        return Cell(NOT_KNOWN, is_number=True)
    mean = statistics.fmean(gain["gain"] for gain in gains)
    if len(gains) > 1:
        return Cell(f"{mean:+.4f}", mean, is_number=True, below=f"± {statistics.stdev(g['gain'] for g in gains):.4f}")
    (gain,) = gains
    if gain["low"] is None:
        return Cell(f"{mean:+.4f}", mean, is_number=True, below="no interval")
    is_apart = not gain["low"] <= 0 <= gain["high"] and gain["videos"] >= FEW_VIDEOS
    return Cell(
        f"{mean:+.4f}", mean, is_number=True, is_apart=is_apart, below=f"{gain['low']:+.4f} to {gain['high']:+.4f}"
    )


def _choice(step: str, abouts: list[dict[str, Any]]) -> Cell:
    """For which tasks a step is kept; below, by how many folds for each, or by how many of several ensembles."""
    found = [about["calibration"] for about in abouts if step in about["calibration"]["kept_by_folds"]]
    if not found:
        return text("")
    by_folds, tasks = found[0]["kept_by_folds"][step], found[0]["kept_by_folds"][step].keys()
    if len(found) > 1:
        counts = {task: sum(task in of["kept"].get(step, ()) for of in found) for task in tasks}
        return text(", ".join(f"{task.upper()} in {count} of {len(found)}" for task, count in counts.items()))
    kept = ", ".join(task.upper() for task in found[0]["kept"].get(step, ())) or "left out"
    counts = ", ".join(f"{task.upper()} {count}" for task, count in by_folds.items())
    return text(kept)._replace(below=f"{counts} of {len(found[0]['folds'])} folds")
