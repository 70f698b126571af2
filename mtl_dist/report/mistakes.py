"""The worst errors of a result, with their pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtl_dist.report.pictures import Pictures, choose_apart, encode_png
from mtl_dist.report.results import Result
from mtl_dist.report.tables import write_csv
from mtl_dist.tasks import AUS, EXPRESSIONS

SIDE = 128  # pixels
EPSILON = 1e-6


class Mistake(NamedTuple):
    """A frame that was predicted wrong."""

    name: str
    image: str
    lines: tuple[str, ...]  # what is labelled, what was predicted
    png: bytes

    @property
    def alt(self) -> str:
        """The picture in words, for those who do not see it."""
        return f"Face {self.image}: {'; '.join(self.lines)}"


class Mistakes(NamedTuple):
    """The worst frames of a task, and the numbers of all of them as CSV."""

    task: str
    title: str
    worst: list[Mistake]
    csv: bytes


def worst_mistakes(
    result: Result, pictures: Pictures, images: list[str], video: np.ndarray, *, count: int
) -> list[Mistakes]:
    """The worst frames of every task that has labels, of different videos where there are enough."""
    predictions, targets = result.predicted.predictions, result.predicted.targets
    kinds = []
    known = targets.expr_mask & (predictions.expr.argmax(-1) != targets.expr)
    if targets.expr_mask.any():
        kinds.append(("expr", "EXPR: wrong and most sure of it", known, predictions.expr.max(-1), _expression_lines))
    if targets.va_mask.any():
        distance = np.linalg.norm(predictions.va - targets.va, axis=-1)
        kinds.append(("va", "Valence and arousal: furthest from the label", targets.va_mask, distance, _va_lines))
    if targets.au_mask.any():
        loss = _au_loss(result)
        known = targets.au_mask.any(-1)
        kinds.append(("au", "AU: the highest cross entropy", known, loss, _au_lines))
    mistakes = []
    for task, title, known, badness, describe in kinds:
        order = np.flatnonzero(known)[np.argsort(-badness[known], kind="stable")]
        places = choose_apart(order, images, video, count=min(count, len(order)))
        rows = [("row", "image", "error", "labelled", "predicted")]
        worst = []
        if places:
            pixels = pictures.pixels(result.predicted.rows[places], SIDE)
        for number, place in enumerate(places):
            lines = describe(result, place)
            rows.append((result.predicted.rows[place], images[place], f"{badness[place]:.4f}", *lines))
            worst.append(Mistake(f"error_{task}_{number + 1}", images[place], lines, encode_png(pixels[number])))
        mistakes.append(Mistakes(task, title, worst, write_csv(rows)))
    return mistakes


def _expression_lines(result: Result, place: int) -> tuple[str, str]:
    probabilities = result.predicted.predictions.expr[place]
    label = int(result.predicted.targets.expr[place])
    chosen = int(probabilities.argmax())
    return (
        f"labelled {EXPRESSIONS[label]} ({probabilities[label]:.2f})",
        f"predicted {EXPRESSIONS[chosen]} ({probabilities[chosen]:.2f})",
    )


def _va_lines(result: Result, place: int) -> tuple[str, str]:
    label, guess = result.predicted.targets.va[place], result.predicted.predictions.va[place]
    return (
        f"labelled V\N{NO-BREAK SPACE}{label[0]:+.2f} A\N{NO-BREAK SPACE}{label[1]:+.2f}",
        f"predicted V\N{NO-BREAK SPACE}{guess[0]:+.2f} A\N{NO-BREAK SPACE}{guess[1]:+.2f}",
    )


def _au_lines(result: Result, place: int) -> tuple[str, str]:
    """The units that are labelled on, and those that are predicted otherwise."""
    targets, probabilities = result.predicted.targets, result.predicted.predictions.au[place]
    known, on = targets.au_mask[place], targets.au[place] > 0
    active = [str(au) for au, is_on in zip(AUS, known & on) if is_on]
    wrong = known & (result.au_on[place] != on)
    said = [f"{au} ({p:.2f})" for au, p, is_wrong in zip(AUS, probabilities, wrong) if is_wrong]
    return (
        f"labelled AU {', '.join(active) or 'none'}",
        f"wrong: {', '.join(said) or 'none, but unsure'}",
    )


def _au_loss(result: Result) -> np.ndarray:
    """(n,) binary cross entropy, mean over the labelled units."""
    p = result.predicted.predictions.au.astype(np.float64).clip(EPSILON, 1 - EPSILON)
    targets = result.predicted.targets
    loss = -np.where(targets.au > 0, np.log(p), np.log(1 - p)) * targets.au_mask
    return loss.sum(-1) / np.maximum(targets.au_mask.sum(-1), 1)
