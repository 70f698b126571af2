"""What a run tells: metrics.jsonl in its storage is the truth, console and TensorBoard are views of it. Rank 0 only.

Both are stored with every checkpoint, in parts of about 1 MiB: metrics.jsonl goes on in metrics/000001.jsonl, and an
event file in another one. A part that is full is not written again, so that saves cost what is new, however long the
run; object stores cannot append.
"""

from __future__ import annotations

import io
import json
import math
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from mtl_dist import storage
from mtl_dist.errors import InputError, plain
from mtl_dist.objective.scores import FIRST, Score, flat_scores, main_scores, more_scores, table_of
from mtl_dist.tasks import TASKS

METRICS, BOARD = "metrics.jsonl", "tensorboard"
MORE_METRICS = re.compile(r"\d{6}\.jsonl")  # in metrics/, the parts after the first
PART_BYTES = 1 << 20
LINE_EVERY_S = 10.0
NO_LABELS, NOT_KNOWN = "no labels", "–"


class Tracker:
    """Collects records of a run; what `files` returns is stored in the run with every checkpoint."""

    def __init__(self, run_uri: str, *, resumed_at: int, num_ranks: int):
        self.num_ranks = num_ranks
        self._lines = _open_metrics(run_uri, resumed_at)
        self.console = Console(highlight=False)
        self._window, self._saved_step = _Window(), resumed_at or None
        self._last_line = time.monotonic()
        self._board = _Board(purge_step=resumed_at + 1)

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
        images: int,
        took_s: float,
        waited_s: float,
        saved_step: int | None,
    ) -> None:
        """Take note of a finished step; print a line now and then.

        `weights` are those of the task losses, where they change, `gradients` what was found of these, where that was
        looked at; `taught` is how much of each task was a teacher's; `took_s` counts from the end of the step before.
        """
        record = {"kind": "step", "step": step, "epoch": epoch, "lr": lr, "loss": losses}
        more = {"weights": weights, "gradients": gradients, "taught": dict(taught)}
        self._lines.append(_line(record | {name: values for name, values in more.items() if values}))
        self._window.add(images, took_s, waited_s)
        self._saved_step = self._saved_step if saved_step is None else saved_step
        drawn = {"loss": losses, "weight": weights, "taught": taught}
        drawn |= {f"gradient_{name}": of for name, of in gradients.items()}
        named = {f"{kind}/{name}": value for kind, values in drawn.items() for name, value in values.items()}
        self._board.add(step, {"lr": lr} | named)
        now = time.monotonic()
        if now - self._last_line < (1.0 if self.console.is_terminal else LINE_EVERY_S) and step < total:
            return
        self._last_line = now
        speed, waiting = self._window.rates()
        self._board.add(step, {"speed/images_per_s": speed, "speed/waiting_for_data": waiting})
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
        self._lines.append(_line(record))
        flat = flat_scores(scores)
        self._board.add(step, {f"score/{key}": value for key, value in flat.items()})
        for name, pixels in pictures.items():
            self._board.show(step, name, pixels)
        parts = "  ".join(f"{score.title} {flat[score.key]:.4f}" for score in main_scores(scores) if score.key in flat)
        first = table_of(scores)[0]
        floor = f"(constant predictor: {first.title} {constant[first.key]:.4f})"
        self.console.print(f"epoch {epoch + 1} scores  {parts}  {floor}", soft_wrap=True)
        more = {title: _cells(scores, column) for title, column in more_scores().items() if _has(scores, column)}
        if more:
            parts = "  ".join(f"{title} {cells}" for title, cells in more.items())
            self.console.print(f"epoch {epoch + 1} also    {parts}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Say something once for all ranks."""
        print(text, flush=True)

    def files(self) -> dict[str, list[bytes]]:
        """Return what to store in the run: name -> content in pieces, of what has changed since the last call."""
        return self._lines.take_changed() | self._board.parts.take_changed()


class NoTracker:
    """What ranks other than 0 have for a `Tracker`: it does nothing."""

    def step(self, *args: Any, **details: Any) -> None:
        """Write nothing."""

    def evaluated(self, *args: Any) -> None:
        """Write nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def files(self) -> dict[str, list[bytes]]:
        """Return no files: rank 0 stores them."""
        return {}


class _Parts:
    """A growing file, in parts: `name` gives the name of each by its number, `content` is that of the last."""

    def __init__(self, name: Callable[[int], str], *, number: int = 0, content: Iterable[bytes] = ()):
        self._name, self._number, self._content = name, number, list(content)
        self._bytes = sum(map(len, self._content))
        self._changed: dict[str, list[bytes]] = {}

    def append(self, piece: bytes) -> None:
        if self._bytes >= PART_BYTES:
            self._number, self._content, self._bytes = self._number + 1, [], 0
        self._content.append(piece)
        self._bytes += len(piece)
        self._changed[self._name(self._number)] = self._content

    def replace(self, number: int, content: list[bytes]) -> None:
        self._changed[self._name(number)] = content

    def take_changed(self) -> dict[str, list[bytes]]:
        """Return the parts that have changed since the last call, in an order of writing that never leaves a gap."""
        changed, self._changed = self._changed, {}
        return {name: list(changed[name]) for name in sorted(changed, key=lambda name: (len(changed[name]) > 0, name))}


class _Board:
    """Event files of TensorBoard, of their own for every start of the run."""

    def __init__(self, *, purge_step: int):
        begun = f"{BOARD}/events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}"
        # TensorBoard reads files in the order of their names, and drops what earlier ones have from this step on.
        self.parts = _Parts(lambda number: f"{begun}.{number:06d}" if number else begun)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def show(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show a picture, (H, W, 3) uint8."""
        (height, width), png = pixels.shape[:2], io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self.parts.append(length + next(checks) + data + next(checks))


def _open_metrics(run_uri: str, resumed_at: int) -> _Parts:
    """Open a run's records to go on after `resumed_at`: later steps are done again, and their old records go."""
    parts = _read_parts(run_uri)
    kept = [[record for record in records if record["step"] <= resumed_at] for records in parts]
    last = max((number for number, records in enumerate(kept) if records), default=0)
    lines = _Parts(_part_name, number=last, content=map(_line, kept[last] if kept else ()))
    for number, (left, records) in enumerate(zip(kept, parts)):
        if len(left) < len(records):
            lines.replace(number, [_line(record) for record in left])
    return lines


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
