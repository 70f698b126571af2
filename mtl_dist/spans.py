"""The parts of a step by name, for whoever listens: `training/times.py`, and through it a profile.

Without a listener a span costs nothing worth a name. Spans are of the thread that trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")

DATA, FORWARD, BACKWARD, RANKS, OPTIMIZER, SAVE, EVALUATION = (
    "data", "forward", "backward", "ranks", "optimizer", "save", "evaluation"
)  # fmt: skip


class Listener(Protocol):
    """Who is told where a span begins and ends."""

    def enter(self, name: str) -> None:
        """Note that a part begins, perhaps within another."""

    def leave(self) -> None:
        """Note that the part that began last ends."""


_listener: Listener | None = None


class span(contextlib.ContextDecorator):
    """A part of a step: `with span(SAVE):`, or `@span(SAVE)` above a function."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        if _listener:
            _listener.enter(self.name)

    def __exit__(self, *error) -> None:
        if _listener:
            _listener.leave()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener told of spans in the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def spanned(name: str, items: Iterable[Item]) -> Generator[Item]:
    """Yield items; the wait for each is a span."""
    iterator = iter(items)
    try:
        while True:
            with span(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
