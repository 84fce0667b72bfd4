"""Names and options that a person typed, resolved or refused in one line."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            accepted = close_matches(option, known) if known else "it takes none"
            raise BitwrightError(f"unknown option {option!r} for {owner}; {accepted}")
        if isinstance(known[option].default, bool) and not isinstance(value, bool):  # "none" would count as yes
            raise BitwrightError(f"{owner}: {option}={value!r} is not accepted; use true or false")


def check_types(made: type, options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse options that the constructor of `made` does not have, lacks, or annotates with another type.

    given: names of parameters that no option sets, because the caller gives them.

    Raises: BitwrightError naming the option, its value and what is accepted.
    """
    parameters = list(inspect.signature(made).parameters.values())
    known = {p.name: p for p in parameters if p.name not in given}
    for option, value in options.items():
        if option not in known:
            accepted = close_matches(option, known) if known else "it takes none"
            raise BitwrightError(f"unknown option {option!r}; {accepted}")
        try:  # as JSON: a list then stands for a tuple, and 1 for 1.0, but neither "1" nor true
            adapter = TypeAdapter(known[option].annotation)
            adapter.validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise BitwrightError(f"{option}={value!r} is not accepted; use {wanted}") from None
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise BitwrightError(f"needs the option {name!r}")
