"""The tables of a report, as values that the page and the CSV files are written from."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.bootstrap import FEW_VIDEOS
from mtl_dist.objective.scores import FIRST, SCORES, Score, main_scores, more_scores
from mtl_dist.report.intervals import Bootstrap
from mtl_dist.report.results import CONSTANT, ENSEMBLE, TRAINING_SET, Method, Result
from mtl_dist.settings import flatten
from mtl_dist.tasks import TASKS

NO_LABELS, NOT_KNOWN = "no labels", "–"
MARKED = "Marked: the best of a column, where it is better than the constant predictor."
SHOWN_ELSEWHERE = ("run.name", "run.storage", "data.train", "data.val")


class Cell(NamedTuple):
    """One cell of a table."""

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
    lower: tuple[str, ...] = ()  # columns whose lowest number is the best

    def csv(self) -> bytes:
        """The table as CSV, as shown."""
        return write_csv([self.columns, *([f"{cell.text} {cell.below}".strip() for cell in row] for row in self.rows)])


def write_csv(rows) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def text(value: Any) -> Cell:
    """A cell of plain text."""
    return Cell(str(value))


def number(value: float | None, digits: int = 4, *, missing: str = NOT_KNOWN, is_best: bool = False) -> Cell:
    """A cell of a number; None is `missing`, and sorts last."""
    if value is None:
        return Cell(missing, is_number=True)
    return Cell(f"{value:,d}" if isinstance(value, int) else f"{value:.{digits}f}", float(value), is_best, True)


def headline_table(methods: list[Method], drawn: Bootstrap) -> Table:
    """All scores of all methods, P with its interval, the best of every score marked."""
    has_seeds = any(len(method.results) > 1 for method in methods)
    *others, first = main_scores()  # the first of all comes first: it has to be seen on a phone
    titles = [score.title for score in others]
    columns = ("Method", first.title, f"{first.title}, 95% interval", *titles, *(("seeds",) if has_seeds else ()))
    best = {score: marked_method(methods, score) for score in (first, *others)}
    rows = []
    for method in methods:
        top, *cells = [_score(method, score, is_best=method is it) for score, it in best.items()]
        seeds = [number(len(method.results))] if has_seeds else []
        rows.append([text(method.label), top, _interval(drawn, method, first), *cells, *seeds])
    return Table("scores", "The challenge's scores on the validation set", columns, rows, MARKED, _lower(best))


def more_table(methods: list[Method], drawn: Bootstrap) -> Table | None:
    """The scores beside the main ones, each with its interval; None where there are none."""
    best = {score: marked_method(methods, score) for score in _scores_beside(methods)}
    rows = []
    for method in methods:
        row = [text(method.label)]
        for score, it in best.items():
            cell, between = _score(method, score, is_best=method is it), _interval(drawn, method, score)
            below = f"{cell.below} ({between.text})" if cell.below else between.text
            row.append(cell._replace(below=below) if between.sort is not None else cell)
        rows.append(row)
    columns, lower = ("Method", *(score.title for score in best)), _lower(best)
    note = f"{MARKED} Below: 95% intervals."
    return Table("more_scores", "More scores on the validation set", columns, rows, note, lower) if best else None


def _scores_beside(methods: list[Method]) -> list[Score]:
    beside = [score for column in more_scores().values() for score in column]
    return [score for score in beside if any(method.values(score.key) for method in methods)]


def _lower(scores: Iterable[Score]) -> tuple[str, ...]:
    return tuple(score.title for score in scores if score.sign < 0)


def paper_tables(methods: list[Method], drawn: Bootstrap) -> list[Table]:
    """Tables 1-5: one score each."""
    tables = []
    for score in sorted((score for score in SCORES if score.table), key=lambda score: score.table):
        best = marked_method(methods, score)
        rows = [
            [
                text(method.label),
                _score(method, score, is_best=best is method),
                _interval(drawn, method, score),
                number(len(method.results)),
            ]
            for method in methods
        ]
        name, caption = f"table{score.table}_{score.key}", f"Table {score.table}. {score.name}"
        lower = (score.name,) * (score.sign < 0)
        tables.append(Table(name, caption, ("Method", score.name, "95% interval", "n"), rows, "", lower))
    return tables


def differences_tables(methods: list[Method], drawn: Bootstrap) -> list[Table]:
    """Every method less the ensemble (or, without one, less the best), paired over the draws: of the main scores, and
    of those beside them."""
    of = {"differences": main_scores(), "more_differences": _scores_beside(methods)}
    tables = [_differences_table(name, scores, methods, drawn) for name, scores in of.items() if scores]
    return [table for table in tables if table]


def _differences_table(name: str, scores: list[Score], methods: list[Method], drawn: Bootstrap) -> Table | None:
    reference = reference_method(methods)
    others = [method for method in methods if method is not reference]
    if reference is None or not drawn.draws or not others:
        return None
    rows = []
    for method in others:
        row = [text(method.label)]
        for score in scores:
            mine, theirs = _mean(method, score), _mean(reference, score)
            between = drawn.difference(method.label, reference.label, score.key)
            if mine is None or theirs is None:
                row.append(_value((reference if theirs is None else method).results[0].scores, score))
                continue
            difference, below, is_apart = mine - theirs, "no interval", False
            if between:
                below = f"{between.low:+.4f} to {between.high:+.4f}"
                is_apart = not between.low <= 0 <= between.high and drawn.videos(score.key) >= FEW_VIDEOS
                if is_apart:
                    below += ", better" if score.better(difference, than=0) else ", worse"
            row.append(Cell(f"{difference:+.4f}", difference, is_number=True, is_apart=is_apart, below=below))
        rows.append(row)
    return Table(
        name,
        f"Difference to {reference.label}, with its 95% interval over the same draws",
        ("Method", *(score.title for score in scores)),
        rows,
        f"Bold: the interval does not hold 0, and the labels are of {FEW_VIDEOS} videos at least.",
        _lower(scores),
    )


def runs_table(methods: list[Method]) -> Table:
    """Every single result, with its seed and checkpoint."""
    rows = []
    for method in methods:
        for result in method.results:
            weights = result.member.weights if result.member else None
            cells = [_value(result.scores, score) for score in main_scores()]
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
    columns = ("Run", "Method", "seed", "step", *(score.title for score in main_scores()))
    return Table("runs", "Every run by itself", columns, rows, "", _lower(main_scores()))


def classes_tables(methods: list[Method], counts: LabelCounts) -> list[Table]:
    """F1 of every expression and of every action unit, with how many labels there are."""
    tables = []
    for score, about in class_scores(counts):
        columns = (about.heading, *about.counts, *(method.label for method in methods))
        rows = [
            [text(name), *map(number, of_class), *_class_cells(methods, score, name)]
            for name, *of_class in zip(score.names, *about.counts.values())
        ]
        tables.append(Table(f"{score.title.lower()}_{about.classes}", score.name, columns, rows))
    return tables


class ClassCounts(NamedTuple):
    """The classes of a task, and how many labels of each there are."""

    heading: str
    classes: str  # in names of files
    counts: dict[str, list[int]]  # column -> of every class


def class_scores(counts: LabelCounts) -> list[tuple[Score, ClassCounts]]:
    """Scores of every class of a task that has labels."""
    on, labelled = counts.au_positives, counts.au
    known = {
        "expr": ClassCounts("Expression", "expressions", {"labelled": counts.expr_classes}),
        "au": ClassCounts("Action unit", "action_units", {"labelled": labelled, "active": on}),
    }
    return [
        (score, known[score.task])
        for score in SCORES
        if score.names and score.task in known and score.task not in counts.missing_tasks()
    ]


def best_method(methods: list[Method], score: Score = FIRST) -> Method | None:
    """The method of the best mean score, the constant predictor aside; None without labels."""
    scored = [method for method in methods if method.label != CONSTANT and method.values(score.key)]
    return max(scored, key=lambda method: score.sign * _mean(method, score), default=None)


def marked_method(methods: list[Method], score: Score) -> Method | None:
    """The method whose score is marked: the best, where that is better than the constant predictor."""
    best = best_method(methods, score)
    floor = _mean(methods[0], score) if methods[0].label == CONSTANT else None
    return best if best and (floor is None or score.better(_mean(best, score), than=floor)) else None


def reference_method(methods: list[Method]) -> Method | None:
    """The ensemble's plain mean (of several the best), or without one the best method."""
    return best_method([method for method in methods if method.kind == ENSEMBLE]) or best_method(methods)


