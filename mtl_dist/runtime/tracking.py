"""What a run tells: metrics.jsonl in its storage is the truth, console and TensorBoard are views of it. Rank 0 only."""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tensorboardX import SummaryWriter

from mtl_dist import storage
from mtl_dist.errors import InputError, plain
from mtl_dist.tasks import TASKS

METRICS, BOARD = "metrics.jsonl", "tensorboard"
LINE_EVERY_S = 10.0
SCORE_NAMES = {"ccc_v": "CCC V", "ccc_a": "CCC A", "va": "VA", "expr": "EXPR F1", "au": "AU F1", "p": "P"}


class Tracker:
    """Collects records of a run; what `files` returns is stored in the run with every checkpoint."""

    def __init__(self, run_uri: str, *, resumed_at: int, num_ranks: int):
        self.num_ranks = num_ranks
        # Steps after the checkpoint that a run continues from are done again: their old records go.
        self._lines = [_line(record) for record in read_records(run_uri) if record["step"] <= resumed_at]
        self.console = Console(highlight=False)
        self._window, self._saved_step = _Window(), resumed_at or None
        self._last_line = time.monotonic()
        self._board_dir = tempfile.TemporaryDirectory(prefix="mtl_dist-tensorboard-")
        # A file of its own for every start; what earlier ones wrote beyond the step we continue from is not shown.
        self._board = SummaryWriter(self._board_dir.name, purge_step=resumed_at + 1)

    def step(
        self,
        step: int,
        total: int,
        epoch: int,
        lr: float,
        losses: dict[str, float],
        *,
        weights: dict[str, float],
        images: int,
        took_s: float,
        waited_s: float,
        saved_step: int | None,
    ) -> None:
        """Take note of a finished step; print a line now and then.

        `weights` are those of the task losses, where they change; `took_s` counts from the end of the step before.
        """
        record = {"kind": "step", "step": step, "epoch": epoch, "lr": lr, "loss": losses}
        self._lines.append(_line(record | ({"weights": weights} if weights else {})))
        self._window.add(images, took_s, waited_s)
        self._saved_step = self._saved_step if saved_step is None else saved_step
        self._board.add_scalar("lr", lr, step)
        for name, loss in losses.items():
            self._board.add_scalar(f"loss/{name}", loss, step)
        for task, weight in weights.items():
            self._board.add_scalar(f"weight/{task}", weight, step)
        now = time.monotonic()
        if now - self._last_line < (1.0 if self.console.is_terminal else LINE_EVERY_S) and step < total:
            return
        self._last_line = now
        speed, waiting = self._window.rates()
        self._board.add_scalar("speed/images_per_s", speed, step)
        self._board.add_scalar("speed/waiting_for_data", waiting, step)
        left = (total - step) * self._window.seconds / max(self._window.steps, 1)
        shown = "  ".join(f"{task} {losses[task]:.3f}" for task in (*TASKS, "total") if task in losses)
        line = (
            f"epoch {epoch + 1}  step {step}/{total}  loss {shown}  {speed:.0f} images/s  "
            f"waiting for data {waiting:.0%}  checkpoint {self._saved_step or 'none yet'}  "
            f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}  {left:.0f} s left"
        )
        self.console.print(line, end="\r" if self.console.is_terminal else "\n", soft_wrap=True)
        self._window = _Window()

    def evaluated(self, step: int, epoch: int, scores: dict[str, Any], constant: dict[str, Any]) -> None:
        """Take note of an evaluation and print its scores beside the constant predictor's."""
        self._lines.append(_line({"kind": "eval", "step": step, "epoch": epoch, "scores": scores}))
        for key in SCORE_NAMES:
            if scores[key] is not None:
                self._board.add_scalar(f"score/{key}", scores[key], step)
        parts = "  ".join(
            f"{name} {_cell(scores[key])}" for key, name in SCORE_NAMES.items() if scores[key] is not None
        )
        self.console.print(
            f"epoch {epoch + 1} scores  {parts}  (constant predictor: P {constant['p']:.4f})", soft_wrap=True
        )

    def files(self) -> dict[str, bytes | list[bytes]]:
        """Return the files to store in the run: name -> content, or its lines."""
        self._board.flush()
        boards = {f"{BOARD}/{path.name}": path.read_bytes() for path in Path(self._board_dir.name).iterdir()}
        return {METRICS: list(self._lines), **boards}

    def close(self) -> None:
        self._board.close()
        self._board_dir.cleanup()


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
    """Read a run's metrics.jsonl; empty where there is none. A NaN, as older runs have, is None."""
    try:
        lines = storage.read_bytes(storage.join(run_uri, METRICS)).splitlines()
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line, parse_constant=lambda name: None) for line in lines]
    except ValueError as error:
        raise InputError(
            f"{storage.join(run_uri, METRICS)} is damaged ({error}); delete it: only the records of the run are lost"
        ) from None


def print_scores(rows: dict[str, dict[str, Any]], *, title: str = "") -> None:
    """Print the results table: a row a method."""
    _scores_console().print(_scores_table(rows, title))


def render_scores(rows: dict[str, dict[str, Any]]) -> str:
    """Return the results table as text."""
    console = _scores_console(file=io.StringIO())
    console.print(_scores_table(rows, ""))
    return console.file.getvalue()


def _scores_console(**options: Any) -> Console:
    console = Console(highlight=False, **options)
    if not console.is_terminal:
        console.width = 120  # of a log or a file: wrapping a table to 80 columns only breaks it
    return console


def _scores_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """A task without labels says so, and so does the P of what it covers."""
    table = Table("", *SCORE_NAMES.values(), title=escape(title), title_justify="left")
    for name, scores in rows.items():
        covered = "" if len(scores["covers"]) == len(TASKS) else f" ({', '.join(scores['covers']) or 'nothing'} only)"
        cells = [_cell(scores[key]) for key in SCORE_NAMES]
        table.add_row(escape(plain(name)), *cells[:-1], cells[-1] + covered)
    return table


def _cell(score: float | None) -> str:
    return "no labels" if score is None else f"{score:.4f}"
