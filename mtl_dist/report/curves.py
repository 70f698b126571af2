"""Figures 2-6 of Haider et al. 2022 (arXiv 2207.10878): scores and loss against training steps, a line a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_dist.objective.scores import SCORES, Score
from mtl_dist.report.drawing import Figure, Style, canvas, save_png
from mtl_dist.report.results import CONSTANT, ENSEMBLE, Method, Result
from mtl_dist.report.tables import write_csv
from mtl_dist.tasks import TASKS
from mtl_dist.training.tracking import read_records

LOSS_POINTS = 40  # of a line: steps are averaged to about so many
MARK_EVERY = 8  # of these: where a line's marker stands
LINES = ("-", "--", ":", "-.")


def draw_curves(methods: list[Method], styles: dict[str, Style]) -> tuple[list[Figure], list[str]]:
    """Return figures 2-6 and those of further scores, and a sentence for whatever a run has no records of."""
    runs = [(method, result) for method in methods for result in method.results if result.member]
    records = {id(result): read_records(result.uri) for _, result in runs}
    figures, notes = {}, []
    for score in sorted((score for score in SCORES if score.figure), key=lambda score: score.figure):
        which, label = f"Figure {score.figure}", score.name
        lines = {id(result): _scores(records[id(result)], score.key) for _, result in runs}
        if methods[0].results[0].scores.get(score.key) is None:
            notes.append(f"{which}, {label}: the validation set has no labels of it.")
            continue
        notes += _missing(label, [result for _, result in runs if not lines[id(result)]])
        if any(lines.values()):
            name = f"fig{score.figure}_{label.lower().replace(' ', '_')}"
            figures[score.figure] = _draw(name, f"{which}. {label}", label, methods, runs, lines, styles, score=score)
        else:
            notes.append(f"{which}, {label}: no run has records of it.")
    losses = {id(result): mean_losses(records[id(result)]) for _, result in runs}
    notes += _missing("loss", [result for _, result in runs if not losses[id(result)]])
    if any(losses.values()):
        figures[6] = _draw("fig6_loss", "Figure 6. Training loss", "training loss", methods, runs, losses, styles)
    return [figures[number] for number in sorted(figures)], notes


def _missing(label: str, results: list[Result]) -> list[str]:
    if not results:
        return []
    names = ", ".join(result.name for result in results)
    return [f"{label} is not recorded in: {names} (no records were kept, or the run is older than this score)."]


def _scores(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    evaluations = [record for record in records if record.get("kind") == "eval"]
    return [(r["step"], r["scores"][key]) for r in evaluations if r["scores"].get(key) is not None]


def mean_losses(records: list[dict[str, Any]], terms: Sequence[str] = TASKS) -> list[tuple[int, float]]:
    """Return steps with the sum of the tasks' losses, each the mean of neighbouring steps: those whose batch has labels
    of it.

    Not what was minimised: the weights of balancers differ, and change.
    """
    steps = [[r["step"], *(r["loss"].get(term, np.nan) for term in terms)] for r in records if r.get("kind") == "step"]
    if not steps:
        return []
    parts = np.array_split(np.array(steps, float), min(LOSS_POINTS, len(steps)))
    return [(round(part[:, 0].mean()), sum(map(_mean_known, part[:, 1:].T))) for part in parts]


def _mean_known(losses: np.ndarray) -> float:
    known = losses[np.isfinite(losses)]
    return float(known.mean()) if len(known) else 0.0


def _draw(name, title, label, methods, runs, lines, styles, *, score: Score | None = None) -> Figure:
    rows: list[tuple] = [("run", "method", "step", label)]
    with canvas(4.5, 3.3) as figure:
        axes = figure.subplots()
        for method in methods:
            style = styles[method.label]
            if method.kind:
                if score is None:
                    continue
                value = float(np.mean(method.values(score.key)))
                axes.axhline(value, color=style.colour, linestyle=":" if method.label == CONSTANT else "--",
                             linewidth=1.3, label=method.label)  # fmt: skip
                rows.append(("", method.label, "", f"{value:.6f}"))
                continue
            shown = [result for other, result in runs if other is method and lines[id(result)]]
            for place, result in enumerate(shown):
                steps, values = zip(*lines[id(result)])
                axes.plot(steps, values, color=style.colour, linestyle=LINES[place % len(LINES)],
                          marker=style.marker, markevery=1 if score else MARK_EVERY, markersize=4,
                          alpha=1 if place == 0 else 0.75,
                          label=method.label if place == 0 else None)  # fmt: skip
                rows += [(result.name, method.label, step, f"{value:.6f}") for step, value in zip(steps, values)]
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=2)
        png = save_png(figure)
    best = ", ".join(f"{result.name} ends at {lines[id(result)][-1][1]:.3f}" for _, result in runs if lines[id(result)])
    has_seeds = any(len(method.results) > 1 for method in methods if not method.kind)
    caption = "A line a run; further seeds of a method are dashed." if has_seeds else "A line a run."
    if score:
        caption += " The validation set, after every evaluation."
        caption += " Lower is better." * (score.sign < 0)
        if score.floor:
            caption += " The constant predictor is the one that is best at this score."
        if any(method.kind == ENSEMBLE for method in methods):
            caption += " The ensemble is not trained: its score is a level."
    else:
        caption += " The sum of the tasks' losses, whatever their weights were; means of neighbouring steps."
    return Figure(name, title, caption, f"Line chart of {label} against training steps: {best}.", png, write_csv(rows))
