"""Reliability: how often predictions of a confidence are right; expected calibration error (Guo et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtl_dist.report.drawing import Figure, Style, canvas, save_png
from mtl_dist.report.results import CONSTANT, Method, Result
from mtl_dist.report.tables import Table, number, text, write_csv

NUM_BINS = 10
LEAST = 5  # predictions of a bin that is drawn; the table and the CSV have all
TASKS = {"expr": "EXPR, the chosen class", "au": "AU, all of them"}


class Reliability(NamedTuple):
    """Predictions in bins of confidence of equal width."""

    count: np.ndarray  # (bins,)
    confidence: np.ndarray  # (bins,) mean
    observed: np.ndarray  # (bins,) share that is right

    @property
    def error(self) -> float:
        """The expected calibration error: |observed - confidence|, weighted by count."""
        return float((self.count * np.abs(self.observed - self.confidence)).sum() / max(self.count.sum(), 1))


def reliability(confidence: np.ndarray, is_right: np.ndarray) -> Reliability:
    """Put predictions (n,) into bins (i/10, (i+1)/10], 0 in the first."""
    place = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(place, minlength=NUM_BINS)
    sums = (np.bincount(place, weights=values, minlength=NUM_BINS) for values in (confidence, is_right))
    return Reliability(count, *(total / np.maximum(count, 1) for total in sums))


def task_reliability(result: Result, task: str) -> Reliability | None:
    """EXPR: the probability of the chosen class. AU: all probabilities of active. None without labels."""
    predictions, targets = result.predicted.predictions, result.predicted.targets
    if task == "expr":
        known = targets.expr_mask
        chosen, confidence = predictions.expr[known].argmax(-1), predictions.expr[known].max(-1)
        is_right = chosen == targets.expr[known]
    else:
        confidence, is_right = predictions.au[targets.au_mask], targets.au[targets.au_mask] > 0
    return reliability(np.asarray(confidence, float), is_right) if len(confidence) else None


def draw_reliability(methods: list[Method], styles: dict[str, Style]) -> tuple[Figure | None, Table | None]:
    """Reliability diagrams of EXPR and AU with a line a method, and the calibration errors."""
    shown = [method for method in methods if method.label != CONSTANT]
    bins_of = {(m.label, task): task_reliability(m.shown, task) for m in shown for task in TASKS}
    tasks = [task for task in TASKS if bins_of[shown[0].label, task] is not None]
    if not tasks:
        return None, None
    rows: list[tuple] = [("task", "method", "run", "from", "to", "predictions", "mean confidence", "observed")]
    with canvas(3.9 * len(tasks), 4.3) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(tasks)))
        for axes, task in zip(panels, tasks):
            axes.plot([0, 1], [0, 1], color="#8b929a", linewidth=1, linestyle=":")
            for method in shown:
                bins, style = bins_of[method.label, task], styles[method.label]
                full = bins.count >= LEAST
                axes.plot(bins.confidence[full], bins.observed[full], color=style.colour, marker=style.marker,
                          markersize=5, label=method.label if axes is panels[0] else None)  # fmt: skip
                for i in range(NUM_BINS):
                    rows.append((task, method.label, method.shown.name, i / NUM_BINS, (i + 1) / NUM_BINS, bins.count[i],
                                 f"{bins.confidence[i]:.6f}", f"{bins.observed[i]:.6f}"))  # fmt: skip
            axes.set(title=TASKS[task], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", aspect="equal",
                     ylabel="share that is right" if task == "expr" else "share that is active")  # fmt: skip
        figure.legend(loc="outside lower center", ncols=2)
        png = save_png(figure)
    errors = [[text(m.label), *(number(bins_of[m.label, task].error) for task in tasks)] for m in shown]
    table = Table("calibration", "Expected calibration error (10 bins; lower is better)",
                  ("Method", *(TASKS[task] for task in tasks)), errors, "",
                  tuple(TASKS[task] for task in tasks))  # fmt: skip
    alt = "Reliability diagrams. " + "; ".join(
        f"{m.label}: calibration error {', '.join(f'{t.upper()} {bins_of[m.label, t].error:.3f}' for t in tasks)}"
        for m in shown
    )
    caption = (
        "On the dotted line predictions are as often right as they say; below it they are too sure. Bins of fewer "
        f"than {LEAST} predictions are not drawn."
    )
    figure = Figure("reliability", "Reliability", caption, f"{alt}.", png, write_csv(rows), is_wide=len(tasks) > 1)
    return figure, table