def class_values(method: Method, score: Score, name: str) -> list[float]:
    """A class's value of every result of a method."""
    return [result.scores[score.key][name] for result in method.results if result.scores.get(score.key)]


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
        values = {score: [steps[step].get(score.key) for steps in ensembles] for score in main_scores()}
        cells = [
            _value(ensembles[0][step], score) if None in of_seeds else number(statistics.fmean(of_seeds))
            for score, of_seeds in values.items()
        ]
        if before is not None:
            gains = [after - earlier for after, earlier in zip(values[FIRST], before)]
            spread = f" ± {statistics.stdev(gains):.4f}" if len(gains) > 1 else ""
            cells[-1] = cells[-1]._replace(below=f"{statistics.fmean(gains):+.4f}{spread}")
        before = values[FIRST]
        rows.append([text(step), *cells])
    note = "Every step is fitted on other videos than it is scored on, on top of those above it."
    if len(ensembles) > 1:
        note += f" Means of {len(ensembles)} ensembles, with the standard deviation of what a step adds."
    caption = "What each step of calibration adds" + ("" if method == ENSEMBLE else f": {method}")
    return Table(name, caption, ("Step", *(score.title for score in main_scores())), rows, note)


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


def _class_cells(methods: list[Method], score: Score, name: str) -> list[Cell]:
    means = [statistics.fmean(values) if (values := class_values(m, score, name)) else None for m in methods]
    top = max((mean for mean in means if mean is not None), key=lambda mean: score.sign * mean, default=None)
    return [  # no mark where the constant predictor is best
        number(mean, 3, is_best=bool(mean) and mean == top and method.label != CONSTANT and means[0] != top)
        for mean, method in zip(means, methods)
    ]


