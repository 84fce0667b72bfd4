"""Coverage: which quantizers really ran, and which layers stayed float."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitwright.batches import Inputs, inputs_of
from bitwright.calibrate import evaluating
from bitwright.errors import BitwrightError
from bitwright.layers import COMPUTING, LOST, OUTPUT, Add, QuantLayer, candidates, has_products, lost_hooks, why_not
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer
from bitwright.wrappers import unwrap

# How a tensor is quantized: as values, or as the integers of a reproducible layer's weight.
WAYS = ("forward", "integer_codes")

PRODUCTS = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.linear, F.bilinear, F.embedding, torch.einsum, torch.addmm, torch.baddbmm),
    *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm),
    *(Tensor.__matmul__, Tensor.__rmatmul__),
}


@dataclass(frozen=True)
class Coverage:
    """What one forward pass in evaluation mode did.

    ran, missed: names of quantizers. float_layers: names of layers that compute in float: no rule reached them, or
    they have no quantized form; and of parameters that the model's own code multiplies. notes: the reason by name, of
    the latter two and of quantizers that a replaced module lost.
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
    own = multiplied(model, inputs, left)
    left, notes = (*left, *own), {**notes, **own, **{f"{n}.{OUTPUT}": LOST for n in lost_hooks(model)}}
    ran = tuple(n for n in found if n in called)
    return Coverage(ran, tuple(n for n in found if n not in called), left, notes)


def remembering(quantizer: Quantizer, name: str, called: set[str], way: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`way`, a method of `quantizer`, that adds `name` to `called` when it quantizes."""

    def remember(x: Tensor) -> Tensor:
        if not quantizer.bypass:
            called.add(name)
        return way(x)

    return remember


class Multiplied(TorchFunctionMode):
    """Notes which parameters of two axes or more are multiplied as they are: {id: function}."""

    def __init__(self) -> None:
        super().__init__()
        self.by: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            for t in tree_leaves((args, kwargs)):
                whole = t if not isinstance(t, Tensor) or t._base is None else t._base
                if isinstance(whole, nn.Parameter) and whole.ndim > 1:
                    self.by.setdefault(id(whole), func.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


def multiplied(model: nn.Module, inputs: Inputs, left: Sequence[str]) -> dict[str, str]:
    """Why by name: parameters that code multiplies which is no layer's, `F.conv2d(x, self.weight)` say.

    left: names of layers that stay float, whose parameters are theirs.
    """
    # Not in the pass that counts: torch leaves its fused paths under a mode.
    with evaluating(model), torch.no_grad(), Multiplied() as seen:
        inputs.run(model)
    found = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        float_layer = isinstance(owner, QuantLayer) and getattr(owner, "weight_quantizer", None) is None
        inside = any(name == n or name.startswith(n + ".") for n in left) or "" in left
        if id(parameter) in seen.by and not float_layer and not inside:
            found[name] = (
                f"{seen.by[id(parameter)]} multiplies this parameter in float: only what layers do is quantized"
            )
    return found


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
