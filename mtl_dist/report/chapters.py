"""The chapters of a report: which tables and figures stand where, with the words between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.bootstrap import FEW_VIDEOS, LEAST_VIDEOS
from mtl_dist.objective.scores import FIRST
from mtl_dist.report.drawing import Figure
from mtl_dist.report.evidence import Evidence
from mtl_dist.report.gains import gains_tables
from mtl_dist.report.likeness import likeness_table
from mtl_dist.report.mistakes import Mistakes
from mtl_dist.report.origin import ensemble_block, run_block
from mtl_dist.report.page import Part, html
from mtl_dist.report.results import CALIBRATED, Method
from mtl_dist.report.tables import (
    Table,
    best_method,
    classes_tables,
    differences_tables,
    headline_table,
    more_table,
    paper_tables,
    runs_table,
    settings_table,
    steps_tables,
)
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS


class Drawings(NamedTuple):
    """The figures of every chapter, and what they leave out in words."""

    curves: list[Figure]
    curve_notes: list[str]
    gradients: list[Figure]
    paces: list[Figure]
    confusion: list[Figure]
    f1: list[Figure]
    reliability: Figure | None
    calibration: Table | None
    affect: list[Figure]
    attention: list[Figure]
    without_attention: list[str]  # methods
    mistakes: list[Mistakes]

    @property
    def figures(self) -> list[Figure]:
        """All figures, in the order of the page."""
        some = [self.reliability] if self.reliability else []
        trained = [*self.curves, *self.gradients, *self.paces]
        return [*trained, *self.confusion, *self.f1, *some, *self.affect, *self.attention]


def lead(evidence: Evidence, *, num_draws: int) -> list[str]:
    """The sentences above the chapters: the score, the data, the intervals."""
    labels, drawn = evidence.labels, evidence.drawn
    best, floor = evidence.best, evidence.methods[0].results[0].scores[FIRST.key]
    p = float(np.mean(best.values(FIRST.key)))
    between = drawn.interval(best.label, FIRST.key)
    shown = f" (95% interval {between.low:.4f} to {between.high:.4f})" if between else ""
    seeds = f", mean of {len(best.results)} seeds" if len(best.results) > 1 else ""
    top = best_method(evidence.methods)
    missing = labels.missing_tasks()
    lines = [
        f"{best.label[:1].upper()}{best.label[1:]} scores P = {p:.4f}{shown}{seeds}; the constant predictor "
        f"{floor:.4f}. P is (CCC V + CCC A) / 2 + EXPR F1 + AU F1, here at most {_most(labels)}.",
        f"{labels.rows:,} validation rows of {drawn.num_videos:,} videos: {labels.va:,} with valence and arousal, "
        f"{labels.expr:,} with an expression, {max(labels.au):,} with action units.",
    ]
    if top is not None and top is not best:
        lines[0] += f" {top.label[:1].upper()}{top.label[1:]} has more: {np.mean(top.values(FIRST.key)):.4f}."
    lines.append("Runs are shown by their checkpoints with the highest P on this very set: expect less elsewhere.")
    lines += evidence.warnings
    if missing:
        lines.append(f"The set has no labels at all for {', '.join(missing).upper()}: P does not cover that.")
    if drawn.draws:
        lines.append(
            f"Intervals: {num_draws:,} bootstrap draws of whole videos. They hold the models fixed; the spread over "
            "seeds, where there are several, is given as ± one standard deviation. They lean low: a draw repeats "
            "videos, and has fewer of the rare classes."
        )
        few = {task: n for task, n in drawn.labelled.items() if LEAST_VIDEOS <= n < FEW_VIDEOS}
        one = [task.upper() for task, n in drawn.labelled.items() if n == 1]
        if few:
            counts = ", ".join(f"{task.upper()} {n}" for task, n in few.items())
            lines[-1] += f" Where labels are of fewer than {FEW_VIDEOS} videos they are rough: {counts}."
        if one:
            lines[-1] += f" All labels of {', '.join(one)} are of one video: there is no interval for what needs them."
    else:
        lines.append("There are no intervals: the labels are of one video, and videos are what is drawn.")
    if drawn.num_videos == len(set(evidence.images)) > 1:
        lines.append(
            "No image names a video that it shares with another, so each counts as a video of its own: where several "
            "show one person, the intervals are too narrow (a set made from a table with a column person draws people)."
        )
    return lines


def _most(labels: LabelCounts) -> str:
    """The highest P that the labels let anyone reach: in the mean of F1 a class or unit that never occurs counts 0."""
    has_expr, has_au = (np.count_nonzero(counts) for counts in (labels.expr_classes, labels.au_positives))
    most = (labels.va > 0) + has_expr / NUM_EXPRESSIONS + has_au / NUM_AUS
    if most.is_integer():
        return f"{most:.0f}"
    return (
        f"{most:.2f}: {has_expr} of {NUM_EXPRESSIONS} expressions and {has_au} of {NUM_AUS} action units occur, and F1 "
        "is the mean over all"
    )


def compose(evidence: Evidence, drawings: Drawings) -> tuple[list[Table], list[Part]]:
    """Put tables and figures into chapters; return the tables too."""
    methods, drawn = evidence.methods, evidence.drawn
    headline, more = headline_table(methods, drawn), more_table(methods, drawn)
    differences, *more_differences = differences_tables(methods, drawn) or [None]
    numbered, runs = paper_tables(methods, drawn), runs_table(methods)
    classes = classes_tables(methods, evidence.labels)
    results = [result for method in methods for result in method.results]
    steps = [*steps_tables(results), *gains_tables(results)]
    settings = settings_table([result for result in results if result.member])
    of_scores = [headline, *_some(differences), *steps, *_some(more), *more_differences]
    likeness = likeness_table(methods)
    tables = [*of_scores, *numbered, runs, *classes, *_some(settings, drawings.calibration, likeness)]
    parts = [
        Part("scores", "Scores", [html.table(table) for table in [*of_scores, *_some(likeness)]]),
        Part("tables", "Tables 1–5", _numbered_blocks(numbered)),
        Part("training", "Training", _curves_blocks(drawings)),
        Part("classes", "Expressions and action units", _classes_blocks(drawings, classes)),
        Part("calibration", "Calibration", _calibration_blocks(drawings, methods)),
        Part("affect", "Valence and arousal", _affect_blocks(drawings)),
        Part("attention", "Attention", _attention_blocks(drawings)),
        Part("errors", "Worst errors", _mistakes_blocks(drawings, evidence.best)),
        Part("runs", "Runs and commands", _runs_blocks(methods, runs, settings)),
    ]
    return tables, parts


def _some(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table]


def _numbered_blocks(tables: list[Table]) -> list[Markup]:
    about = (
        "As in Haider et al. 2022 (arXiv 2207.10878), on this page's data: EXPR F1, AU F1, CCC of valence, CCC of "
        "arousal, and P, each with the constant predictor's row. n counts seeds."
    )
    return [html.paragraph(about), html.grid([html.table(table) for table in tables])]


def _curves_blocks(drawings: Drawings) -> list[Markup]:
    blocks = [html.grid([html.figure(figure) for figure in drawings.curves])] if drawings.curves else []
    if drawings.gradients:
        blocks.append(html.heading("What the tasks ask of what they share"))
        blocks.append(html.grid([html.figure(figure, level=4) for figure in drawings.gradients]))
    if drawings.paces:
        blocks.append(html.heading("Where time went"))
        blocks.append(html.grid([html.figure(figure, level=4) for figure in drawings.paces]))
    return blocks + [html.paragraph(note, kind="soft") for note in drawings.curve_notes]


def _classes_blocks(drawings: Drawings, tables: list[Table]) -> list[Markup]:
    if not drawings.f1:
        return [html.paragraph("The validation set has labels of neither expressions nor action units.")]
    blocks = [html.grid([html.figure(figure) for figure in drawings.f1])]
    blocks += [html.folded(table.caption, html.table(table)) for table in tables]
    if drawings.confusion:
        blocks.append(html.heading("Confusion of expressions"))
        blocks.append(html.grid([html.figure(figure, level=4) for figure in drawings.confusion]))
    return blocks


def _calibration_blocks(drawings: Drawings, methods: list[Method]) -> list[Markup]:
    if not drawings.reliability:
        return [html.paragraph("The validation set has labels of neither expressions nor action units.")]
    blocks = [html.figure(drawings.reliability), html.table(drawings.calibration)]
    if any(method.kind == CALIBRATED for method in methods):
        about = (
            f"'{CALIBRATED.capitalize()}' may well have a higher error here than the plain mean. Its steps are fitted "
            "for the score: thresholds and smoothing leave probabilities as they are; members' weights are chosen for "
            "F1, not for likelihood; and temperatures make each member by itself as sure as it is right, so that the "
            "mean of members who disagree is less sure than it is right. Use it for decisions, with its thresholds, "
            "and no probability of it as a chance."
        )
        blocks.append(html.paragraph(about))
    return blocks


def _affect_blocks(drawings: Drawings) -> list[Markup]:
    if not drawings.affect:
        return [html.paragraph("The validation set has no labels of valence and arousal.")]
    return [html.grid([html.figure(figure) for figure in drawings.affect])]


def _attention_blocks(drawings: Drawings) -> list[Markup]:
    blocks = [
        html.paragraph(
            "Where the model looks for each action unit. The faces are the validation frames with the most active "
            "units, of different videos; every method shows the same frames in its own view."
        )
    ]
    blocks += [html.figure(figure) for figure in drawings.attention]
    if drawings.without_attention:
        blocks.append(html.paragraph(f"No attention maps in: {', '.join(drawings.without_attention)}.", kind="soft"))
    return blocks


def _mistakes_blocks(drawings: Drawings, best: Method) -> list[Markup]:
    if not drawings.mistakes:
        return [html.paragraph("These runs read features: report a run that reads pictures beside them to see faces.")]
    about = f"Of {best.label} ({best.shown.name}), from as many videos as there are; in brackets probabilities."
    return [html.paragraph(about), *(html.mistakes(mistakes) for mistakes in drawings.mistakes)]


def _runs_blocks(methods: list[Method], runs: Table, settings: Table | None) -> list[Markup]:
    blocks = [html.table(runs)]
    if settings:
        blocks.append(html.table(settings))
    for method in methods:
        for result in method.results:
            if result.member:
                blocks.append(run_block(result))
            elif result.score_file:
                blocks.append(ensemble_block(result))
    return blocks
