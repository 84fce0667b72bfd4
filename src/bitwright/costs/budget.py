"""Budgets as people write them."""

import re

from bitwright.errors import BitwrightError

KINDS = ("bitops", "size", "latency")
MILLISECONDS = {"": 1.0, "s": 1e3, "ms": 1.0, "us": 1e-3}
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kib": 1024.0, "mib": 1024.0**2}


def parse_budget(budget: dict[str, float | int | str] | None, owner: str) -> dict[str, float]:
    """{"bitops": number, "size": bytes, "latency": milliseconds} from numbers or strings such as "0.51G", "120KB"
    (KB = 1000 bytes) and "5ms".

    owner: the method that was given it, for messages.

    Raises:
        BitwrightError: another key, or a value that is no positive amount.
    """
    found: dict[str, float] = {}
    for key, value in (budget or {}).items():
        if key not in KINDS:
            raise BitwrightError(f"{owner}: budget.{key} is not accepted; use bitops, size and latency")
        parts = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
        unit = parts[2] if parts else ""
        if key != "latency":
            unit = unit.removesuffix("b" if key == "size" else "bitops")
            unit = f"{unit}b" if unit in ("ki", "mi") else unit
        units = MILLISECONDS if key == "latency" else UNITS
        try:
            amount = float(parts[1]) * units[unit] if parts and not isinstance(value, bool) else 0.0
        except (KeyError, ValueError):
            amount = 0.0
        if not 0 < amount < float("inf"):
            raise BitwrightError(
                f"{owner}: budget.{key}={value!r} is not accepted; use a number > 0, '0.5G', '120KB' or '5ms'"
            )
        found[key] = amount
    return found
