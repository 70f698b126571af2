"""What a run tells: metrics.jsonl in its storage is the truth, console and `sinks` are views of it. Rank 0 only.

It is stored with every checkpoint, in parts: metrics.jsonl goes on in metrics/000001.jsonl.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtl_dist import storage
from mtl_dist.errors import InputError, plain
from mtl_dist.objective.scores import FIRST, Score, flat_scores, main_scores, more_scores, table_of
from mtl_dist.tasks import TASKS
from mtl_dist.training.growing import Growing
from mtl_dist.training.sinks.sink import Ending, Row, Sink

METRICS = "metrics.jsonl"
MORE_METRICS = re.compile(r"\d{6}\.jsonl")  # in metrics/, the parts after the first
LINE_EVERY_S = 10.0
NO_LABELS, NOT_KNOWN = "no labels", "–"


class Tracker:
    """Collects records of a run; what `files` returns is stored in the run with every checkpoint.

    `is_over` says whether a run that has come to a step is finished; `kept` are files that the sinks are given at its
    end, beside the last scores.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        resumed_at: int,
        num_ranks: int,
        is_over: Callable[[int], bool] = lambda step: False,
        sinks: Sequence[Sink] = (),
        kept: Mapping[str, bytes] = MappingProxyType({}),
    ):
        self.num_ranks, self._sinks, self._kept = num_ranks, sinks, kept
        self._lines, self._last_scores = _open_metrics(run_uri, resumed_at)
        self.console = Console(highlight=False)
        self._window, self._saved_step = _Window(), resumed_at or None
        self._last_line = time.monotonic()
        self._step, self._is_over = resumed_at, is_over

    def step(
        self,
        step: int,
        total: int,
        epoch: int,
        lr: float,
        losses: dict[str, float],
        *,
        weights: dict[str, float],
        gradients: dict[str, dict[str, float]],
        taught: Mapping[str, float] = MappingProxyType({}),
        gradient_norm: float | None = None,
        rates: Mapping[str, float] = MappingProxyType({}),
        images: int,
        took_s: float,
        waited_s: float,
        saved_step: int | None,
    ) -> None:
        """Take note of a finished step; print a line now and then.

        `weights` are those of the task losses, where they change, `gradients` what was found of these, where that was
        looked at; `taught` is how much of each task was a teacher's; `gradient_norm` is that of all gradients, `rates`
        are the learning rates of groups that have others; `took_s` counts from the end of the step before.
        """
        record = {"kind": "step", "step": step, "epoch": epoch, "lr": lr, "loss": losses}
        more = {"weights": weights, "gradients": gradients, "taught": dict(taught)}
        more |= {"gradient_norm": gradient_norm, "rates": dict(rates)}
        self._record(record | {name: values for name, values in more.items() if values})
        self._window.add(images, took_s, waited_s)
        self._saved_step = self._saved_step if saved_step is None else saved_step
        now = time.monotonic()
        if now - self._last_line < (1.0 if self.console.is_terminal else LINE_EVERY_S) and step < total:
            return
        self._last_line = now
        speed, waiting = self._window.rates()
        self._tell(step, {"speed/images_per_s": speed, "speed/waiting_for_data": waiting})
        left = (total - step) * self._window.seconds / max(self._window.steps, 1)
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        shown += "  taught" * bool(taught) + "".join(f" {name} {share:.0%}" for name, share in taught.items())
        line = (
            f"epoch {epoch + 1}  step {step}/{total}  loss {shown}  {speed:.0f} frames/s  "
            f"waiting for data {waiting:.0%}  checkpoint {self._saved_step or 'none yet'}  "
            f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}  {left:.0f} s left"
        )
        self.console.print(line, end="\r" if self.console.is_terminal else "\n", soft_wrap=True)
        self._window = _Window()

    def evaluated(
        self,
        step: int,
        epoch: int,
        scores: dict[str, Any],
        constant: dict[str, Any],
        pictures: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Take note of an evaluation and print its scores beside the constant predictor's; pictures go to the board."""
        record = {"kind": "eval", "step": step, "epoch": epoch, "scores": scores, "constant": constant}
        self._record(record)
        self._last_scores, flat = record, flat_scores(scores)
        for sink in self._sinks:
            for name, pixels in pictures.items():
                sink.show(step, name, pixels)
        parts = "  ".join(f"{score.title} {flat[score.key]:.4f}" for score in main_scores(scores) if score.key in flat)
        first = table_of(scores)[0]
        floor = f"(constant predictor: {first.title} {constant[first.key]:.4f})"
        self.console.print(f"epoch {epoch + 1} scores  {parts}  {floor}", soft_wrap=True)
        more = {title: _cells(scores, column) for title, column in more_scores().items() if _has(scores, column)}
        if more:
            parts = "  ".join(f"{title} {cells}" for title, cells in more.items())
            self.console.print(f"epoch {epoch + 1} also    {parts}", soft_wrap=True)

    def timed(self, step: int, epoch: int, told: Mapping[str, Any]) -> None:
        """Take note of how fast the steps since the last time were (`Pace.take`)."""
        self._record({"kind": "pace", "step": step, "epoch": epoch, **told})

    def say(self, text: str) -> None:
        """Say something once for all ranks."""
        print(text, flush=True)

    def files(self) -> dict[str, list[bytes]]:
        """Return what to store in the run: name -> content in pieces, of what has changed since the last call."""
        files = self._lines.take_changed()
        for sink in self._sinks:
            files |= sink.files()
        return files

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Tell the sinks how it has ended. They take a bounded time."""
        ending: Ending = "failed" if kind else "finished" if self._is_over(self._step) else "stopped"
        for sink in self._sinks:
            sink.close(ending, {**self._kept, **_score_files(self._last_scores)})

    def _record(self, record: dict[str, Any]) -> None:
        self._lines.append(_line(record))
        self._step = record["step"]
        self._tell(record["step"], values_of(record))

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.add(step, values)


class NoTracker:
    """What ranks other than 0 have for a `Tracker`: it does nothing."""

    def step(self, *args: Any, **details: Any) -> None:
        """Write nothing."""

    def evaluated(self, *args: Any) -> None:
        """Write nothing."""

    def timed(self, *args: Any) -> None:
        """Write nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def files(self) -> dict[str, list[bytes]]:
        """Return no files: rank 0 stores them."""
        return {}

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, *error) -> None:
        """Tell nobody."""


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """Return what of a record is drawn over steps, by name."""
    if record["kind"] == "eval":
        return {f"score/{key}": value for key, value in flat_scores(record["scores"]).items()}
    if record["kind"] == "pace":
        slowest = {f"slowest/{name}": value for name, value in record.get("slowest", {}).items() if name != "host"}
        memory = {"memory/gpu_gib": record["gpu_gib"]} if "gpu_gib" in record else {}
        return {f"time/{name}": value for name, value in record["seconds"].items()} | slowest | memory
    kinds = {"loss": record.get("loss"), "weight": record.get("weights"), "taught": record.get("taught")}
    kinds |= {"lr": record.get("rates")}
    kinds |= {f"gradient_{name}": of for name, of in record.get("gradients", {}).items()}
    named = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in (values or {}).items()}
    norm = {"gradient_norm/total": record["gradient_norm"]} if "gradient_norm" in record else {}
    return {"lr": record["lr"]} | named | norm


