"""Make a report: gather results, draw, write. Nothing is written before every input is known to be good."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from mtl_dist import storage
from mtl_dist.data.splits import group_rows, video_of
from mtl_dist.progress import progress_bar
from mtl_dist.report import page
from mtl_dist.report.affect import draw_affect
from mtl_dist.report.attention import choose_faces, draw_attention
from mtl_dist.report.calibration import draw_reliability
from mtl_dist.report.classes import draw_confusion, draw_f1
from mtl_dist.report.curves import draw_curves
from mtl_dist.report.drawing import Figure, method_styles
from mtl_dist.report.intervals import Bootstrap, bootstrap
from mtl_dist.report.mistakes import Mistakes, worst_mistakes
from mtl_dist.report.origin import ensemble_block, run_block
from mtl_dist.report.page import Part
from mtl_dist.report.pictures import Pictures
from mtl_dist.report.results import (
    CONSTANT,
    ENSEMBLE,
    Method,
    check_same_data,
    check_same_rows,
    constant_result,
    group_methods,
    label_runs,
    open_ensemble,
    predict_run,
    run_result,
    unique_names,
)
from mtl_dist.report.tables import (
    Table,
    best_method,
    classes_tables,
    differences_table,
    headline_table,
    paper_tables,
    runs_table,
    settings_table,
    steps_table,
)
from mtl_dist.runtime.device import named_device
from mtl_dist.runtime.members import Member, image_names, open_member
from mtl_dist.tasks import LabelCounts

if TYPE_CHECKING:
    import torch

    from mtl_dist.report.__main__ import ReportCommand

PAGE_NAME = "report.html"
SEED = 0  # of the bootstrap: the same results give the same intervals


class Evidence(NamedTuple):
    """All that a report shows, before it is drawn."""

    methods: list[Method]
    labels: LabelCounts
    images: list[str]  # of the validation rows
    video: np.ndarray  # (n,) of every row, from 0
    drawn: Bootstrap

    @property
    def best(self) -> Method:
        """The ensemble, or the best method: whose errors are shown."""
        ensemble = next((method for method in self.methods if method.label == ENSEMBLE), None)
        return ensemble or best_method(self.methods, "p") or self.methods[-1]


class Drawings(NamedTuple):
    """The figures of every chapter, and what they leave out in words."""

    curves: list[Figure]
    curve_notes: list[str]
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
        some = [self.reliability] if self.reliability else []
        return [*self.curves, *self.confusion, *self.f1, *some, *self.affect, *self.attention]


def write_report(command: ReportCommand, *, written: str) -> str:
    """Write the report and return its page's URI; `written` is the command as it was typed. Raises `InputError`."""
    device = named_device(command.device)
    evidence = gather(command, device)
    drawings = draw(evidence, command, device)
    tables, parts = compose(evidence, drawings, command)
    val = evidence.methods[1].shown.member.val
    lead = _lead(evidence, num_draws=command.draws)
    footer = [
        f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by: {written}",
        f"Validation rows are those of the source with sha256 {val.source_sha256}.",
    ]
    html = page.render_page(title=command.title, lead=lead, parts=parts, footer=footer)
    files = {f"tables/{table.name}.csv": table.csv() for table in tables}
    for figure in drawings.figures:
        files |= {f"figures/{figure.name}.png": figure.png, f"figures/{figure.name}.csv": figure.csv}
    for mistakes in drawings.mistakes:
        files[f"figures/errors_{mistakes.task}.csv"] = mistakes.csv
        files |= {f"figures/{mistake.name}.png": mistake.png for mistake in mistakes.worst}
    for name, data in files.items():
        storage.write_bytes(storage.join(command.out, name), data)
    where = storage.join(command.out, PAGE_NAME)
    storage.write_bytes(where, html)  # last: a page whose files are not there is worse than none
    return where


