"""What a page needs of a run, read from its folder: nothing of the network is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class RunData:
    """name: the folder's. recipe: text of the resolved recipe. metrics: one record per epoch. summary: None while the
    run has not ended."""

    name: str
    recipe: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(epochs, values) of a metric, over the epochs that have it as a number."""
        points = [(m["epoch"], m[key]) for m in self.metrics if isinstance(m.get(key), int | float)]
        return [int(epoch) for epoch, _ in points], [float(value) for _, value in points]

    def value(self, key: str) -> Any:
        """An entry of the summary, or None."""
        return None if self.summary is None else self.summary.get(key)


def read_run(folder: Path) -> RunData:
    """The run in `folder`.

    Raises: BitwrightError naming the file that is missing or damaged.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise BitwrightError(f"{folder}: not a run (no recipe.yaml in it)")
    return RunData(
        folder.resolve().name,
        recipe.read_text(errors="replace"),
        _records(folder / "metrics.jsonl"),
        _summary(folder / "summary.json"),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """One dictionary per line; none where there is no file yet."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BitwrightError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
            raise BitwrightError(f"{path}, line {number}: an object with 'epoch' is expected")
        found.append(record)
    return found


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(errors="replace"))
    except ValueError as error:
        raise BitwrightError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BitwrightError(f"{path}: an object is expected")
    for key in ("weight_bits", "input_bits", "versions", "methods"):
        if not isinstance(found.get(key, {}), dict):
            raise BitwrightError(f"{path}: {key} is {found[key]!r}; an object is expected")
    return found
