"""The errors that a user is meant to read: each says what is wrong and what to change."""

from __future__ import annotations

import sys
from collections.abc import Callable


class CascadeError(Exception):
    """Base of every error that is the user's to mend (config, data, endpoint, file), not a defect of Cascade."""


class ConfigError(CascadeError):
    """A configuration that cannot be used. The message names the key and what is allowed there."""


class DataError(CascadeError):
    """Input data (a task file, a benchmark, a stored table) that cannot be read or breaks a rule."""


class TeacherError(CascadeError):
    """A teacher's endpoint cannot be used: a refused key, an unknown model, nobody answering."""


class BudgetExceeded(CascadeError):
    """A budget is spent. What was bought is kept; raise the budget and run again to go on."""


class FormatError(CascadeError):
    """A modifier file that is corrupt, foreign, newer than this version, or made for another base."""


def exit_with_message(action: Callable[[], object]) -> None:
    """Run a command; errors that are the user's to mend are printed without a traceback, exit code 2."""
    try:
        action()
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
