"""Latency: what every layer takes at the bits that were measured, on whatever device measured it."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import BitwrightError

FIELDS = ["layer", "weight_bits", "input_bits", "milliseconds"]
REST = "(rest)"  # no module can be called so

Entries = Mapping[tuple[int, int], float]


def entry_for(entries: Entries, weight_bits: int, input_bits: int) -> float:
    """Milliseconds of the cheapest entry that holds both operands: kernels for more bits run fewer as well.

    Args:
        entries: {(weight bits, input bits): milliseconds} of one layer.

    Raises:
        BitwrightError: every entry has fewer bits.
    """
    fitting = [t for (w, a), t in entries.items() if w >= weight_bits and a >= input_bits]
    if not fitting:
        measured = ", ".join(f"{w}/{a}" for w, a in sorted(entries))
        raise BitwrightError(f"{weight_bits}/{input_bits} bits (weights/inputs) were not measured, only {measured}")
    return min(fitting)


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of one network on one device.

    layers: {layer: {(weight bits, input bits): milliseconds}}. rest: milliseconds of everything else (sums, pooling,
    what the bits do not change).
    """

    layers: Mapping[str, Entries]
    rest: float

    def to_csv(self) -> str:
        """The text of a file: layer, weight_bits, input_bits, milliseconds; the rest in a row "(rest)" without bits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(FIELDS)
        for name, entries in self.layers.items():
            writer.writerows([name, w, a, f"{t:.6g}"] for (w, a), t in entries.items())
        writer.writerow([REST, "", "", f"{self.rest:.6g}"])
        return text.getvalue()


def read_latencies(path: str | Path) -> LatencyTable:
    """The table of a CSV file as `LatencyTable.to_csv` makes it, or as a user's own device was measured.

    Raises:
        BitwrightError: the file cannot be read, a column is missing, or a row is not accepted (with its number).
    """
    path = Path(path)
    try:
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in FIELDS if name not in (reader.fieldnames or [])]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BitwrightError(f"{path}: cannot be read as a table of latencies: {error}") from None
    if missing:
        raise BitwrightError(f"{path}: the column {missing[0]} is missing; a table has {', '.join(FIELDS)}")
    layers: dict[str, dict[tuple[int, int], float]] = {}
    rest = 0.0
    for number, row in enumerate(rows, start=2):
        try:
            time = float(row["milliseconds"])
            if not 0 <= time < float("inf"):
                raise ValueError
            if row["layer"] == REST:
                rest = time
                continue
            pair = int(row["weight_bits"]), int(row["input_bits"])
        except (TypeError, ValueError):
            raise BitwrightError(f"{path}: line {number} is not accepted; use LAYER,8,8,0.51 (milliseconds)") from None
        layers.setdefault(row["layer"], {})[pair] = time
    if not layers:
        raise BitwrightError(f"{path}: there is no layer in this table")
    return LatencyTable(layers, rest)
