"""Figures of valence and arousal: predicted against labelled, and both on the circumplex of affect (Russell 1980)."""

from __future__ import annotations

import numpy as np

from mtl_dist.report.drawing import Figure, canvas, save_png
from mtl_dist.report.results import Method
from mtl_dist.report.tables import write_csv

# Degrees from "pleasant" to "aroused", about as Russell (1980) places the words.
WORDS = {
    "happy": 8, "excited": 49, "astonished": 70, "angry": 99, "afraid": 116, "distressed": 138, "miserable": 189,
    "sad": 208, "bored": 242, "sleepy": 272, "calm": 316, "content": 335,
}  # fmt: skip
FEW = 400  # points that are drawn one by one
BINS = 28


def draw_affect(method: Method, place: int) -> list[Figure]:
    """The scatter and the circumplex of a method; empty without labels."""
    result = method.shown
    predictions, targets = result.predicted.predictions, result.predicted.targets
    known = targets.va_mask
    if not known.any():
        return []
    labelled, predicted = targets.va[known], predictions.va[known].clip(-1, 1)
    rows = [("row", "labelled valence", "labelled arousal", "predicted valence", "predicted arousal")]
    for row, truth, guess in zip(result.predicted.rows[known], labelled, predicted):
        rows.append((row, *(f"{value:.4f}" for value in (*truth, *guess))))
    data = write_csv(rows)
    return [
        _scatter(method, f"va_scatter_{place}", labelled, predicted, data),
        _circumplex(method, f"circumplex_{place}", labelled, predicted, data),
    ]


def _scatter(method: Method, name: str, labelled: np.ndarray, predicted: np.ndarray, data: bytes) -> Figure:
    result = method.shown
    scores = {"valence": result.scores["ccc_v"], "arousal": result.scores["ccc_a"]}
    with canvas(5.4, 3.1) as figure:
        for axes, (side, (what, ccc)) in zip(figure.subplots(1, 2), enumerate(scores.items())):
            x, y = labelled[:, side], predicted[:, side]
            axes.plot([-1, 1], [-1, 1], color="#8b929a", linewidth=1, linestyle=":")
            if len(x) <= FEW:
                axes.plot(x, y, "o", color="#0072B2", markersize=4, alpha=0.45, markeredgewidth=0)
            else:
                axes.hexbin(
                    x, y, gridsize=36, extent=(-1, 1, -1, 1), bins="log", cmap="Blues", mincnt=1, linewidths=0.2
                )
            axes.set(title=f"{what}, CCC {ccc:.3f}", xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xlabel="labelled",
                     ylabel="predicted")  # fmt: skip
            axes.set_xticks([-1, 0, 1])
            axes.set_yticks([-1, 0, 1])
        png = save_png(figure)
    alt = f"Predicted against labelled valence and arousal of {method.label} on {len(labelled):,} frames: " + ", ".join(
        f"CCC {what} {ccc:.3f}" for what, ccc in scores.items()
    )
    how = "A point a frame." if len(labelled) <= FEW else "Darker: more frames (logarithmic)."
    title = f"{method.label}: predicted against labelled"
    return Figure(name, title, f"{result.name}. {how} Dotted: as labelled.", f"{alt}.", png, data, is_dense=True)


def _circumplex(method: Method, name: str, labelled: np.ndarray, predicted: np.ndarray, data: bytes) -> Figure:
    from matplotlib.patches import Circle
    from matplotlib.patheffects import withStroke

    with canvas(5.8, 3.1) as figure:
        panels = figure.subplots(1, 2)
        for axes, points, title in zip(panels, (labelled, predicted), ("labelled", f"predicted: {method.label}")):
            axes.grid(False)
            axes.axis("off")
            axes.set(title=title, xlim=(-1.45, 1.45), ylim=(-1.35, 1.35), aspect="equal")
            axes.add_patch(Circle((0, 0), 1, facecolor="#f6f8fa", edgecolor="none", zorder=0))
            axes.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor="#8b929a", linewidth=1, zorder=2))
            axes.plot([-1, 1], [0, 0], color="#c3c8ce", linewidth=0.8, zorder=1)
            axes.plot([0, 0], [-1, 1], color="#c3c8ce", linewidth=0.8, zorder=1)
            if len(points) <= FEW:
                axes.plot(*points.T, "o", color="#D55E00", markersize=4, alpha=0.4, markeredgewidth=0, zorder=2)
            else:
                density, *edges = np.histogram2d(*points.T, bins=BINS, range=[[-1, 1], [-1, 1]])
                shown = np.ma.masked_equal(density.T, 0)
                axes.pcolormesh(*edges, np.sqrt(shown), cmap="Oranges", zorder=1.5, vmin=-0.3)
            for word, degrees in WORDS.items():
                x, y = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
                side = "left" if x > 0.2 else "right" if x < -0.2 else "center"
                level = "bottom" if y > 0.5 else "top" if y < -0.5 else "center"
                letters = axes.text(1.06 * x, 1.09 * y, word, fontsize=8, ha=side, va=level, color="#57606a", zorder=4)
                letters.set_path_effects([withStroke(linewidth=2, foreground="white")])
        png = save_png(figure)
    spread = ", ".join(
        f"{what} mean {points[:, 0].mean():+.2f} valence and {points[:, 1].mean():+.2f} arousal, standard deviations "
        f"{points[:, 0].std():.2f} and {points[:, 1].std():.2f}"
        for what, points in (("labelled", labelled), ("predicted", predicted))
    )
    alt = f"Circumplex of affect of {method.label}, emotion words around a circle of valence and arousal: {spread}."
    caption = f"{method.shown.name}. Right: pleasant; up: aroused. The words stand about where Russell (1980) has them."
    return Figure(name, f"{method.label}: circumplex", caption, alt, png, data, is_dense=True)
