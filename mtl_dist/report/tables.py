"""The tables of a report, as values that the page and the CSV files are written from."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any, NamedTuple

from mtl_dist.config import flatten
from mtl_dist.report.intervals import FEW_VIDEOS, Bootstrap
from mtl_dist.report.results import CONSTANT, ENSEMBLE, TRAINING_SET, Method, Result
from mtl_dist.tasks import AUS, EXPRESSIONS, TASKS, LabelCounts
from mtl_dist.training.tracking import SCORE_NAMES

# Tables 1-5 of Haider et al. 2022 (arXiv 2207.10878).
PAPER_TABLES = {"expr": "EXPR F1", "au": "AU F1", "ccc_v": "CCC valence", "ccc_a": "CCC arousal", "p": "P"}
NO_LABELS = "no labels"
MARKED = "Marked: the best of a column, where it is above the constant predictor."
# P first: it has to be seen on a phone.
HEADLINE = {"p": SCORE_NAMES["p"]} | SCORE_NAMES
SHOWN_ELSEWHERE = ("run.name", "run.storage", "data.train", "data.val")


class Cell(NamedTuple):
    text: str
    sort: float | None = None  # of a number: what it is sorted by
    is_best: bool = False
    is_number: bool = False
    is_apart: bool = False  # of a difference: its interval does not hold 0
    below: str = ""  # on a second line, smaller: a spread or an interval


class Table(NamedTuple):
    """A table; the first cell of a row is its heading."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""

    def csv(self) -> bytes:
        """The table as CSV, as shown."""
        return write_csv([self.columns, *([f"{cell.text} {cell.below}".strip() for cell in row] for row in self.rows)])


def write_csv(rows) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def text(value: Any) -> Cell:
    return Cell(str(value))


def number(value: float | None, digits: int = 4, *, missing: str = "–", is_best: bool = False) -> Cell:
    """A cell of a number; None is `missing`, and sorts last."""
    if value is None:
        return Cell(missing, is_number=True)
    return Cell(f"{value:,d}" if isinstance(value, int) else f"{value:.{digits}f}", float(value), is_best, True)


def headline_table(methods: list[Method], drawn: Bootstrap) -> Table:
    """All scores of all methods, P with its interval, the best of every score marked."""
    has_seeds = any(len(method.results) > 1 for method in methods)
    of_p, *others = HEADLINE.values()
    columns = ("Method", of_p, "P, 95% interval", *others, *(("seeds",) if has_seeds else ()))
    best = {key: marked_method(methods, key) for key in HEADLINE}
    rows = []
    for method in methods:
        p, *cells = [_score(method, key, is_best=best[key] is method) for key in HEADLINE]
        seeds = [number(len(method.results))] if has_seeds else []
        rows.append([text(method.label), p, _interval(drawn, method, "p"), *cells, *seeds])
    return Table("scores", "All scores on the validation set", columns, rows, MARKED)


def paper_tables(methods: list[Method], drawn: Bootstrap) -> list[Table]:
    """Tables 1-5: one score each."""
    tables = []
    for place, (key, name) in enumerate(PAPER_TABLES.items(), start=1):
        best = marked_method(methods, key)
        rows = [
            [
                text(method.label),
                _score(method, key, is_best=best is method),
                _interval(drawn, method, key),
                number(len(method.results)),
            ]
            for method in methods
        ]
        tables.append(
            Table(f"table{place}_{key}", f"Table {place}. {name}", ("Method", name, "95% interval", "n"), rows)
        )
    return tables


def differences_table(methods: list[Method], drawn: Bootstrap) -> Table | None:
    """Every method less the ensemble (or, without one, less the best), paired over the draws."""
    reference = reference_method(methods)
    others = [method for method in methods if method is not reference]
    if reference is None or not drawn.draws or not others:
        return None
    rows = []
    for method in others:
        row = [text(method.label)]
        for key in SCORE_NAMES:
            mine, theirs = _mean(method, key), _mean(reference, key)
            between = drawn.difference(method.label, reference.label, key)
            if mine is None or theirs is None:
                row.append(number(None, missing=NO_LABELS))
                continue
            difference, below, is_apart = mine - theirs, "no interval", False
            if between:
                below = f"{between.low:+.4f} to {between.high:+.4f}"
                is_apart = not between.low <= 0 <= between.high and drawn.videos(key) >= FEW_VIDEOS
            row.append(Cell(f"{difference:+.4f}", difference, is_number=True, is_apart=is_apart, below=below))
        rows.append(row)
    return Table(
        "differences",
        f"Difference to {reference.label}, with its 95% interval over the same draws",
        ("Method", *SCORE_NAMES.values()),
        rows,
        f"Bold: the interval does not hold 0, and the labels are of {FEW_VIDEOS} videos at least.",
    )


def runs_table(methods: list[Method]) -> Table:
    """Every single result, with its seed and checkpoint."""
    rows = []
    for method in methods:
        for result in method.results:
            weights = result.member.weights if result.member else None
            cells = [number(result.scores[key], missing=NO_LABELS) for key in SCORE_NAMES]
            step = number(weights.checkpoint.step if weights else None)
            if weights and not weights.is_finished:
                step = step._replace(below=f"unfinished: step {weights.newest_step:,} of {weights.total_steps:,}")
            rows.append(
                [
                    text(result.name),
                    text(method.label),
                    number(result.seed),
                    step,
                    *cells,
                ]
            )
    return Table("runs", "Every run by itself", ("Run", "Method", "seed", "step", *SCORE_NAMES.values()), rows)


