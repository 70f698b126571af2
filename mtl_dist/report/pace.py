"""What a step's time went into over training, and how long its gradients were."""

from __future__ import annotations

import numpy as np

from mtl_dist.report.drawing import COLOURS, Figure, canvas, save_png
from mtl_dist.report.tables import write_csv
from mtl_dist.training.pace import describe_pace
from mtl_dist.training.times import PARTS
from mtl_dist.training.tracking import read_records

POINTS = 60  # of a line, at most: neighbours are averaged

Line = tuple[np.ndarray, np.ndarray]  # steps (n,), and their values (n,)


def draw_pace(title: str, name: str, run_uri: str, place: int) -> Figure | None:
    """Draw a run's records; None where it has none, as those of before they were kept."""
    records = read_records(run_uri)
    paces = [record for record in records if record.get("kind") == "pace"]
    norms = [record for record in records if record.get("gradient_norm")]
    if not paces:
        return None
    parts = {part: _mean_line([(r["step"], r["seconds"].get(part, 0.0)) for r in paces]) for part in PARTS}
    parts = {part: line for part, line in parts.items() if line[1].any()}
    norm = _mean_line([(record["step"], record["gradient_norm"]) for record in norms])
    with canvas(5.7, 2.6) as figure:
        left, right = figure.subplots(1, 2)
        steps = next(iter(parts.values()))[0]
        ends = np.concatenate([[0], steps]) if len(steps) == 1 else steps  # an area wants two
        layers = [np.resize(values, len(ends)) for _, values in parts.values()]
        left.stackplot(ends, layers, labels=list(parts), colors=COLOURS, linewidth=0)
        left.set(ylabel="seconds of a step", xlabel="training step", xlim=(0, None), ylim=(0, None))
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=7, columnspacing=1, handlelength=1)
        if len(norm[0]):
            right.plot(*norm, color=COLOURS[0], linewidth=1.4)
            right.set_yscale("log")
        right.set(ylabel="norm of the gradient", xlabel="training step", xlim=(0, None))
        png = save_png(figure)
    rows: list[tuple] = [("kind", "step", "value")]
    rows += [(part, int(step), f"{value:.6g}") for part, line in parts.items() for step, value in zip(*line)]
    rows += [("gradient_norm", int(step), f"{value:.6g}") for step, value in zip(*norm)]
    told = describe_pace(paces[-1])
    caption = f"{name}. The last minute: {told}. ranks is waiting for other ranks, and adding up with them."
    alt = f"Stacked areas of what the time of a step of {title} went into, and its gradient's norm; at last {told}."
    return Figure(f"pace_{place}", f"{title}: where time went", caption, alt, png, write_csv(rows), is_dense=True)


def _mean_line(points: list[tuple[int, float]]) -> Line:
    """Return means of neighbours."""
    if not points:
        return np.zeros(0), np.zeros(0)
    parts = np.array_split(np.array(points, float), min(POINTS, len(points)))
    return np.array([part[:, 0].max() for part in parts]), np.array([part[:, 1].mean() for part in parts])
