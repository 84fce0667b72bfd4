"""Coverage: which quantizers really ran, and which layers stayed float."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import inputs_of
from bitwright.calibrate import evaluating
from bitwright.errors import BitwrightError
from bitwright.layers import COMPUTING, Add, QuantLayer, candidates, has_products, why_not
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer
from bitwright.wrappers import unwrap

# How a tensor is quantized: as values, or as the integers of a reproducible layer's weight.
WAYS = ("forward", "integer_codes")


@dataclass(frozen=True)
class Coverage:
    """What one forward pass in evaluation mode did.

    ran, missed: names of quantizers. float_layers: names of layers that compute in float: no rule reached them, or
    they have no quantized form. notes: for the latter, the reason by layer name.
    """

    ran: tuple[str, ...]
    missed: tuple[str, ...]
    float_layers: tuple[str, ...]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every quantizer ran."""
        return not self.missed


def coverage(model: nn.Module, batch: Any) -> Coverage:
    """Run `model` once in evaluation mode and see which quantizers were called (and not bypassed).

    A fused path of a library can skip swapped layers without a word; the accuracy then is the float model's.

    Args:
        model: prepared and calibrated.
        batch: one batch, as `calibrate` takes them.

    Raises:
        BitwrightError: `batch` is something else.
    """
    model, inputs = unwrap(model), inputs_of(batch, "coverage")
    found = quantizers(model)
    called: set[str] = set()
    # Not hooks: torch leaves its fused paths where it sees any, and this pass would not be the one that evaluates.
    for name, quantizer in found.items():
        for way in WAYS:
            setattr(quantizer, way, remembering(quantizer, name, called, getattr(quantizer, way)))
    try:
        with evaluating(model), torch.no_grad():
            inputs.run(model)
    finally:
        for quantizer in found.values():
            for way in WAYS:
                delattr(quantizer, way)
    left, notes = stayed_float(model)
    ran = tuple(n for n in found if n in called)
    return Coverage(ran, tuple(n for n in found if n not in called), left, notes)


def remembering(quantizer: Quantizer, name: str, called: set[str], way: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`way`, a method of `quantizer`, that adds `name` to `called` when it quantizes."""

    def remember(x: Tensor) -> Tensor:
        if not quantizer.bypass:
            called.add(name)
        return way(x)

    return remember


def stayed_float(model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names of layers without any quantizer, why by name for those that cannot have one)."""
    able = candidates(model)
    products = [n for n, m in able.items() if is_attention(m)]
    left, notes = [], {}
    for name, module in model.named_modules():
        attention = is_attention(module) and not any(n == name or n.startswith(name + ".") for n in products)
        if isinstance(module, QuantLayer):
            # Attention whose products stay float may well have quantized projections.
            if not module.quantizers() and not module.reads:
                left.append(name)
        elif isinstance(module, COMPUTING) or attention or name in able:
            if isinstance(module, Add):
                continue
            left.append(name)
            if name not in able:
                notes[name] = f"a {type(module).__name__}: {why_not(module)}"
    return tuple(left), notes


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is an attention layer, or one around it, by its class."""
    return type(module).__name__.endswith("Attention") or has_products(type(module))


def require_complete(result: Coverage) -> None:
    """Raise BitwrightError naming the quantizers that did not run, if any."""
    if result.missed:
        shown = ", ".join(result.missed[:5]) + (" ..." if len(result.missed) > 5 else "")
        raise BitwrightError(
            f"coverage: {len(result.missed)} of {len(result.missed) + len(result.ran)} quantizers did not run "
            f"in evaluation: {shown}; the measured accuracy would not be the quantized network's"
        )
