"""Which layers get which quantizers: an ordered list of rules, a later one wins."""

import difflib
import fnmatch
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers import Add, candidates, multiplies, takes_output, target_class, why_not
from bitwright.layers.attention import PRODUCT_SLOTS
from bitwright.spec import OneLineErrors, QuantizerSpec


class Rule(BaseModel, metaclass=OneLineErrors):
    """Quantizers for the layers that `match` names.

    A field that is not given leaves what earlier rules said; a field given as None makes that tensor float.

    Attributes:
        match: one or more of: a glob over dotted module names (`layer1.*.conv1`; `*` also crosses dots),
            `first` or `last` (the first and the last convolution or linear layer in the order of
            definition), `type:NAME` (class name, for example `type:Linear`).
        weight: quantizer of weights.
        input: quantizer of layer inputs (embeddings have none).
        attention: quantizer of the four operands of attention products.
        residual: quantizer of both operands of `bitwright.layers.Add`.
        output: quantizer of the module's output, for any module but containers (`bitwright.topology` makes such
            rules); patterns then range over all modules.
        shares: name of the module whose output quantizer stands for the layer's input quantizer, whatever `input`
            says; for convolutions and linear layers that read exactly that output.

    Raises:
        BitwrightError: a key or a value is not accepted (one line).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: tuple[str, ...] = Field(min_length=1)
    weight: QuantizerSpec | None = None
    input: QuantizerSpec | None = None
    attention: QuantizerSpec | None = None
    residual: QuantizerSpec | None = None
    output: QuantizerSpec | None = None
    shares: str | None = None

    @field_validator("match", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def rules(
    bits: str,
    *,
    ends: int | None = 8,
    grid: str = "lsq",
    estimator: str = "clipped_ste",
    grid_options: dict[str, Any] | None = None,
    estimator_options: dict[str, Any] | None = None,
) -> list[Rule]:
    """The usual rules in one call: `rules("w4a4")` quantizes every layer, with the two ends at `ends` bits.

    Args:
        bits: `wNaM`, N and M from 1 to 8: weights at N bits, inputs and attention products at M.
        ends: bit-width of the first and the last layer; None treats them like the rest. Default 8, the
            field's convention, which costs little and protects accuracy.
        grid, estimator: names for every quantizer (see `QuantizerSpec`).
        grid_options, estimator_options: keyword arguments of them, for every quantizer.

    Raises:
        BitwrightError: `bits` does not have the form `wNaM`, `ends` is outside 1 to 8, or a name is unknown.
    """
    parts = bits.lower().removeprefix("w").split("a")
    if not bits.lower().startswith("w") or len(parts) != 2 or not all(p in list("12345678") for p in parts):
        raise BitwrightError(f"bits {bits!r} is not accepted; use wNaM with N and M from 1 to 8, such as 'w4a4'")

    def spec(width: int) -> QuantizerSpec:
        return QuantizerSpec(
            bits=width,
            grid=grid,  # pyright: ignore[reportArgumentType]
            estimator=estimator,
            grid_options=grid_options or {},
            estimator_options=estimator_options or {},
        )

    weight, inputs = spec(int(parts[0])), spec(int(parts[1]))
    found = [Rule(match=("*",), weight=weight, input=inputs, attention=inputs)]
    if ends is not None:
        found.append(Rule(match=("first", "last"), weight=spec(ends), input=spec(ends)))
    return found


def weight_layers(model: nn.Module) -> list[str]:
    """Names of convolutions and linear layers that can be quantized, in the order of definition."""
    return [n for n, m in candidates(model).items() if multiplies(m)]


def matches(pattern: str, name: str, module: nn.Module, ends: dict[str, str]) -> bool:
    """Whether one pattern of a rule names this module; `ends` maps `first` and `last` to names."""
    if pattern in ends:
        return name == ends[pattern]
    if pattern.startswith("type:"):
        return type(module).__name__ in (pattern[5:], "Quant" + pattern[5:])
    return fnmatch.fnmatchcase(name, pattern)


def slot_field(slot: str, kind: type[nn.Module]) -> str:
    """The field of `Rule` that rules over `slot` of layers of class `kind`."""
    if slot in PRODUCT_SLOTS:
        return "attention"
    if issubclass(kind, Add):
        return "residual"
    return "weight" if slot == "weight_quantizer" else "input"


def fields_of(module: nn.Module) -> set[str]:
    """The fields of `Rule` that mean something for `module`: a residual add has no weight, say."""
    kind = target_class(module)
    if kind is None:
        return set()
    shares = {"shares"} if multiplies(module) else set()
    return shares | {slot_field(slot, kind) for slot in (*kind.weight_slots, *kind.input_slots)}


def resolve(model: nn.Module, rules: list[Rule]) -> dict[str, dict[str, Any]]:
    """What every module gets: {name: {rule field: spec, or a name for `shares`}}; those that stay float are absent.

    Raises:
        BitwrightError: a pattern names no module that could be quantized.
    """
    layers = candidates(model)
    outputs = {n: m for n, m in model.named_modules() if n and takes_output(m)}
    ordered = weight_layers(model)
    ends = {"first": ordered[0], "last": ordered[-1]} if ordered else {}
    found: dict[str, dict[str, Any]] = {name: {} for name in (*layers, *outputs)}
    for index, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise BitwrightError(
                f"rules[{index}]: {rule!r} is not accepted; use a bitwright.Rule, or bitwright.rules('w4a4') for a list"
            )
        said = rule.model_fields_set - {"match"}
        for pattern in rule.match:
            hit = [n for n, m in layers.items() if matches(pattern, n, m, ends)] if said != {"output"} else []
            behind = [n for n, m in outputs.items() if matches(pattern, n, m, ends)] if "output" in said else []
            if not hit and not behind:
                raise BitwrightError(no_match(index, pattern, model, list(outputs if said == {"output"} else layers)))
            for name in hit:
                for field in said - {"output"}:
                    found[name][field] = getattr(rule, field)
            for name in behind:
                found[name]["output"] = rule.output
    return {
        name: kept
        for name, fields in found.items()
        if (kept := {f: s for f, s in fields.items() if s and (f == "output" or f in fields_of(layers[name]))})
    }


def no_match(index: int, pattern: str, model: nn.Module, layers: list[str]) -> str:
    """The message for a pattern without a layer."""
    if pattern in dict(model.named_modules()):
        module = model.get_submodule(pattern)
        inside = any(name.startswith(pattern + ".") for name in layers)
        hint = f"for the layers inside it write {pattern + '.*'!r}" if inside else why_not(module)
        if not takes_output(module) and not inside:
            hint = "a container's output is that of its last child; name that"
        return f"rules[{index}].match: {pattern!r} is a {type(module).__name__}; {hint}"
    close = difflib.get_close_matches(pattern, layers, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"layers are {', '.join(layers[:6])} ..."
    if not layers:
        hint = f"this {type(model).__name__} has no layer that can be quantized"
    return f"rules[{index}].match: {pattern!r} names no layer of the model; {hint}"
