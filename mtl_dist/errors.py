"""What a user can mend, and how a command says it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import faulthandler
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mtl_dist import __version__

SCRIPT_PREFIX = "mtl-"  # of the console scripts, as pyproject.toml names them
Options = TypeVar("Options")


class InputError(ValueError):
    """Something the user can mend. The message says what is wrong, the value, what was expected, and what to do."""


class Damaged(Exception):
    """What we wrote is not as it was written: cut short, changed, or without a part. Its reader says where, and what to
    do: pass it over, make it anew, or an `InputError`."""


class StorageError(OSError):
    """The store did not answer as it should after every retry; carries the URI and the store's own words."""


class NonFiniteLoss(InputError):
    """Training diverged: the loss of a step, its weights or what they predict are not finite. All ranks raise it."""


class RunFailed(RuntimeError):
    """What was begun failed, and neither the user nor another try mends it. The message says where it stands."""


class OutOfMemory(RunFailed):
    """Memory ran out on a rank. Unlike other failures this one is mended by another start, which does with less."""


# What options of several commands may be: (least, most).
MAX_SEED = 2**63 - 1  # of what numpy and torch take
OPTION_BOUNDS = {"seed": (0, MAX_SEED), "batch": (1, 2**16), "workers": (0, 1024), "jobs": (1, 1024)}


def check_numbers(bounds: Mapping[str, tuple[float, float]], **options: Any) -> None:
    """Raise `InputError` for an option that is not within its (least, most), or no number; None is one not given."""
    for name, (least, most) in bounds.items():
        value = options.get(name)
        if value is not None and not least <= value <= most:
            expected = f"{most} or less" if value > most else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected {expected}")


class PlainParser(argparse.ArgumentParser):
    """Its refusals are `InputError`s, as those of all commands are."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError`, where argparse would print its usage and exit."""
        raise InputError(f"{message}; see {self.prog} --help")


def program(module: str) -> str:
    """Return what started this command, as a user types it: a console script such as mtl-train, or python -m MODULE."""
    name = Path(sys.argv[0]).name
    return name if name.startswith(SCRIPT_PREFIX) else f"python -m {module}"


def read_options(options: type[Options], args: list[str] | None, *, prog: str, description: str | None) -> Options:
    """Build a command's options from its command line. Raises `InputError` for what it refuses."""
    import tyro  # ranks and loader processes have no command line

    with plain_refusals(prog):
        return tyro.cli(options, args=args, prog=prog, description=description)


@contextlib.contextmanager
def plain_refusals(prog: str) -> Iterator[None]:
    """Turn what tyro refuses in this block, which it says in a box, into an `InputError`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as ended:
        if ended.code != 2:  # 0: --help
            raise
        raise InputError(_unbox(said.getvalue(), prog)) from None


def choose_command(
    commands: Mapping[str, Callable[..., None]], args: list[str] | None, *, prog: str, description: str
) -> Callable[[], None]:
    """Return the subcommand that the command line names, with its flags. Raises `InputError` for what it refuses."""
    import tyro  # ranks and loader processes have no command line

    later = {name: _later(command) for name, command in commands.items()}
    with plain_refusals(prog):
        return tyro.extras.subcommand_cli_from_dict(later, args=args, prog=prog, description=description)


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Give a function with the same flags that only remembers them: what the command says is no refusal of a flag."""

    @functools.wraps(command)
    def remember(*args, **flags):
        return functools.partial(command, *args, **flags)

    return remember


def _unbox(box: str, prog: str) -> str:
    """Return the text of a box of tyro's, without frame, title and rules, and with our names for settings."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:-1]
    rows = [line[2:].rstrip("│ ") if line.strip("│─- ") else "\f" for line in lines]  # \f: a rule
    parts = [part.strip("\n") for part in "\n".join(rows).split("\f")]
    text = "\n".join(re.sub(r"(?<=\S)\n(?=\S)", " ", part) for part in parts if part)  # wrapped sentences
    text = re.sub(r"^Error parsing (?:[A-Z]\w*: |(?=--))", "", text)  # of the command as a whole, or of a flag
    text = re.sub(r"^Error parsing ([\w.]+): (?=[\w.]+ is )", r"\1.", text)  # of a section: optim: lr is
    text = re.sub(r"\bin python (?=\w+ --help)", f"in {prog} ", text)  # tyro takes the first word for the program
    return text[:1].lower() + text[1:]


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names was probably meant, or list them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def plain(text: str) -> str:
    """Return text of others as a terminal may show it: what would move its cursor or set its colours is spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def run_command(
    main: Callable[[], None], *, interrupted: str = "the same command continues where this one stopped"
) -> None:
    """Run a command's `main`, and turn what it raises into one message and an exit code.

    2: `InputError`, which the user can mend. 3: `StorageError`; the same command may succeed later. 1: `RunFailed`.
    130: Ctrl-C; `interrupted` tells what is left then. Every other exception is a fault of ours and keeps its
    traceback. With `MTL_TRACEBACK=1` all keep it. `--version` in the place of all flags prints the version.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"mtl_dist {__version__}")
        return
    faulthandler.enable(sys.__stderr__)  # a crash in C code, or a mapped file that was cut short, says where
    try:
        main()
    except (InputError, StorageError, RunFailed) as error:
        if os.environ.get("MTL_TRACEBACK"):
            raise
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3 if isinstance(error, StorageError) else 1)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
