"""What a user can mend, and how a command says it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user can mend. The message says what is wrong, the value, what was expected, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names was probably meant, or list them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: an `InputError` becomes one message and exit code 2, Ctrl-C exit code 130.

    Every other exception is ours and keeps its traceback. `MTL_TRACEBACK=1` keeps it for input errors too.
    """
    try:
        main()
    except InputError as error:
        if os.environ.get("MTL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(130)
