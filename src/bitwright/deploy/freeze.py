"""`freeze`: from the training form to the frozen integer form."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import example_of
from bitwright.deploy.attention import IntMultiheadAttention, IntProducts, IntTimmAttention, window_attend
from bitwright.deploy.capture import Captured, Surroundings, captured, surroundings, without_norm
from bitwright.deploy.integer import (
    QUANTIZER,
    InputCodes,
    IntAdd,
    IntConv,
    IntEmbedding,
    IntLayer,
    IntLinear,
    OutputCodes,
)
from bitwright.deploy.phases import IntConvTranspose, PhaseConv
from bitwright.errors import BitwrightError
from bitwright.layers import (
    LOST,
    OUTPUT,
    QuantAdd,
    QuantConv,
    QuantConv1d,
    QuantConv2d,
    QuantConv2dSame,
    QuantConv3d,
    QuantConvTranspose,
    QuantEmbedding,
    QuantLayer,
    QuantMultiheadAttention,
    QuantProduct,
    SharedInput,
    attach_output,
    lost_hooks,
    quantizer_in,
)
from bitwright.layers.attention import PRODUCT_SLOTS, QuantAttentionBase
from bitwright.layers.fold import (
    Weight,
    folded_bias,
    folded_weight,
    integer_weight,
    norm_affine,
    with_bias,
)
from bitwright.prepare import quant_layers, quantizers
from bitwright.wrappers import refuse_wrapped, unwrap


def freeze(model: nn.Module, example: Any) -> nn.Module:
    """A deep copy of `model` in its frozen integer form, on the CPU, in evaluation mode.

    BatchNorms that alone follow a convolution or linear layer are folded into its scales and bias; every
    quantized layer is replaced in place by one that holds integer weights, float scales and the bounds of its
    input's codes, and that sums integers exactly. What was not quantized stays float.

    Args:
        model: prepared, and calibrated or loaded; it is not changed.
        example: one input batch, as `calibrate` takes them, used to capture the graph.

    Raises:
        BitwrightError: nothing is quantized, a quantizer is not calibrated, the graph cannot be captured, or a
            layer has no integer form.
    """
    model = unwrap(model)
    check_ready(model)
    twin = copy.deepcopy(model).cpu().eval()
    plans = layer_plans(twin, captured(twin, example_of(example, "freeze").mapped(Tensor.cpu)))
    replaced: dict[int, nn.Module] = {}
    for name, layer in quant_layers(twin).items():
        plan = plans.get(name, Plan(None))
        replaced[id(layer)] = frozen_layer(layer, name, plan)
        if plan.norm is not None:
            replaced[id(plan.norm)] = without_norm(plan.norm)
    for name, module in twin.named_modules():
        codes = input_codes(module, OUTPUT, name)
        if codes is not None:
            target = replaced.get(id(module), module)
            if isinstance(target, nn.Sequential):  # what is left of a norm with an activation
                target.append(OutputCodes(codes))
            else:
                attach_output(target, OutputCodes(codes))
    # A replacement can hold layers of its own (an attention's projections), so it is visited as well.
    holder = nn.ModuleList([twin])
    pending: list[nn.Module] = [holder]
    seen: set[int] = set()
    while pending:
        parent = pending.pop()
        for key, child in list(parent._modules.items()):
            if child is None:
                continue
            parent._modules[key] = replaced.get(id(child), child)
            new = parent._modules[key]
            if new is not None and id(new) not in seen:
                seen.add(id(new))
                pending.append(new)
    frozen = holder[0].eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen


def check_ready(model: nn.Module) -> None:
    """Raise BitwrightError unless `model` has quantizers, each calibrated, with finite scales, and can be copied."""
    found = quantizers(model)
    if not found:
        raise BitwrightError("the model has no quantizers; call bitwright.prepare first")
    refuse_wrapped(model)
    lost = lost_hooks(model)
    if lost:
        raise BitwrightError(f"{lost[0]}: {LOST}")
    for name, quantizer in found.items():
        if not bool(quantizer.calibrated.item()):
            raise BitwrightError(f"{name} is not calibrated; call bitwright.calibrate(model, batches) first")
        if not all(bool(p.isfinite().all()) for p in quantizer.grid.parameters()):
            raise BitwrightError(f"{name}: its scale is NaN or infinite; training diverged, so nothing can be deployed")
    for name, module in model.named_modules():
        made = next((k for k, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is not None), None)
        if made is not None:
            raise BitwrightError(
                f"{name}.{made} is computed in every pass (pruning, weight_norm, spectral_norm); make it a parameter "
                "first: torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm"
            )


@dataclass(frozen=True)
class Plan:
    """How a layer is frozen. norm: what is folded into it. readers: quantizers with whole codes that read its output.
    alone: nothing else reads it.

    Where there is one, a runtime makes one kernel of the product, the bias and the rounding, and adds the bias as
    int32.
    """

    norm: nn.Module | None
    readers: tuple[InputCodes, ...] = ()
    alone: bool = False

    @property
    def integer_bias(self) -> bool:
        """Whether a runtime adds the bias as int32."""
        return bool(self.readers)


def layer_plans(model: nn.Module, graph: Captured) -> dict[str, Plan]:
    """A plan per layer that is called once."""
    modules = dict(model.named_modules())

    def codes(quantizer: str) -> InputCodes | None:
        layer, _, slot = quantizer.rpartition(".")
        return input_codes(modules[layer], slot, layer)

    def plan(around: Surroundings) -> Plan:
        norm = None if around.norm is None else modules[around.norm]
        found = tuple(c for name in around.readers if (c := codes(name)) is not None and c.whole)
        return Plan(norm, found, around.alone and len(found) == len(around.readers))

    return {name: plan(around) for name, around in surroundings(graph).items()}


def input_codes(layer: nn.Module, slot: str, name: str) -> InputCodes | None:
    """The integer form of the input or output quantizer in `slot`, or None."""
    quantizer = quantizer_in(layer, slot)
    if quantizer is None:
        return None
    full = f"{name}.{slot}" if name else slot
    shared = isinstance(getattr(layer, slot), SharedInput)
    # An attention may have a layer called `query` beside the operand of that name, and a file has one name for one.
    label = full if slot.removesuffix(QUANTIZER) in layer._modules else None
    return InputCodes(full, quantizer.affine(), quantizer.shape.axis, int(quantizer.bits.item()), shared, label)


def on_sums(layer: QuantLayer, plan: Plan) -> bool:
    """Whether a convolution's bias is added to its integer sums: by an integer kernel, or for reproducibility."""
    return plan.integer_bias or layer.reproducible


