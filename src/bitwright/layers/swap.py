"""Which layers can be quantized, and the in-place swap."""

from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers.add import Add, QuantAdd
from bitwright.layers.attention import QuantMultiheadAttention
from bitwright.layers.base import QuantLayer
from bitwright.layers.conv import QuantConv1d, QuantConv2d, QuantConv2dSame
from bitwright.layers.linear import QuantEmbedding, QuantLinear

# By exact type: a subclass may have a forward of its own, which a swap would silently replace.
SWAPS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
    Add: QuantAdd,
}


def target_class(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for `module`, or None where there is none."""
    if type(module) in SWAPS:
        return SWAPS[type(module)]
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith("timm.") and type(module).__name__ == "Conv2dSame":
        return QuantConv2dSame
    if name.startswith("timm.") and type(module).__name__ == "Attention":
        from bitwright.layers.timm_attention import QuantTimmAttention, supported

        return QuantTimmAttention if supported(module) else None
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` was swapped already."""
    return isinstance(module, QuantLayer)


def quantizable(module: nn.Module) -> bool:
    """Whether rules can give `module` quantizers (already swapped layers included)."""
    return is_quantized(module) or target_class(module) is not None


def swap(module: nn.Module, name: str) -> QuantLayer:
    """Turn a float layer into its quantized class in place, with empty slots.

    Raises:
        BitwrightError: no quantized class exists, or the layer uses a feature that it lacks.
    """
    if isinstance(module, QuantLayer):
        return module
    target = target_class(module)
    if target is None:
        raise BitwrightError(f"{name}: a {type(module).__name__} cannot be quantized")
    if isinstance(module, nn.MultiheadAttention):
        reason = QuantMultiheadAttention.refusal(module)
        if reason:
            raise BitwrightError(f"{name}: this MultiheadAttention cannot be quantized: {reason}")
    module.__class__ = target  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(module, QuantLayer)
    for slot in (*module.weight_slots, *module.input_slots):
        module.register_module(slot, None)
    return module