def gather(command: ReportCommand, device: torch.device) -> Evidence:
    """Check all inputs, then predict every run."""
    members = [open_member(run, *command.val[place : place + 1]) for place, run in enumerate(command.runs)]
    check_same_data(members)
    images = image_names(members[0], command.cache_dir)
    ensembles = [
        result._replace(name=name)
        for uri, name in zip(command.ensemble, unique_names(list(command.ensemble)))
        for result in open_ensemble(uri, members, images)
    ]
    storage.check_writable(command.out)
    names = unique_names(list(command.runs))
    runs = []
    for member, name, label in zip(members, names, label_runs(members)):
        with progress_bar(f"predicting {name}", member.val.rows) as advance:
            predicted = predict_run(
                member, name, data_uri=storage.join(command.out, "data"), device=device, batch=command.batch,
                workers=command.workers, cache_dir=command.cache_dir, progress=advance)  # fmt: skip
        runs.append(run_result(member, name, label, predicted))
    check_same_rows([*runs, *ensembles])
    labels = members[0].val.labels
    methods = group_methods(constant_result(runs[0].predicted, labels), runs, ensembles)
    video = group_rows(video_of(pa.array(images, pa.string())), None)
    drawn = bootstrap(methods, video, num_draws=command.draws, seed=SEED)
    return Evidence(methods, labels, images, video, drawn)


def draw(evidence: Evidence, command: ReportCommand, device: torch.device) -> Drawings:
    """Draw every figure."""
    methods, images, video = evidence.methods, evidence.images, evidence.video
    styles = method_styles(methods)
    real = [method for method in methods if method.label != CONSTANT]
    trained = [method for method in real if method.shown.member]
    with progress_bar("drawing", 4 + 2 * len(real) + len(trained)) as advance:
        curves, notes = draw_curves(methods, styles)
        advance(1)
        f1 = draw_f1(methods, styles, evidence.labels)
        advance(1)
        reliability, calibration = draw_reliability(methods, styles)
        advance(1)
        confusion, affect, attention, without = [], [], [], []
        for place, method in enumerate(real, start=1):
            confusion.append(draw_confusion(method, place))
            advance(1)
            affect += draw_affect(method, place)
            advance(1)
        faces = choose_faces(trained[0].shown, images, video, count=command.faces)
        for place, method in enumerate(trained, start=1):
            figure = None
            if faces:
                figure = draw_attention(method, place, faces, images=images, device=device, cache_dir=command.cache_dir)
                attention, without = (
                    ([*attention, figure], without) if figure else (attention, [*without, method.label])
                )
            advance(1)
        shown_from = _pictures_of(evidence.best, trained)
        pictures = Pictures(shown_from, command.cache_dir)
        mistakes = worst_mistakes(evidence.best.shown, pictures, images, video, count=command.errors)
        advance(1)
    confusion = [figure for figure in confusion if figure]
    return Drawings(curves, notes, confusion, f1, reliability, calibration, affect, attention, without, mistakes)


def _pictures_of(best: Method, trained: list[Method]) -> Member:
    """Whose pictures show the errors: the method's own view, of an ensemble any, the wider crop first."""
    if best.shown.member:
        return best.shown.member
    return min((method.shown.member for method in trained), key=lambda member: member.val.view != "cropped")


def compose(evidence: Evidence, drawings: Drawings, command: ReportCommand) -> tuple[list[Table], list[Part]]:
    """Put tables and figures into chapters; return the tables too."""
    methods, drawn = evidence.methods, evidence.drawn
    headline, differences = headline_table(methods, drawn), differences_table(methods, drawn)
    numbered, runs = paper_tables(methods, drawn), runs_table(methods)
    classes = classes_tables(methods, evidence.labels)
    results = [result for method in methods for result in method.results]
    steps = [table for result in results if (table := steps_table(result))]
    settings = settings_table([result for result in results if result.member])
    tables = [headline, *_some(differences), *numbered, runs, *classes, *steps, *_some(settings, drawings.calibration)]
    parts = [
        Part("scores", "Scores", [page.table_block(table) for table in (headline, *_some(differences), *steps)]),
        Part("tables", "Tables 1–5", _numbered_blocks(numbered)),
        Part("training", "Training", _curves_blocks(drawings)),
        Part("classes", "Expressions and action units", _classes_blocks(drawings, classes)),
        Part("calibration", "Calibration", _calibration_blocks(drawings)),
        Part("affect", "Valence and arousal", _affect_blocks(drawings)),
        Part("attention", "Attention", _attention_blocks(drawings)),
        Part("errors", "Worst errors", _mistakes_blocks(drawings, evidence.best)),
        Part("runs", "Runs and commands", _runs_blocks(methods, runs, settings)),
    ]
    return tables, parts


def _some(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table]