def rows_until(run_uri: str, last_step: int) -> Iterator[Row]:
    """Yield all that is recorded of every step up to one."""
    records = (record for record in read_records(run_uri) if record["step"] <= last_step)
    for step, of_step in itertools.groupby(records, key=lambda record: record["step"]):
        values = {name: value for record in of_step for name, value in values_of(record).items()}
        yield Row(step, {name: value for name, value in values.items() if value is not None}, {})


def _score_files(record: dict[str, Any] | None) -> dict[str, bytes]:
    """Return an evaluation as files: its record, and its tables as they are printed."""
    if record is None:
        return {}
    floor = {"constant predictor": record["constant"]} if "constant" in record else {}
    tables = render_scores(floor | {f"epoch {record['epoch'] + 1}": record["scores"]})
    return {"scores.json": json.dumps(record, indent=1).encode(), "scores.txt": tables.encode()}


def _open_metrics(run_uri: str, resumed_at: int) -> tuple[Growing, dict[str, Any] | None]:
    """Open a run's records to go on after `resumed_at`: later steps are done again, and their old records go.

    With the last evaluation that is kept.
    """
    parts = _read_parts(run_uri)
    kept = [[record for record in records if record["step"] <= resumed_at] for records in parts]
    last = max((number for number, records in enumerate(kept) if records), default=0)
    lines = Growing(_part_name, number=last, content=map(_line, kept[last] if kept else ()))
    for number, (left, records) in enumerate(zip(kept, parts)):
        if len(left) < len(records):
            lines.replace(number, [_line(record) for record in left])
    evaluations = [record for records in kept for record in records if record["kind"] == "eval"]
    return lines, evaluations[-1] if evaluations else None


def _part_name(number: int) -> str:
    return f"metrics/{number:06d}.jsonl" if number else METRICS


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


