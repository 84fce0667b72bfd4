"""Names and options that a person typed, resolved or refused in one line."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bitwright.errors import BitwrightError


def close_matches(name: str, known: Iterable[str]) -> str:
    """`"did you mean a, b?"` for names near `name`, else the known names, or, of many, how many and the first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {', '.join(near)}?"
    if len(names) > 20:
        return f"accepted: {len(names)} names, among them {', '.join(names[:5])}"
    return f"accepted: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, and its kind where the text alone would say nothing."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text or type(error).__name__


def check_options(function: Callable[..., Any], options: Mapping[str, Any], owner: str) -> None:
    """Refuse options that `function` has no keyword-only parameter for.

    Raises: BitwrightError naming the option, its owner and what is accepted.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            accepted = close_matches(option, known) if known else "it takes none"
            raise BitwrightError(f"unknown option {option!r} for {owner}; {accepted}")
