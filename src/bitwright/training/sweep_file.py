"""What a sweep file says: its runs, each with the recipe that it will train."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.errors import BitwrightError
from bitwright.training.folder import RunFolder
from bitwright.training.recipe_file import Loader, load_recipe


class SweepFile(BaseModel):
    """What SWEEP.yaml holds.

    Attributes:
        recipe: a recipe file (relative to the sweep file) or the name of a built-in one.
        overrides: recipe keys for every run. A dotted key sets one value; a section as a mapping replaces all of it.
        variants: name -> recipe keys; every variant is one row of the final table.
        grid: recipe key -> list of values; every combination multiplies the variants.
        seeds: one run per seed; at least three make a standard deviation worth printing.
        jobs: runs side by side. Default: one per core.
        threads: of every run. Default 1: several threads per process beside other processes are slower.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"base": {}}, min_length=1)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    jobs: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    threads: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder name, its row in the table, its seed and `key=value` overrides."""

    name: str
    variant: str
    point: tuple[tuple[str, Any], ...]
    seed: int
    overrides: tuple[str, ...]


def read_sweep(path: Path) -> SweepFile:
    """The sweep in `path`; BitwrightError naming file, key, value and what is accepted."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise BitwrightError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BitwrightError(f"{path}: not a sweep (not UTF-8 text)") from None
    except yaml.YAMLError as error:
        raise BitwrightError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BitwrightError(f"{path}: a sweep is a mapping with the key 'recipe'")
    try:
        return SweepFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        accepted = ", ".join(SweepFile.model_fields)
        hint = f"; accepted keys: {accepted}" if first["type"] == "extra_forbidden" else ""
        raise BitwrightError(f"{path}: {key}: {first['input']!r}: {first['msg']}{hint}") from None


def as_override(key: str, value: Any) -> str:
    """`key=value`, the value as one line of YAML that the command line reads back."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={text.strip().removesuffix('...').strip()}"


def expand(sweep: SweepFile) -> list[Run]:
    """Every run, seeds innermost last: whole rounds of seeds end early runs first, so a table is useful early.

    Raises: BitwrightError where two runs would share a folder, or a row of the table would not say what was trained.
    """
    keys = list(sweep.grid)
    _refuse_hidden(sweep)
    runs = []
    for seed in sweep.seeds:
        for values in itertools.product(*sweep.grid.values()):
            point = tuple(zip(keys, values, strict=True))
            for variant, changes in sweep.variants.items():
                # threads before the overrides: a sweep may say otherwise for one variant.
                merged = {"threads": sweep.threads, **sweep.overrides, **dict(point), **changes, "seed": seed}
                label = "-".join([variant, *(str(v) for v in values), f"seed{seed}"])
                name = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in label)
                runs.append(Run(name, variant, point, seed, tuple(as_override(k, v) for k, v in merged.items())))
    names = [r.name for r in runs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise BitwrightError(f"two runs would share the folder {twice!r}; rename a variant or a grid value")
    return runs


def _refuse_hidden(sweep: SweepFile) -> None:
    """No key that another one would silently replace: its value would stand in the table, and was not trained."""
    sources = {"overrides": sweep.overrides, "grid": sweep.grid}
    sources |= {f"variants.{name}": changes for name, changes in sweep.variants.items()}
    for where, given in sources.items():
        if "seed" in given:
            raise BitwrightError(f"{where}.seed: {given['seed']!r} is not accepted; use seeds: [...], a run each")
    for name, changes in sweep.variants.items():
        for key, grid_key in itertools.product(changes, sweep.grid):
            if f"{key}.".startswith(f"{grid_key}.") or f"{grid_key}.".startswith(f"{key}."):
                raise BitwrightError(
                    f"variants.{name}.{key}: grid.{grid_key} sets that already, for every variant; "
                    "give it in one place, or as a variant for each value"
                )


def check_runs(path: Path, recipe: str, runs: list[Run], out: Path) -> None:
    """Read every run's recipe before the first is started, and compare it with what lies in `out`.

    Raises: BitwrightError for a recipe that is not accepted, and for a run in `out` that another one made: its result
        would stand in the table under a name that says something else.
    """
    for run in runs:
        try:
            wanted = load_recipe(recipe, run.overrides).digest()
        except BitwrightError as error:
            raise BitwrightError(f"{path}: run {run.name}: {error}") from None
        folder = RunFolder(out / run.name)
        if folder.recipe.is_file() and folder.load_recipe().digest() != wanted:
            raise BitwrightError(
                f"{folder.root}: made by another recipe than {path} says now; give another --out, or remove that run"
            )
