"""Options of methods: one line for a value that is not accepted."""

from typing import Any

from bitwright.errors import BitwrightError


def require(owner: str, ok: bool, key: str, value: Any, accepted: str) -> None:
    """BitwrightError for the value of an option of the method `owner` that is not accepted."""
    if not ok:
        raise BitwrightError(f"{owner}: {key}={value!r} is not accepted; use {accepted}")
