"""Budgets as people write them."""

import re

from bitwright.errors import BitwrightError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kib": 1024.0, "mib": 1024.0**2}


def parse_budget(budget: dict[str, float | int | str] | None, owner: str) -> dict[str, float]:
    """{"bitops": number, "size": bytes} from numbers or strings such as "0.51G" and "120KB" (KB = 1000 bytes).

    owner: the method that was given it, for messages.

    Raises:
        BitwrightError: another key, or a value that is no positive amount.
    """
    found: dict[str, float] = {}
    for key, value in (budget or {}).items():
        if key not in ("bitops", "size"):
            raise BitwrightError(f"{owner}: budget.{key} is not accepted; use bitops and size")
        parts = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
        unit = parts[2].removesuffix("b" if key == "size" else "bitops") if parts else ""
        unit = f"{unit}b" if unit in ("ki", "mi") else unit
        try:
            amount = float(parts[1]) * UNITS[unit] if parts and not isinstance(value, bool) else 0.0
        except (KeyError, ValueError):
            amount = 0.0
        if not 0 < amount < float("inf"):
            raise BitwrightError(
                f"{owner}: budget.{key}={value!r} is not accepted; use a number > 0, '0.5G' or '120KB'"
            )
        found[key] = amount
    return found