def _value(scores: dict[str, Any], score: Score) -> Cell:
    """A score of one result; what is not there is not known, as of an ensemble made before there was such a score."""
    return number(scores.get(score.key), missing=NO_LABELS if score.key in scores else NOT_KNOWN)


def _score(method: Method, score: Score, *, is_best: bool) -> Cell:
    values = method.values(score.key)
    if not values:
        return _value(method.results[0].scores, score)
    mean, covers = statistics.fmean(values), method.results[0].scores["covers"]
    shown = f"{mean:.4f}"
    if not score.task and len(covers) < len(TASKS):
        shown += f" ({', '.join(task.upper() for task in covers) or 'nothing'} only)"
    spread = f"± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return Cell(shown, mean, is_best, True, below=spread)


def _mean(method: Method, score: Score) -> float | None:
    values = method.values(score.key)
    return statistics.fmean(values) if values else None


def _interval(drawn: Bootstrap, method: Method, score: Score) -> Cell:
    interval, videos = drawn.interval(method.label, score.key), drawn.videos(score.key)
    if interval is None:
        return number(None)._replace(below="labels of one video" if videos == 1 else "")
    few = f"rough: {videos} videos" if videos < FEW_VIDEOS else ""
    return Cell(f"{interval.low:.4f} to {interval.high:.4f}", interval.low, is_number=True, below=few)
