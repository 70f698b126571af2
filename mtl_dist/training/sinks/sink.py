"""What a sink is, and what a service behind one: a module each, and `opening.py` knows them by name.

A new service is a class with the methods of `Service`: `sending.Sender` makes a sink of it, which no training waits
for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Ending = Literal["finished", "stopped", "failed"]  # stopped: asked to, and to be continued


class About(NamedTuple):
    """What a sink is told of a run."""

    id: str  # the run's own, the same after any failure and on any node
    name: str
    uri: str
    settings: dict[str, Any]  # by dotted path


class Row(NamedTuple):
    """All that is known of a step."""

    step: int
    values: dict[str, float]
    pictures: dict[str, np.ndarray]  # (H, W, 3) uint8


@dataclass
class Known:
    """The last step that a service has, of every name of a value, and of all names."""

    of: dict[str, int] = field(default_factory=dict)
    all: int = 0

    def lacks(self, row: Row) -> Row:
        """Return what of a step it has not."""
        new = {name: value for name, value in row.values.items() if row.step > max(self.of.get(name, 0), self.all)}
        return Row(row.step, new, row.pictures if new else {})

    def note(self, rows: Iterable[Row]) -> None:
        """Take note of what it has been sent."""
        self.of |= {name: row.step for row in rows for name in row.values}


class Sink(Protocol):
    """Who is told of a run while it trains. No method waits for anybody, but for `close`."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take note of values of a step, by name. Steps come in order; one may come several times, with other names."""

    def show(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Take note of a picture of a step, (H, W, 3) uint8."""

    def files(self) -> dict[str, list[bytes]]:
        """Return what to store in the run: name -> content in pieces, of what has changed since the last call."""

    def close(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        """Take note of how this start of the run has ended, with files to keep. Returns within a bounded time."""


class Service(Protocol):
    """A server's client. Any call may take long, and raise anything: then `begin` is called again."""

    name: str

    def begin(self) -> Known:
        """Find the run, or make it, and say what is known of it."""
        ...

    def send(self, rows: list[Row]) -> None:
        """Send steps, in order."""

    def finish(self, ending: Ending, files: Mapping[str, bytes]) -> None:
        """Say how this start of the run has ended, and keep the files."""

    def attach(self, history: Iterable[Row], files: Mapping[str, bytes]) -> bool:
        """Give files to a run that has ended, in the place of those of their names; False where it is not there.

        `history` is what the run has recorded. Of a new object, alone.
        """
        ...
