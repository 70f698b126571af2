"""A file of a run that grows, in parts of about 1 MiB: object stores cannot append.

A part that is full is not written again, so that saves cost what is new, however long the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

PART_BYTES = 1 << 20


class Growing:
    """A growing file, in parts: `name` gives the name of each by its number, `content` is that of the last."""

    def __init__(self, name: Callable[[int], str], *, number: int = 0, content: Iterable[bytes] = ()):
        self._name, self._number, self._content = name, number, list(content)
        self._bytes = sum(map(len, self._content))
        self._changed: dict[str, list[bytes]] = {}

    def append(self, piece: bytes) -> None:
        """Write on; a piece is never cut."""
        if self._bytes >= PART_BYTES:
            self._number, self._content, self._bytes = self._number + 1, [], 0
        self._content.append(piece)
        self._bytes += len(piece)
        self._changed[self._name(self._number)] = self._content

    def replace(self, number: int, content: list[bytes]) -> None:
        """Write a part anew."""
        self._changed[self._name(number)] = content

    def take_changed(self) -> dict[str, list[bytes]]:
        """Return the parts that have changed since the last call, in an order of writing that never leaves a gap."""
        changed, self._changed = self._changed, {}
        return {name: list(changed[name]) for name in sorted(changed, key=lambda name: (len(changed[name]) > 0, name))}
