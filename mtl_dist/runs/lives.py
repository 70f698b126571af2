"""Who may write a run: `lives.json` has every start of it, the latest last, and that one may.

A process that was cut off or frozen, was believed dead, and wakes up beside its successor finds another start there and
ends. A list that is deleted or damaged while a run is under way is written again as its writer knows it.
"""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from mtl_dist import storage
from mtl_dist.errors import Damaged, InputError
from mtl_dist.parsing import parse_json
from mtl_dist.ranks import on_rank_0
from mtl_dist.runs.checkpoint import committed
from mtl_dist.sealed import seal, unseal

LIVES, STARTS = "lives.json", "starts"
FIELDS = {
    "life": str,
    "started": str,
    "step": int | None,  # that it continued from
    "num_ranks": int,
    "host": str,  # of rank 0
    "command": str,  # names of the launchers
    "typed": str,  # the command line; runs of before it was noted have none
}


class Superseded(InputError):
    """Another command trains the same run, and took over."""


class Stale(RuntimeError):
    """The ranks of this command were started again: this process is one of those before."""


@dataclass
class Life:
    """A start of a run. Every rank has it; rank 0 alone reads and writes the list."""

    run_uri: str
    known: list[dict[str, Any]]  # the starts up to this one
    number: int  # of two checkpoints of one step that of the higher number is the newer: hosts' clocks differ

    @property
    def name(self) -> str:
        """This start's own name."""
        return self.known[-1]["life"]

    def names(self) -> list[str]:
        """Name this start and those before."""
        return [life["life"] for life in self.known]

    def check_current(self) -> None:
        """Raise `Superseded` or `Stale` where a later start has the run."""
        try:
            lives = _read(self.run_uri)
        except Damaged:
            lives = []
        mine = self.names()
        later = [life for life in lives if life["life"] not in mine]
        if later and is_same_launcher(later[-1]["command"], self.known[-1]["command"]):
            raise Stale(f"the ranks of run {self.run_uri} were started again: this process was believed dead, and ends")
        if later:
            raise _taken_over(self.run_uri, later[-1])
        if [life["life"] for life in lives] != mine:
            where = storage.join(self.run_uri, LIVES)
            print(f"{where} was deleted or damaged: written again with the starts that are known", flush=True)
            self._write()

    def note_step(self, step: int) -> None:
        """Note where this life continues from."""
        self.check_current()
        self.known[-1]["step"] = step
        self._write()

    def _write(self) -> None:
        storage.write_bytes(storage.join(self.run_uri, LIVES), seal({STARTS: self.known}))


def begin_life(run_uri: str, *, launcher: str, num_ranks: int, command_line: str = "") -> Life:
    """Enter a new life of the run in its storage, so that earlier ones end. Every rank calls it.

    `launcher` names what started the ranks, the same for all its restarts: one word, or one for each of several
    launchers, of which a restart has one at least. `command_line` is what was typed to start it. Raises `Superseded`
    where another command has taken the run over from it.
    """

    def enter() -> Life:
        lives = read_lives(run_uri)
        is_mine = [is_same_launcher(life["command"], launcher) for life in lives]
        if any(is_mine) and not is_mine[-1]:
            raise _taken_over(run_uri, lives[-1])
        # The list may have been deleted: what is in the checkpoints counts too.
        number = 1 + max([len(lives), *(checkpoint.start for checkpoint in committed(run_uri)[0])])
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        mine = {"life": secrets.token_hex(4), "started": started, "step": None, "num_ranks": num_ranks}
        mine |= {"host": socket.gethostname(), "command": launcher, "typed": command_line}
        life = Life(run_uri, [*lives, mine], number)
        life._write()
        return life

    return on_rank_0(enter)


def is_same_launcher(one: str, other: str) -> bool:
    """Whether two starts have a launcher in common: of several nodes some may be new."""
    return not set(one.split()).isdisjoint(other.split())


def read_lives(run_uri: str) -> list[dict[str, Any]]:
    """Return every start of a run, the latest last: `FIELDS`; `typed` may be missing. Raises `InputError`."""
    try:
        return _read(run_uri)
    except Damaged as error:
        where = storage.join(run_uri, LIVES)
        raise InputError(f"{where} is damaged ({error}); delete it: only the list of starts is lost") from None


def _read(run_uri: str) -> list[dict[str, Any]]:
    try:
        data = storage.read_bytes(storage.join(run_uri, LIVES))
    except FileNotFoundError:
        return []
    # Of before it was sealed it is a list.
    lives = parse_json(data) if data.lstrip().startswith(b"[") else unseal(data).get(STARTS)
    if wrong := [life for life in lives if not _is_life(life)] if isinstance(lives, list) else [lives]:
        raise Damaged(f"expected starts, found {str(wrong[0])[:80]!r}")
    return lives


def _is_life(life: Any) -> bool:
    life = {"typed": ""} | life if isinstance(life, dict) else {}  # those of before it was noted have none
    return all(name in life and isinstance(life[name], FIELDS[name]) for name in FIELDS)


def _taken_over(run_uri: str, latest: dict[str, Any]) -> Superseded:
    return Superseded(
        f"run {run_uri} was taken over by another command at {latest['started']} on {latest['host']}: two commands "
        "train one run; this one ends, and leaves what the other writes alone"
    )
