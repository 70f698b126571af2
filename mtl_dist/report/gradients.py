"""What the tasks ask of what they share, over training: how strongly each pulls, and whether two pull apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtl_dist.report.drawing import COLOURS, Figure, canvas, save_png
from mtl_dist.report.results import Method
from mtl_dist.report.tables import write_csv
from mtl_dist.training.tracking import read_records

POINTS = 40  # of a line: steps are averaged to about so many
PANELS = {"norm": "norm of a gradient", "cosine": "cosine of two"}

Lines = dict[str, list[tuple[int, float]]]  # by task, or by pair of tasks: steps with their values


def draw_gradients(method: Method, place: int) -> Figure | None:
    """Draw the records of a method's shown run; None where it has none."""
    from matplotlib.ticker import LogLocator

    result = method.shown
    records = [record for record in read_records(result.uri) if record.get("gradients")]
    found = {kind: lines for kind in PANELS if (lines := _lines(records, kind))}  # a single task has no cosines
    if not found:
        return None
    rows: list[tuple] = [("kind", "tasks", "step", "value")]
    with canvas(5.7, 3.1) as figure:
        for axes, (kind, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            for colour, (name, points) in zip(COLOURS, lines.items()):
                axes.plot(*zip(*points), color=colour, label=name.replace(" ", ", ").upper(), linewidth=1.4)
                rows += [(kind, name, step, f"{value:.6g}") for step, value in points]
            axes.set(ylabel=PANELS[kind], xlabel="training step", xlim=(0, None))
            if kind == "norm":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(lambda value, place: "")
            else:
                axes.set_ylim(-1, 1)
                axes.axhline(0, color="#8b929a", linewidth=1, linestyle=":")
            axes.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, columnspacing=1, handlelength=1
            )
        png = save_png(figure)
    cosines = found.get("cosine", {})
    told = ", ".join(f"{name.replace(' ', ' and ')} {_mean(points):+.2f}" for name, points in cosines.items())
    caption = (
        f"{result.name}. Gradients of the tasks' losses, before any weight, by the last tensor that all tasks share; "
        "means of neighbouring steps. Below 0 two tasks pull apart. Good fixed weights are known to do as well as "
        "weights by gradients (arXiv 2201.04122): this is to choose them by."
    )
    alt = f"Norms and cosines of the tasks' gradients of {method.label} over training; mean cosines: {told or 'none'}."
    title = f"{method.label}: gradients"
    return Figure(f"gradients_{place}", title, caption, alt, png, write_csv(rows), is_dense=True)


def _lines(records: list[dict[str, Any]], kind: str) -> Lines:
    """Return the means of neighbouring steps, of every task or pair that some step has."""
    lines: Lines = {}
    for part in np.array_split(np.arange(len(records)), min(POINTS, len(records)) or 1):
        values: dict[str, list[tuple[int, float]]] = {}
        for record in (records[number] for number in part):
            for name, value in record["gradients"][kind].items():
                values.setdefault(name, []).append((record["step"], value))
        for name, points in values.items():
            lines.setdefault(name, []).append((round(np.mean([step for step, _ in points])), _mean(points)))
    return lines


def _mean(points: list[tuple[int, float]]) -> float:
    return float(np.mean([value for _, value in points]))