def _lead(evidence: Evidence, *, num_draws: int) -> list[str]:
    labels, drawn = evidence.labels, evidence.drawn
    best, floor = evidence.best, evidence.methods[0].results[0].scores["p"]
    covers = best.shown.scores["covers"]
    p = float(np.mean(best.values("p")))
    between = drawn.interval(best.label, "p")
    shown = f" (95% interval {between.low:.4f} to {between.high:.4f})" if between else ""
    seeds = f", mean of {len(best.results)} seeds" if len(best.results) > 1 else ""
    top = best_method(evidence.methods, "p")
    missing = labels.missing_tasks()
    lines = [
        f"{best.label[:1].upper()}{best.label[1:]} scores P = {p:.4f}{shown}{seeds}; the constant predictor "
        f"{floor:.4f}. P is (CCC V + CCC A) / 2 + EXPR F1 + AU F1, here at most {len(covers)}.",
        f"{labels.rows:,} validation rows of {drawn.num_videos:,} videos: {labels.va:,} with valence and arousal, "
        f"{labels.expr:,} with an expression, {max(labels.au):,} with action units.",
    ]
    if top is not None and top is not best:
        lines[0] += f" {top.label[:1].upper()}{top.label[1:]} has more: {np.mean(top.values('p')):.4f}."
    if missing:
        lines.append(f"The set has no labels at all for {', '.join(missing).upper()}: P does not cover that.")
    if drawn.draws:
        lines.append(
            f"Intervals: {num_draws:,} bootstrap draws of whole videos. They hold the models fixed; the spread over "
            "seeds, where there are several, is given as ± one standard deviation."
        )
    else:
        lines.append("There are no intervals: the images are of one video, and videos are what is drawn.")
    return lines


def _numbered_blocks(tables: list[Table]) -> list[str]:
    about = (
        "As in Haider et al. 2022 (arXiv 2207.10878), on this page's data: EXPR F1, AU F1, CCC of valence, CCC of "
        "arousal, and P, each with the constant predictor's row. n counts seeds."
    )
    return [page.paragraph(about), page.grid([page.table_block(table) for table in tables])]


def _curves_blocks(drawings: Drawings) -> list[str]:
    blocks = [page.grid([page.figure_block(figure) for figure in drawings.curves])] if drawings.curves else []
    return blocks + [page.paragraph(note, kind="soft") for note in drawings.curve_notes]


def _classes_blocks(drawings: Drawings, tables: list[Table]) -> list[str]:
    if not drawings.f1:
        return [page.paragraph("The validation set has labels of neither expressions nor action units.")]
    blocks = [page.grid([page.figure_block(figure) for figure in drawings.f1])]
    blocks += [page.folded(table.caption, page.table_block(table)) for table in tables]
    if drawings.confusion:
        blocks.append(page.heading("Confusion of expressions"))
        blocks.append(page.grid([page.figure_block(figure) for figure in drawings.confusion]))
    return blocks


def _calibration_blocks(drawings: Drawings) -> list[str]:
    if not drawings.reliability:
        return [page.paragraph("The validation set has labels of neither expressions nor action units.")]
    return [page.figure_block(drawings.reliability), page.table_block(drawings.calibration)]


def _affect_blocks(drawings: Drawings) -> list[str]:
    if not drawings.affect:
        return [page.paragraph("The validation set has no labels of valence and arousal.")]
    return [page.grid([page.figure_block(figure) for figure in drawings.affect])]


def _attention_blocks(drawings: Drawings) -> list[str]:
    blocks = [
        page.paragraph(
            "Where the model looks for each action unit. The faces are the validation frames with the most active "
            "units, of different videos; every method shows the same frames in its own view."
        )
    ]
    blocks += [page.figure_block(figure) for figure in drawings.attention]
    if drawings.without_attention:
        blocks.append(page.paragraph(f"No attention maps in: {', '.join(drawings.without_attention)}.", kind="soft"))
    return blocks


def _mistakes_blocks(drawings: Drawings, best: Method) -> list[str]:
    about = f"Of {best.label} ({best.shown.name}), from as many videos as there are; in brackets probabilities."
    return [page.paragraph(about), *(page.mistakes_block(mistakes) for mistakes in drawings.mistakes)]


def _runs_blocks(methods: list[Method], runs: Table, settings: Table | None) -> list[str]:
    blocks = [page.table_block(runs)]
    if settings:
        blocks.append(page.table_block(settings))
    for method in methods:
        for result in method.results:
            if result.member:
                blocks.append(run_block(result))
            elif result.score_file:
                blocks.append(ensemble_block(result))
    return blocks
