"""Whose bits a method may change."""

from collections.abc import Sequence

from torch import nn

from bitwright.channels import ChannelQuantizer
from bitwright.errors import BitwrightError
from bitwright.layers import SharedInput
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer
from bitwright.rules import matches, weight_layers

ROLES = ("weight", "input")


def adjustable_layers(
    model: nn.Module, fixed: Sequence[str], owner: str, roles: Sequence[str] = ROLES
) -> dict[str, dict[str, list[Quantizer]]]:
    """{layer: {"weight": quantizers, "input": quantizers}} of every layer that no pattern of `fixed` names.

    owner: the method that asks, for messages. roles: whose bits it changes; layers without them are left out.

    Raises:
        BitwrightError: a pattern names no layer, a layer shares its input's quantizer, or none is left.
    """
    ordered = weight_layers(model)
    ends = {"first": ordered[0], "last": ordered[-1]} if ordered else {}
    for pattern in fixed:
        if not any(matches(pattern, n, m, ends) for n, m in model.named_modules()):
            raise BitwrightError(f"{owner}: fixed: {pattern!r} names no layer of the model")
    learned: dict[str, dict[str, list[Quantizer]]] = {}
    for name, layer in quant_layers(model).items():
        if any(matches(p, name, layer, ends) for p in fixed):
            continue
        if "input" in roles and isinstance(getattr(layer, "input_quantizer", None), SharedInput):
            raise BitwrightError(
                f"{owner}: {name} shares the quantizer of its input with a sum, whose bits are nobody's to learn; "
                "use topology: res8 or fpres"
            )
        quantizers = layer.quantizers()
        found = {
            "weight": [q for slot, q in quantizers.items() if slot in layer.weight_slots],
            "input": [q for slot, q in quantizers.items() if slot not in layer.weight_slots],
        }
        if any(isinstance(q, ChannelQuantizer) for role in roles for q in found[role]):
            raise BitwrightError(
                f"{owner}: the weight of {name} has bits per channel, which are chosen already; start from a model "
                "without them"
            )
        if any(found[role] for role in roles):
            learned[name] = found
    if not learned:
        raise BitwrightError(f"{owner}: no quantized layer is left to learn; prepare the model, or fix fewer layers")
    return learned


def bit_means(owner: str, widths: dict[str, dict[str, int]]) -> dict[str, float]:
    """{"OWNER/weight_bits": mean, "OWNER/input_bits": mean} of {layer: {role: bits}}; without roles nobody has."""
    found = {r: [each[r] for each in widths.values() if r in each] for r in ROLES}
    return {f"{owner}/{role}_bits": sum(bits) / len(bits) for role, bits in found.items() if bits}
