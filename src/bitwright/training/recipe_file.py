"""Recipes from files and from the command line, and one clear line for everything that is wrong with them."""

import re
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bitwright.errors import BitwrightError
from bitwright.estimators import ESTIMATORS
from bitwright.training.lookup import close_matches
from bitwright.training.recipe import Recipe


class Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.1 takes it for text), a key given twice is refused."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore[reportArgumentType]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("bitwright") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(where: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the built-in one of that name, with `key=value` overrides applied in order.

    overrides: dotted keys, numbers index lists (`rules.0.weight.bits=2`); values are read as YAML.

    Raises: BitwrightError, one line that names file, key, value and what is accepted.
    """
    content, source = _read(where)
    given = []
    for text in overrides:
        given.append(_override(content, text))
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise BitwrightError(_one_line(error, source, given)) from None
    recipe._source = source
    _check(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(where: str | Path) -> tuple[dict[str, Any], str]:
    name, path = str(where), Path(where).expanduser()
    if not path.is_file() and name in builtin_recipes():
        path, source = resources.files("bitwright") / "recipes" / f"{name}.yaml", f"recipe {name}"
    elif path.is_dir():
        raise BitwrightError(f"{where}: a folder, not a recipe; give a YAML file or a built-in name")
    elif path.exists():
        source = name
    elif path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise BitwrightError(f"{where}: no such file")
    else:
        raise BitwrightError(f"{where}: no such file or built-in recipe; {close_matches(name, builtin_recipes())}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise BitwrightError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BitwrightError(f"{source}: not a recipe (not UTF-8 text)") from None
    except yaml.YAMLError as error:
        raise BitwrightError(f"{source}: not valid YAML{_yaml_problem(error)}") from None
    if not isinstance(content, dict):
        raise BitwrightError(f"{source}: not a recipe; expected keys and values such as 'bits: w4a4'")
    return content, source


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f" in line {mark.line + 1}" if mark else ""
    return f"{line} ({problem})" if problem else line


def _override(content: dict[str, Any], text: str) -> tuple[str, ...]:
    """Apply one `key=value` to `content`; returns the key's parts."""
    key, equals, value_text = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise BitwrightError(f"{text!r} is not accepted; use key=value, such as schedule.epochs=5")
    try:
        value = yaml.load(value_text, Loader)
    except yaml.YAMLError as error:
        raise BitwrightError(f"{text!r}: the value is not valid YAML{_yaml_problem(error)}") from None
    place: Any = content
    for depth, part in enumerate(parts[:-1]):
        index = _index(place, part, ".".join(parts[:depth]), text)
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[index]
    place[_index(place, parts[-1], ".".join(parts[:-1]), text)] = value
    return parts


def _index(place: Any, part: str, path: str, text: str) -> Any:
    """`part` of a dotted key as an index of `place`, which lies at `path`."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise BitwrightError(f"{text!r}: {path} is {place!r}, which has no keys")
    if not part.isdigit() or int(part) >= len(place):
        raise BitwrightError(f"{text!r}: {path} has {len(place)} entries; use a number below that, not {part}")
    return int(part)


def _check(recipe: Recipe) -> None:
    """What the fields alone cannot say."""
    if recipe.bits is None and not recipe.rules:
        raise BitwrightError(f"{recipe.source}: bits is missing; use 'bits: w4a4', a list of rules, or 'bits: float'")
    if recipe.estimator not in ESTIMATORS:
        hint = close_matches(recipe.estimator, ESTIMATORS)
        raise BitwrightError(f"{recipe.source}: estimator: {recipe.estimator!r} is not accepted; {hint}")
    try:
        recipe.all_rules()
    except BitwrightError as error:
        raise BitwrightError(f"{recipe.source}: {error}") from None


def _one_line(error: ValidationError, source: str, overrides: list[tuple[str, ...]]) -> str:
    """The first problem that pydantic found, in the project's words."""
    first = error.errors()[0]
    loc = tuple(str(p) for p in first["loc"])
    if any(loc[: len(o)] == o or (first["type"] == "missing" and o[: len(loc)] == loc) for o in overrides):
        source = "command line"
    path = ".".join(loc)
    if first["type"] == "extra_forbidden":
        parent = _section(loc[:-1])
        known = parent.model_fields if parent else ()
        return f"{source}: {path}: unknown key; {close_matches(loc[-1], known)}"
    if first["type"] == "missing":
        return f"{source}: {path} is missing"
    if not path:  # of keys that do not go together: the value would be the whole recipe
        return f"{source}: {_accepted(first, loc)}"
    return f"{source}: {path}: {first['input']!r} is not accepted; use {_accepted(first, loc)}"


def _accepted(problem: Any, loc: tuple[str, ...]) -> str:
    """What a field takes, in words."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    field = _field(loc)
    limits = _limits(field) if field else ""
    if limits and problem["type"] in _NUMBER_PROBLEMS:
        whole = field is not None and "int" in str(field.annotation)
        return f"{'a whole number' if whole else 'a number'} {limits}"
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"])
    if problem["type"] == "string_pattern_mismatch" and loc == ("device",):
        return "auto, cpu, cuda or cuda:N"
    if problem["type"] == "model_type":
        section = _section(loc)
        return "keys and values" + (f" ({', '.join(section.model_fields)})" if section else "")
    plain = {
        "string_type": "text",
        "bool_type": "true or false",
        "int_type": "a whole number",
        "float_type": "a number",
        "list_type": "a list",
        "dict_type": "keys and values",
    }
    return plain[problem["type"]] if problem["type"] in plain else problem["msg"].removeprefix("Input should be ")


_NUMBER_PROBLEMS = (
    *("int_type", "float_type", "greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("int_from_float", "int_parsing", "float_parsing", "finite_number"),
)


def _limits(field: FieldInfo) -> str:
    """`from 1 to 8`, `above 0`, … as the field's constraints say."""
    found: dict[type, Any] = {type(m): m for m in _constraints(field)}
    if Ge in found and Le in found:
        return f"from {found[Ge].ge} to {found[Le].le}"
    words = []
    if Ge in found:
        words.append(f"of at least {found[Ge].ge}")
    if Gt in found:
        words.append(f"above {found[Gt].gt}")
    if Lt in found:
        words.append(f"below {found[Lt].lt}")
    return " and ".join(words)


def _constraints(field: FieldInfo) -> list[Any]:
    found: list[Any] = list(field.metadata)
    for inner in typing.get_args(field.annotation):  # Annotated[…] | None
        for item in typing.get_args(inner)[1:]:
            found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _field(loc: tuple[str, ...]) -> FieldInfo | None:
    """The field of a recipe that a path leads to."""
    section = _section(loc[:-1])
    return section.model_fields.get(loc[-1]) if section and loc else None


def _section(loc: tuple[str, ...]) -> type[BaseModel] | None:
    """The model class that a path leads to, through lists and optional fields."""
    place: type[BaseModel] | None = Recipe
    for part in loc:
        if part.isdigit():
            continue
        field = place.model_fields.get(part) if place else None
        place = _model_in(field.annotation) if field else None
    return place


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)
