"""How a command ends that was not done: a line for people and an exit code, never a traceback."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

from cascade.errors import exit_with_message

_terminated = threading.Event()
"""Set once the process was told to end by SIGTERM."""


def exit_with_code(action: Callable[[], object]) -> None:
    """Run a command: exit code 2 for something that the user must mend, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        exit_with_message(action)
    except KeyboardInterrupt:
        print("interrupted: run it again, and it goes on where it was", file=sys.stderr)
        sys.exit(143 if _terminated.is_set() else 130)


def end_on_sigterm() -> None:
    """Take SIGTERM, as `ray job stop` and schedulers send it, for Ctrl-C: Ray would print what its threads were at."""

    def interrupt(*_: object) -> None:
        _terminated.set()
        raise KeyboardInterrupt  # what Ray lets through wherever it waits

    if threading.current_thread() is threading.main_thread():  # no other may set one
        signal.signal(signal.SIGTERM, interrupt)
