"""Which layers learn their bits, and which of them share one pair of widths."""

from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers import SharedInput
from bitwright.methods.adaqat.cost import FLOAT_BITS
from bitwright.methods.adaqat.rule import Width
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer
from bitwright.rules import matches, weight_layers

ROLES = ("weight", "input")


def learned_layers(model: nn.Module, fixed: list[str]) -> dict[str, dict[str, list[Quantizer]]]:
    """{layer: {"weight": quantizers, "input": quantizers}} of every layer that no pattern of `fixed` names.

    Raises:
        BitwrightError: a pattern names no layer, a layer shares its input's quantizer, or none is left.
    """
    ordered = weight_layers(model)
    ends = {"first": ordered[0], "last": ordered[-1]} if ordered else {}
    for pattern in fixed:
        if not any(matches(pattern, n, m, ends) for n, m in model.named_modules()):
            raise BitwrightError(f"adaqat: fixed: {pattern!r} names no layer of the model")
    learned: dict[str, dict[str, list[Quantizer]]] = {}
    for name, layer in quant_layers(model).items():
        if any(matches(p, name, layer, ends) for p in fixed):
            continue
        if isinstance(getattr(layer, "input_quantizer", None), SharedInput):
            raise BitwrightError(
                f"adaqat: {name} shares the quantizer of its input with a sum, whose bits are nobody's to learn; "
                "use topology: res8 or fpres"
            )
        quantizers = layer.quantizers()
        roles = {
            "weight": [q for slot, q in quantizers.items() if slot in layer.weight_slots],
            "input": [q for slot, q in quantizers.items() if slot not in layer.weight_slots],
        }
        if roles["weight"] or roles["input"]:
            learned[name] = roles
    if not learned:
        raise BitwrightError("adaqat: no quantized layer is left to learn; prepare the model, or fix fewer layers")
    return learned


def make_group(
    name: str, members: list[dict[str, list[Quantizer]]], start: float | None, floor: int
) -> dict[str, Width]:
    """The widths of one group by role; a role without quantizers is absent.

    Args:
        members: the group's layers, as `learned_layers` has them. start: initial N, None: as by the rules.

    Raises:
        BitwrightError: the rules' bits differ within a role, or are fewer than `floor`.
    """
    group = {}
    for role in ROLES:
        found = [q for member in members for q in member[role]]
        if not found:
            continue
        bits = {int(q.bits.item()) for q in found}
        if start is None and (len(bits) > 1 or min(bits) < floor):
            raise BitwrightError(
                f"adaqat: {name}: {role} bits are {sorted(bits)} by the rules; with start=None they must be alike "
                f"and at least {floor}"
            )
        group[role] = Width(name, role, found, float(start if start is not None else bits.pop()))
    return group


def pair_of(group: dict[str, Width], bits: int | None = None) -> tuple[int, int]:
    """(weight bits, input bits) of a group, now or with every learned width at `bits`; 32 where float."""
    w, a = (FLOAT_BITS if r not in group else (bits or group[r].bits) for r in ROLES)
    return w, a