def classes_tables(methods: list[Method], counts: LabelCounts) -> list[Table]:
    """F1 of every expression and of every action unit, with how many labels there are."""
    tables = []
    if counts.expr:
        names = ("Expression", "labelled", *(method.label for method in methods))
        frames = zip(EXPRESSIONS, counts.expr_classes)
        rows = [
            [text(name), number(count), *_class_cells(methods, "f1_expr", name)] for name, count in frames
        ]  # fmt: skip
        tables.append(Table("f1_expressions", "F1 of every expression", names, rows))
    if sum(counts.au):
        names = ("Action unit", "labelled", "active", *(method.label for method in methods))
        rows = [
            [text(f"AU{au}"), number(labelled), number(active), *_class_cells(methods, "f1_au", f"AU{au}")]
            for au, labelled, active in zip(AUS, counts.au, counts.au_positives)
        ]
        tables.append(Table("f1_action_units", "F1 of every action unit", names, rows))
    return tables


def best_method(methods: list[Method], key: str) -> Method | None:
    """The method of the highest mean score, the constant predictor aside; None without labels."""
    scored = [method for method in methods if method.label != CONSTANT and method.values(key)]
    return max(scored, key=lambda method: statistics.fmean(method.values(key)), default=None)


def marked_method(methods: list[Method], key: str) -> Method | None:
    """The method whose score is marked: the best, where that is above the constant predictor."""
    best = best_method(methods, key)
    floor = _mean(methods[0], key) if methods[0].label == CONSTANT else None
    return best if best and (floor is None or _mean(best, key) > floor) else None


def reference_method(methods: list[Method]) -> Method | None:
    """The ensemble's plain mean (of several the best), or without one the best method."""
    return best_method([method for method in methods if method.kind == ENSEMBLE], "p") or best_method(methods, "p")


def class_f1(method: Method, key: str, name: str) -> list[float]:
    """F1 of a class of every result of a method."""
    return [result.scores[key][name] for result in method.results if result.scores[key]]


def steps_tables(results: list[Result]) -> list[Table]:
    """What every step of calibration adds, as score.json has it: a table for all ensembles of one method."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if steps := (result.score_file or {}).get("steps"):
            alike.setdefault(result.method, []).append(steps)
    return [_steps_table(f"steps_{n}", method, steps) for n, (method, steps) in enumerate(alike.items(), start=1)]


def _steps_table(name: str, method: str, ensembles: list[dict[str, Any]]) -> Table:
    rows, before = [], None
    for step in ensembles[0]:
        values = {key: [steps[step][key] for steps in ensembles] for key in SCORE_NAMES}
        cells = [
            number(None, missing=NO_LABELS) if None in found else number(statistics.fmean(found))
            for found in values.values()
        ]
        if before is not None:
            gains = [after - p for after, p in zip(values["p"], before)]
            spread = f" ± {statistics.stdev(gains):.4f}" if len(gains) > 1 else ""
            cells[-1] = cells[-1]._replace(below=f"{statistics.fmean(gains):+.4f}{spread}")
        before = values["p"]
        rows.append([text(step), *cells])
    note = "Every step is fitted on other videos than it is scored on, on top of those above it."
    if len(ensembles) > 1:
        note += f" Means of {len(ensembles)} ensembles, with the standard deviation of what a step adds."
    caption = "What each step of calibration adds" + ("" if method == ENSEMBLE else f": {method}")
    return Table(name, caption, ("Step", *SCORE_NAMES.values()), rows, note)


def settings_table(results: list[Result]) -> Table | None:
    """The settings in which runs differ; None where there is nothing to tell apart."""
    trees = [flatten(r.member.weights.config) | {TRAINING_SET: r.member.weights.train_sha256[:12]} for r in results]
    keys = [key for key in trees[0] if key not in SHOWN_ELSEWHERE and len({str(tree[key]) for tree in trees}) > 1]
    views = {(r.member.val.view, r.member.weights.train_sha256) for r in results}
    if len(views) == len({view for view, _ in views}):  # a set a view: nothing to tell apart
        keys = [key for key in keys if key != TRAINING_SET]
    if not keys:
        return None
    rows = [[text(result.name), *(text(tree[key]) for key in keys)] for result, tree in zip(results, trees)]
    return Table("settings", "Settings in which the runs differ", ("Run", *keys), rows)


def _class_cells(methods: list[Method], key: str, name: str) -> list[Cell]:
    means = [statistics.fmean(values) if (values := class_f1(m, key, name)) else None for m in methods]
    top = max((mean for mean in means if mean is not None), default=None)
    return [  # no mark where the constant predictor is best
        number(mean, 3, is_best=bool(mean) and mean == top and method.label != CONSTANT and means[0] != top)
        for mean, method in zip(means, methods)
    ]


def _score(method: Method, key: str, *, is_best: bool) -> Cell:
    values = method.values(key)
    if not values:
        return Cell(NO_LABELS, is_number=True)
    mean, covers = statistics.fmean(values), method.results[0].scores["covers"]
    shown = f"{mean:.4f}"
    if key == "p" and len(covers) < len(TASKS):
        shown += f" ({', '.join(task.upper() for task in covers) or 'nothing'} only)"
    spread = f"± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return Cell(shown, mean, is_best, True, below=spread)


def _mean(method: Method, key: str) -> float | None:
    values = method.values(key)
    return statistics.fmean(values) if values else None


def _interval(drawn: Bootstrap, method: Method, key: str) -> Cell:
    interval, videos = drawn.interval(method.label, key), drawn.videos(key)
    if interval is None:
        return number(None)._replace(below="labels of one video" if videos == 1 else "")
    few = f"rough: {videos} videos" if videos < FEW_VIDEOS else ""
    return Cell(f"{interval.low:.4f} to {interval.high:.4f}", interval.low, is_number=True, below=few)
