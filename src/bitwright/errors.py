"""The one exception that means "your input, not our bug"."""

import inspect
from collections.abc import Callable
from typing import Any


class BitwrightError(Exception):
    """Bad input: one line that says what is wrong, where, and what is accepted.

    The command line prints the line and exits with 2; everything else is a bug and keeps its traceback.
    """


def option_error(owner: str, function: Callable[..., Any], error: TypeError) -> BitwrightError:
    """The line for a TypeError of `function(…, **options)`, with what it accepts: parameters with defaults."""
    known = [n for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty]
    return BitwrightError(f"{owner}: {error}; accepted: {', '.join(known) or 'none'}")
