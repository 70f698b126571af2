"""Figures of classes: confusion matrices, F1 of every expression and action unit."""

from __future__ import annotations

import statistics

import numpy as np

from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.scores import Score
from mtl_dist.report.drawing import INK, Figure, Style, canvas, save_png
from mtl_dist.report.results import CONSTANT, Method
from mtl_dist.report.tables import class_scores, class_values, write_csv
from mtl_dist.tasks import EXPRESSIONS


def draw_confusion(method: Method, place: int) -> Figure | None:
    """A confusion matrix of counts, coloured by the share of the labelled class; None without labels."""
    result = method.shown
    counts = result.sums().confusion
    if not counts.sum():
        return None
    labelled = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(labelled, 1)
    with canvas(4.5, 4.4) as figure:
        axes = figure.subplots()
        axes.grid(False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:  # zeros would be most of what is read
                axes.text(column, row, f"{share:.0%}\n{counts[row, column]:,.0f}", ha="center", va="center",
                          fontsize=9, color="white" if share > 0.55 else INK)  # fmt: skip
        ticks = range(len(EXPRESSIONS))
        axes.set_xticks(ticks, EXPRESSIONS, rotation=40, ha="right")
        axes.set_yticks(ticks, [f"{name} ({n:,.0f})" for name, n in zip(EXPRESSIONS, labelled[:, 0])])
        axes.set_xlabel("predicted")
        axes.set_ylabel("labelled")
        axes.spines[:].set_visible(False)
        png = save_png(figure)
    off = shares - np.diag(np.diag(shares))
    worst = np.unravel_index(off.argmax(), off.shape)
    alt = (
        f"Confusion matrix of 8 expressions of {method.label}: {np.trace(counts) / counts.sum():.0%} of "
        f"{counts.sum():,.0f} frames are right; most often {EXPRESSIONS[worst[0]]} is taken for "
        f"{EXPRESSIONS[worst[1]]} ({off[worst]:.0%})."
    )
    rows = [("labelled", *EXPRESSIONS), *((name, *map(int, row)) for name, row in zip(EXPRESSIONS, counts))]
    caption = f"{result.name}: frames, and their share of the labelled class."
    return Figure(f"confusion_{place}", method.label, caption, alt, png, write_csv(rows))


def draw_f1(methods: list[Method], styles: dict[str, Style], counts: LabelCounts) -> list[Figure]:
    """F1 of every class as bars, a colour a method, the constant predictor as a tick."""
    figures = []
    for score, about in class_scores(counts):
        order = list(about.counts)[::-1]  # active of labelled
        frames = [" of ".join(f"{n:,}" for n in each) for each in zip(*(about.counts[what] for what in order))]
        name, unit = f"{score.title.lower()}_{about.classes}", f"{' of '.join(order)} frames"
        figures.append(_bars(name, score, frames, unit, methods, styles))
    return figures


def _bars(name: str, score: Score, frames: list[str], unit: str, methods, styles) -> Figure:
    title, classes = score.name, score.names
    bars = [method for method in methods if method.label != CONSTANT]
    height, places = 0.8 / len(bars), np.arange(len(classes))
    rows: list[tuple] = [("class", unit, "method", f"mean {score.title}", "standard deviation over seeds", "n")]
    tops = {}
    with canvas(4.5, 1.4 + len(classes) * max(0.36, 0.13 * len(bars))) as figure:
        axes = figure.subplots()
        axes.grid(False, axis="y")
        for method in methods:
            values = [class_values(method, score, each) for each in classes]
            means = np.array([statistics.fmean(of_seeds) if of_seeds else 0.0 for of_seeds in values])
            spread = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in values]
            for each, count, mean, deviation, of_seeds in zip(classes, frames, means, spread, values):
                rows.append((each, count.replace(",", ""), method.label, f"{mean:.6f}",
                             f"{deviation:.6f}", len(of_seeds)))  # fmt: skip
            style = styles[method.label]
            if method.label == CONSTANT:
                axes.vlines(
                    means, places - 0.42, places + 0.42, color=style.colour, linewidth=2, label=method.label, zorder=3
                )
                continue
            tops[method.label] = f"{classes[int(means.argmax())]} is best with {means.max():.2f}"
            at = places - 0.4 + height * (bars.index(method) + 0.5)
            axes.barh(at, means, height * 0.9, facecolor=style.colour, hatch=style.hatch, edgecolor="white",
                      linewidth=0, label=method.label, xerr=spread if any(spread) else None,
                      error_kw={"elinewidth": 1, "ecolor": INK})  # fmt: skip
        axes.set_yticks(places, [f"{each} ({count})" for each, count in zip(classes, frames)], fontsize=9)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel(score.title)
        figure.legend(loc="outside lower center", ncols=2)
        png = save_png(figure)
    alt = f"Bar chart: {title}. " + "; ".join(f"{label}: {top}" for label, top in tops.items()) + "."
    caption = f"Beside every class: {unit}. Grey ticks: the constant predictor."
    if any(len(method.results) > 1 for method in methods):
        caption += " Bars are means over seeds, with the standard deviation."
    return Figure(name, title, caption, alt, png, write_csv(rows))