def weight_and_bias(
    layer: QuantLayer, name: str, plan: Plan, codes: InputCodes | None
) -> tuple[Weight | Tensor, Tensor | None, Tensor | None]:
    """(weight, bias float64, bias codes) of a convolution or linear layer after folding.

    Only convolutions take biases on the integer grid: a linear layer's is added in floating point.
    """
    norm = plan.norm
    raw = layer.weight_of("weight_quantizer")
    bias = folded_bias(getattr(layer, "bias", None), norm)
    if layer.weight_quantizer is None:
        factor = 1.0 if norm is None else norm_affine(norm)[0].view(-1, *[1] * (raw.ndim - 1))
        return (layer.outputs_first(raw).detach().double() * factor).float(), bias, None
    weight = folded_weight(layer.arranged(integer_weight(layer.weight_quantizer, raw, name)), norm)
    convolution = isinstance(layer, QuantConv) and weight.numbers.dtype == torch.int8
    if bias is None or codes is None or not codes.integer or not (convolution and on_sums(layer, plan)):
        return weight, bias, None
    return with_bias(weight, bias, codes.scale, codes.reach)


def frozen_weight_layer(layer: QuantLayer, name: str, plan: Plan, make: Callable[..., IntLayer]) -> IntLayer:
    """`make(name=, weight=, bias=, bias_codes=, input_quantizer=)` with the numbers of `layer`."""
    codes = input_codes(layer, "input_quantizer", name)
    weight, bias, bias_codes = weight_and_bias(layer, name, plan, codes)
    made = make(name=name, weight=weight, bias=bias, bias_codes=bias_codes, input_quantizer=codes)
    made.late_bias = on_sums(layer, plan) and bias_codes is None
    made.reproducible = layer.reproducible
    return made


@torch.no_grad()
def frozen_layer(layer: QuantLayer, name: str, plan: Plan) -> nn.Module:
    """The integer form of one quantized layer; BitwrightError if it has none."""
    if isinstance(layer, QuantConvTranspose):
        return IntConvTranspose(layer, frozen_weight_layer(layer, name, plan, lambda **f: PhaseConv(layer, **f)))
    if isinstance(layer, QuantConv1d | QuantConv2d | QuantConv3d):
        same = isinstance(layer, QuantConv2dSame)
        return frozen_weight_layer(layer, name, plan, lambda **f: IntConv(layer, same=same, **f))
    if isinstance(layer, QuantProduct):
        return frozen_weight_layer(layer, name, plan, IntLinear)
    if isinstance(layer, QuantEmbedding):
        return frozen_weight_layer(layer, name, plan, IntEmbedding)
    if isinstance(layer, QuantAdd):
        return IntAdd(*(input_codes(layer, slot, name) for slot in layer.input_slots))
    if isinstance(layer, QuantAttentionBase):
        slots = {slot: input_codes(layer, slot, name) for slot in PRODUCT_SLOTS}
        products = IntProducts(slots, layer.reproducible)
        if isinstance(layer, QuantMultiheadAttention):
            return frozen_multihead(layer, name, products)
        if hasattr(layer, "through_interface"):
            return frozen_in_place(layer, products)
        if hasattr(layer, "attend"):
            return frozen_windows(layer, products)
        return IntTimmAttention(layer, products)
    raise BitwrightError(f"{name}: a {type(layer).__name__} has no integer form")


def frozen_multihead(layer: QuantMultiheadAttention, name: str, products: IntProducts) -> IntMultiheadAttention:
    """torch's attention: its packed in-projection becomes a linear layer named after the attention itself."""
    codes = input_codes(layer, "input_quantizer", name)
    raw, bias = layer.in_proj_weight, layer.in_proj_bias
    weight = raw
    if layer.weight_quantizer is not None:
        weight = folded_weight(integer_weight(layer.weight_quantizer, raw, name), None)
    in_proj = IntLinear(name, weight, None if bias is None else bias.detach(), input_quantizer=codes)
    in_proj.reproducible = layer.reproducible
    return IntMultiheadAttention(layer, in_proj, products, layer.out_proj)


def frozen_in_place(layer: Any, products: IntProducts) -> nn.Module:
    """Attention of which everything but its products is kept."""
    for slot in PRODUCT_SLOTS:
        setattr(layer, slot, None)
    layer.products = products
    return layer


def frozen_windows(layer: Any, products: IntProducts) -> nn.Module:
    """torchvision's window attention, which calls a function of its own for the products."""
    frozen_in_place(layer, products)
    layer.attend = partial(window_attend, layer, products)
    return layer
