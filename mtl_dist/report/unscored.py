"""The report of runs without a validation set: what they were trained on, and what the loss came down to."""

from __future__ import annotations

import itertools

from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES, objective_of
from mtl_dist.objective.masked import TERM
from mtl_dist.objective.scores import HOW_TO_SCORE, NO_SCORE
from mtl_dist.report.curves import mean_losses
from mtl_dist.report.drawing import COLOURS, Figure, canvas, save_png
from mtl_dist.report.options import ReportCommand
from mtl_dist.report.origin import weights_block
from mtl_dist.report.pace import draw_pace
from mtl_dist.report.page import Part, html
from mtl_dist.report.tables import write_csv
from mtl_dist.runs.weights import Weights
from mtl_dist.tasks import TASKS
from mtl_dist.training.tracking import read_records

ABOUT = f"{NO_SCORE.capitalize()}. What is shown is how these runs were trained; {HOW_TO_SCORE}."


def check_scored_alike(opened: dict[str, Weights], command: ReportCommand) -> bool:
    """Return whether runs have scores, by their URIs. Raises `InputError` where only some have."""
    without = [uri for uri, weights in opened.items() if not weights.is_scored]
    if not without:
        return True
    if len(without) < len(opened):
        raise InputError(f"{', '.join(without)}: {NO_SCORE}, and other runs have one; report them apart")
    if command.ensemble or command.val:
        given = "--ensemble" if command.ensemble else "--val"
        raise InputError(f"{given} is given, and {', '.join(without)}: {NO_SCORE}; leave it out")
    return False


def write_unscored(runs: dict[str, tuple[str, Weights]]) -> tuple[list[Figure], list[Part]]:
    """Draw runs by name, each with its URI; return the figures, and the chapters of the page."""
    lines = {}
    for name, (uri, weights) in runs.items():
        reads_labels = objective_of(weights.config.model.name).reads_labels
        lines[name] = mean_losses(read_records(uri), TASKS if reads_labels else (TERM,))
    figures = [_draw(lines)] if any(lines.values()) else []
    figures += filter(None, (draw_pace(name, name, uri, n) for n, (name, (uri, _)) in enumerate(runs.items(), start=1)))
    blocks = [
        weights_block(name, uri, FAMILIES[weights.config.model.name].title, weights, validation=NO_SCORE)
        for name, (uri, weights) in runs.items()
    ]
    parts = [Part("training", "Training", [html.figure(figure) for figure in figures])] if figures else []
    return figures, [*parts, Part("runs", "Runs and commands", blocks)]


def _draw(lines: dict[str, list[tuple[int, float]]]) -> Figure:
    rows: list[tuple] = [("run", "step", "training loss")]
    known = {name: points for name, points in lines.items() if points}
    with canvas(6.5, 3.8) as figure:
        axes = figure.subplots()
        for (name, points), colour in zip(known.items(), itertools.cycle(COLOURS)):
            axes.plot(*zip(*points), color=colour, label=name)
            rows += [(name, step, f"{value:.6f}") for step, value in points]
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss")
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=2)
        png = save_png(figure)
    ends = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in known.items())
    caption = "The sum of the losses, whatever their weights were; means of neighbouring steps."
    alt = f"Line chart of the training loss against training steps: {ends}."
    return Figure("loss", "Training loss", caption, alt, png, write_csv(rows))