class _Window:
    """Images, steps, and the time of steps since the last line. A step is told of after it: no clock of ours counts."""

    def __init__(self):
        self.images, self.steps, self.seconds, self.waited_s = 0, 0, 1e-9, 0.0

    def add(self, images: int, took_s: float, waited_s: float) -> None:
        self.images, self.steps = self.images + images, self.steps + 1
        self.seconds, self.waited_s = self.seconds + took_s, self.waited_s + waited_s

    def rates(self) -> tuple[float, float]:
        """Images a second, and the share of time spent waiting for data."""
        return self.images / self.seconds, self.waited_s / self.seconds


def read_records(run_uri: str) -> list[dict[str, Any]]:
    """Read a run's records, from metrics.jsonl and its parts; none where it has none. A NaN of older runs is None."""
    return [record for records in _read_parts(run_uri) for record in records]


def _read_parts(run_uri: str) -> list[list[dict[str, Any]]]:
    """Return the records of every part, by its number; none for a part that is not there."""
    more = [found.name for found in storage.list_objects(storage.join(run_uri, "metrics"))]
    last = max((int(name.partition(".")[0]) for name in more if MORE_METRICS.fullmatch(name)), default=0)
    return [_read_part(storage.join(run_uri, _part_name(number))) for number in range(last + 1)]


def _read_part(uri: str) -> list[dict[str, Any]]:
    try:
        lines = storage.read_bytes(uri).splitlines()
    except FileNotFoundError:
        return []
    records, reason = [], ""
    try:
        records = [json.loads(line, parse_constant=lambda name: None) for line in lines]
    except (ValueError, RecursionError) as error:
        reason = str(error)
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            reason = f"{str(record)[:80]!r} is no record"
    if reason:
        raise InputError(f"{uri} is damaged ({reason}); delete it: only its records of the run are lost")
    return records


def print_scores(rows: dict[str, dict[str, Any]], *, title: str = "", brief: bool = False) -> None:
    """Print the results table, a row a method, and below it, unless `brief`, one of the scores beside the main ones."""
    _print_tables(Console(highlight=False), rows, title, brief=brief)


def render_scores(rows: dict[str, dict[str, Any]], *, brief: bool = False) -> str:
    """Return the results tables as text."""
    console = Console(highlight=False, file=io.StringIO())
    _print_tables(console, rows, "", brief=brief)
    return console.file.getvalue()


def _print_tables(console: Console, rows: dict[str, dict[str, Any]], title: str, *, brief: bool) -> None:
    if not console.is_terminal:
        console.width = 140  # of a log or a file: wrapping a table to 80 columns only breaks it
    console.print(_scores_table(rows, title))
    columns = {name: column for name, column in more_scores().items() if any(_has(s, column) for s in rows.values())}
    if columns and not brief:
        console.print(_more_table(rows, columns))


def _scores_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """A task without labels says so, and so does the P of what it covers."""
    shown = main_scores(next(iter(rows.values()), {}))
    table = Table("", *(score.title for score in shown), title=escape(title), title_justify="left")
    for name, scores in rows.items():
        covers_all = len(scores["covers"]) == len(TASKS) or shown[-1] is not FIRST
        covered = "" if covers_all else f" ({', '.join(scores['covers']) or 'nothing'} only)"
        cells = [_cell(scores, score) + covered * (score.task is None) for score in shown]
        table.add_row(escape(plain(name)), *cells)
    return table


def _more_table(rows: dict[str, dict[str, Any]], columns: dict[str, list[Score]]) -> Table:
    """Valence and arousal share a column."""
    lower = {name: "\nlower is better" * (column[0].sign < 0) for name, column in columns.items()}
    table = Table("", *(f"{name}{note}" for name, note in lower.items()))
    for name, scores in rows.items():
        table.add_row(escape(plain(name)), *(_cells(scores, column) for column in columns.values()))
    return table


def _has(scores: dict[str, Any], column: list[Score]) -> bool:
    return any(scores.get(score.key) is not None for score in column)


def _cells(scores: dict[str, Any], column: list[Score]) -> str:
    cells = [_cell(scores, score) for score in column]
    return cells[0] if set(cells) in ({NO_LABELS}, {NOT_KNOWN}) else " / ".join(cells)


def _cell(scores: dict[str, Any], score: Score) -> str:
    """A score that is not there is not known, as of a run made before there was such a score."""
    value = scores.get(score.key, math.nan)
    return NO_LABELS if value is None else NOT_KNOWN if math.isnan(value) else f"{value:.4f}"
