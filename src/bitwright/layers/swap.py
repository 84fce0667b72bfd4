"""Which layers can be quantized, and the in-place swap."""

import functools
import inspect

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bitwright.errors import BitwrightError
from bitwright.layers.add import Add, QuantAdd
from bitwright.layers.attention import QuantMultiheadAttention
from bitwright.layers.base import QuantLayer
from bitwright.layers.conv import QuantConv, QuantConv1d, QuantConv2d, QuantConv2dSame, QuantConv3d
from bitwright.layers.derived import computes_as, derived_class
from bitwright.layers.linear import QuantEmbedding, QuantLinear, QuantProduct
from bitwright.layers.transposed import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d

# Layers that compute with weights of their own: where they stay float, the user should know.
COMPUTING = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# By exact type. A class that derives from one of `BASES` has a form of its own where it computes as that does.
SWAPS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
    Add: QuantAdd,
}
BASES = (*CONVOLUTIONS, nn.Linear, nn.Embedding)


def timm_class(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for a layer of timm, which is imported only where the model has brought it."""
    kind = type(module)
    if not kind.__module__.startswith("timm.layers."):
        return None
    if kind.__name__ == "Conv2dSame":
        return QuantConv2dSame
    if kind.__module__ == "timm.layers.attention" and kind.__name__ == "Attention":
        from bitwright.layers.timm_attention import QuantTimmAttention

        return QuantTimmAttention
    return None


def transformers_class(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for a layer of transformers, imported only where the model has brought it."""
    kind = type(module)
    if kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D":
        from bitwright.layers.transformers_linear import QuantTransformersConv1D

        return QuantTransformersConv1D
    if asks_for_products(kind) and "config" in vars(module):
        from bitwright.layers.transformers_attention import quantized_class

        return quantized_class(kind)
    return None


@functools.cache
def names_in(kind: type[nn.Module]) -> frozenset[str]:
    """The names that the methods of a class use, those of the classes that it derives from included."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    methods = [inspect.unwrap(f) for base in bases for f in vars(base).values() if callable(f)]
    return frozenset(name for m in methods for name in getattr(getattr(m, "__code__", None), "co_names", ()))


def has_products(kind: type[nn.Module]) -> bool:
    """Whether a class computes attention products, by torch's function or by a softmax of its own."""
    names = names_in(kind)
    return "scaled_dot_product_attention" in names or ("softmax" in names and kind.__name__.endswith("Attention"))


def float_products(model: nn.Module) -> list[str]:
    """Names of layers that compute attention products which have no quantized form."""
    return [n for n, m in model.named_modules() if has_products(type(m)) and not quantizable(m)]


@functools.cache
def asks_for_products(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class lets a function of transformers' table compute its attention products."""
    code = getattr(inspect.unwrap(getattr(kind, "forward", None)), "__code__", None)  # pyright: ignore
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def torchvision_class(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for a layer of torchvision, imported only where the model has brought it."""
    kind = type(module)
    if kind.__module__ == "torchvision.models.swin_transformer" and kind.__name__.startswith("ShiftedWindowAttention"):
        from bitwright.layers.swin_attention import QuantShiftedWindowAttention, QuantShiftedWindowAttentionV2

        return QuantShiftedWindowAttentionV2 if kind.__name__.endswith("V2") else QuantShiftedWindowAttention
    return None


def derived(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for a layer whose class derives from one of torch's and computes as that does."""
    base = next((b for b in type(module).__mro__ if b in BASES), None)
    return derived_class(SWAPS[base], type(module)) if base and computes_as(module, base) else None


def target_class(module: nn.Module) -> type[QuantLayer] | None:
    """The quantized class for `module` (its own, if it was swapped), or None where there is none."""
    if isinstance(module, QuantLayer):
        return type(module)
    found = SWAPS.get(type(module)) or timm_class(module) or torchvision_class(module) or transformers_class(module)
    found = found or derived(module)
    return None if found is None or found.refusal(module) else found


def why_not(module: nn.Module) -> str:
    """Why `module` stays float: a phrase for messages."""
    found = SWAPS.get(type(module))
    reason = found.refusal(module) if found else None
    if reason:
        return f"it cannot be quantized: {reason}"
    if is_parametrized(module):
        names = ", ".join(module.parametrizations)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return f"it cannot be quantized: {names} is parametrized; torch.nn.utils.parametrize.remove_parametrizations"
    base = next((b for b in type(module).__mro__[1:] if b in SWAPS), None)
    if base:
        if type(module).forward is base.forward:
            return f"it cannot be quantized: its class is a {base.__name__} that computes in a way of its own"
        return f"it cannot be quantized: its class is a {base.__name__} with a forward of its own"
    if type(module).__name__.endswith("Attention") or has_products(type(module)):
        return "its products have no quantized form"
    return "layers of this class have no quantized form"


def without_form(model: nn.Module) -> dict[str, str]:
    """Why by dotted name: layers that compute with weights of their own and have no quantized form."""
    able = candidates(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, COMPUTING) and n not in able}
    return {n: why_not(m) for n, m in found.items() if not isinstance(m, QuantLayer)}


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that rules can give quantizers, by dotted name, in the order of definition."""
    found = {n: m for n, m in model.named_modules() if quantizable(m)}
    for name, module in model.named_modules():
        # An attention layer that stays torch's own never calls this child: its quantizers would not run.
        if isinstance(module, nn.MultiheadAttention) and not quantizable(module):
            found.pop(f"{name}.out_proj" if name else "out_proj", None)
    return found


def multiplies(module: nn.Module) -> bool:
    """Whether `module` is a convolution or linear layer that rules can give quantizers."""
    kind = target_class(module)
    return kind is not None and issubclass(kind, QuantConv | QuantProduct)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` was swapped already."""
    return isinstance(module, QuantLayer)


def quantizable(module: nn.Module) -> bool:
    """Whether rules can give `module` quantizers (already swapped layers included)."""
    return target_class(module) is not None


def swap(module: nn.Module, name: str) -> QuantLayer:
    """Turn a float layer into its quantized class in place, with empty slots.

    Raises:
        BitwrightError: no quantized class exists, or the layer uses a feature that it lacks.
    """
    if isinstance(module, QuantLayer):
        return module
    target = target_class(module)
    if target is None:
        raise BitwrightError(f"{name}: {type(module).__name__}: {why_not(module)}")
    module.__class__ = target  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(module, QuantLayer)
    for slot in (*module.weight_slots, *module.input_slots):
        module.register_module(slot, None)
    return module


def unswap(module: nn.Module, original: type[nn.Module]) -> None:
    """Undo `swap`: the class `original` again, without slots."""
    if isinstance(module, QuantLayer):
        for slot in (*module.weight_slots, *module.input_slots):
            delattr(module, slot)
        module.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]
