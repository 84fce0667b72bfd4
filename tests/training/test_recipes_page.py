"""docs/recipes.md names every key and option, with its default."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bitwright.estimators import ESTIMATORS
from bitwright.grids import GRIDS
from bitwright.rules import Rule
from bitwright.spec import QuantizerSpec
from bitwright.training.data import DATA
from bitwright.training.methods import COSTED, GIVEN, MADE
from bitwright.training.models import OWN_MODELS
from bitwright.training.recipe import (
    CalibrationSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    PartnerSection,
    Recipe,
    ScheduleSection,
)
from bitwright.training.sweep_file import SweepFile

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def cells(heading: str, after: str = "") -> dict[str, list[str]]:
    """The rows of the first table below a heading (and below the text `after`), by the name in their first cell."""
    section = re.split(r"^#+ ", PAGE[PAGE.index(f"# {heading}\n") :], flags=re.MULTILINE)[1]
    section = section[section.index(after) :]
    table = next(block for block in section.split("\n\n") if block.startswith("|"))
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def plain(default: Any) -> Any:
    """A default as YAML knows it."""
    return list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize(
    ("heading", "after", "section", "prefix"),
    [
        ("A recipe's keys", "", Recipe, ""),
        ("data", "", DataSection, "data."),
        ("model", "", ModelSection, "model."),
        ("optimizer", "", OptimizerSection, "optimizer."),
        ("schedule", "", ScheduleSection, "schedule."),
        ("calibration", "", CalibrationSection, "calibration."),
        ("rules", "", Rule, ""),
        ("rules", "A quantizer:", QuantizerSpec, ""),
        ("Sweeps", "", SweepFile, ""),
    ],
)
def test_every_key_and_its_default(heading: str, after: str, section: type[BaseModel], prefix: str) -> None:
    rows = cells(heading, after)
    assert list(rows) == [prefix + name for name in section.model_fields]
    for name, field in section.model_fields.items():
        told = rows[prefix + name][0].strip("`")
        default = field.get_default(call_default_factory=True) if field.default_factory else field.default
        if default is PydanticUndefined or isinstance(default, BaseModel):
            assert told == ""
        elif name not in ("jobs", "variants"):  # said in words
            assert yaml.safe_load(told) == plain(default), name


def test_partner_and_teacher() -> None:
    rows = cells("partner, teacher")
    assert list(rows) == [*(f"partner.{name}" for name in PartnerSection.model_fields), "teacher.model"]
    assert f"its `lr` is {PartnerSection().optimizer.lr} by default" in rows["partner.optimizer"][1]


def told_options(cell: str) -> dict[str, Any]:
    """`a=1` (`2`), `b` as {"a": 1, "b": ...}: names and defaults, what else is accepted left out."""
    outside = re.sub(r"\([^)]*\)", "", cell)
    pairs = [text.partition("=") for text in re.findall(r"`([^`]+)`", outside)]
    return {name: yaml.safe_load(value) if equals else ... for name, equals, value in pairs}


def options_of(made: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The options of a class with their defaults."""
    own = [p for p in inspect.signature(made).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: ... if p.default is p.empty else plain(p.default) for p in own if p.name not in left_out}


def test_methods() -> None:
    rows = cells("Methods")
    assert set(rows) == set(MADE)
    for name, made in MADE.items():
        more = {"latencies": None} if name in COSTED else {}
        assert told_options(rows[name][0]) == options_of(made, GIVEN) | more, name


def test_estimators_and_grids() -> None:
    rows = cells("Estimators")
    assert list(rows) == list(ESTIMATORS)
    for name, made in ESTIMATORS.items():
        assert told_options(rows[name][0]) == options_of(made, ()), name
    rows = cells("Grids")
    assert list(rows) == list(GRIDS)
    for name, made in GRIDS.items():
        assert told_options(rows[name][0]) == options_of(made["weight"], ("shape",)), name


def test_names_of_data_and_models() -> None:
    for key, names in (("data.name", DATA), ("model.name", OWN_MODELS)):
        said = cells(key.partition(".")[0])[key][1]
        assert all(f"`{name}`" in said for name in names)
