"""The frozen form in the operators that XNNPACK's partitioner makes integer kernels of, and what it would not keep."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.batches import described
from bitwright.deploy.attention import IntProducts
from bitwright.deploy.integer import InputCodes, IntAdd, IntConv, IntEmbedding, IntLayer, IntLinear, OutputCodes
from bitwright.deploy.lower import LayerFile
from bitwright.deploy.phases import PhaseConv
from bitwright.errors import BitwrightError
from bitwright.layers.fold import along_first

# XNNPACK's tensors are int8, of which it drops every narrower bound.
LO, HI = -128, 127
# XNNPACK adds a bias to integer sums. A linear layer's is no whole number there; rounded, it moves by up to half a
# step of the sums. Up to this share of a step of the output, half of it on average, one code in a thousand changes.
LARGEST_SHIFT = 2e-3


def refuse_what_is_lost(frozen: nn.Module) -> None:
    """Raise BitwrightError if the network has anything that XNNPACK has no integer kernel for."""
    for module in frozen.modules():
        if isinstance(module, InputCodes):
            refuse_codes(module)
        elif isinstance(module, IntProducts) and any(m is not None for m in module._modules.values()):
            raise BitwrightError("target executorch keeps no quantized attention; leave it out of the rules")
        elif isinstance(module, IntLayer):
            refuse_layer(module)


def refuse_several_outputs(frozen: nn.Module, image: Tensor) -> None:
    """Raise BitwrightError for a network of several tensors out, or one that is no plain tensor."""
    with torch.no_grad():
        output = frozen(image)
    if not isinstance(output, Tensor):
        raise BitwrightError(f"target executorch takes models of one tensor out; this one gives {described(output)}")


def refuse_codes(codes: InputCodes) -> None:
    """Raise BitwrightError for a quantizer whose codes are not all of an int8."""
    if codes.hi - codes.lo != HI - LO:
        raise BitwrightError(
            f"{codes.name}: target executorch keeps inputs and outputs of 8 bits only, not {codes.bits}: XNNPACK drops "
            "bounds of narrower codes; train it at 8 bits (its weight may have fewer), or use target onnx"
        )
    if not codes.integer:
        raise BitwrightError(
            f"{codes.name}: target executorch keeps no scales per channel and no zero points between codes; "
            "use another grid, or target onnx"
        )


def refuse_layer(layer: IntLayer) -> None:
    """Raise BitwrightError for a layer that would not run on int8 weights and inputs."""
    if isinstance(layer, PhaseConv):
        raise BitwrightError(
            f"{layer.name}: target executorch keeps no quantized transposed convolution; leave it out of the rules, "
            "or use target onnx"
        )
    quantized = (layer.packed is not None, layer.input_quantizer is not None)
    if quantized == (False, False):
        return
    if isinstance(layer, IntConv) and len(layer.kernel_size) == 3:
        raise BitwrightError(
            f"{layer.name}: target executorch keeps no quantized convolution over three axes; leave it out of the "
            "rules, or use target onnx"
        )
    if isinstance(layer, IntEmbedding):
        raise BitwrightError(f"{layer.name}: target executorch keeps no quantized embedding; leave it out of the rules")
    if quantized != (True, True):
        raise BitwrightError(
            f"{layer.name}: target executorch wants weight and input quantized, the input at 8 bits (beside float "
            "inputs XNNPACK takes scales of its own at run time); change the rules, or use target onnx"
        )
    if layer.packed is not None and layer.packed.numbers.dtype != torch.int8:
        raise BitwrightError(
            f"{layer.name}: target executorch holds weights in int8, and this 8-bit grid has no 0; "
            "use grid lsq, or target onnx"
        )
    if isinstance(layer, IntConv) and pads_of(layer) is None:
        raise BitwrightError(
            f"{layer.name}: target executorch pads with as many zeros behind as in front; "
            "change the padding, or use target onnx"
        )


def pads_of(layer: IntConv) -> tuple[int, ...] | None:
    """Zeros on either side of each axis, as `F.conv2d` takes them; None if the layer pads otherwise."""
    if layer.same:
        return None
    before, after = layer.padding[::2], layer.padding[1::2]
    if before != after or (layer.padding_mode != "zeros" and any(before)):
        return None
    return tuple(reversed(before))


class Taken:
    """The codes of every quantizer in the order of execution: (quantizer, int8 tensor), or () outside of a run."""

    def __init__(self) -> None:
        self.items: list[tuple[InputCodes, Tensor]] = []


class Int8Codes(nn.Module):
    """A quantizer as operators; unsigned codes are 128 lower."""

    def __init__(self, codes: InputCodes, taken: Taken):
        super().__init__()
        self.source, self.taken = [codes], taken  # a list: the source is no child
        self.scale, self.zero = float(codes.scale), int(codes.zero) + LO - codes.lo

    def forward(self, x: Tensor) -> Tensor:
        ops: Any = torch.ops.quantized_decomposed
        about = (self.scale, self.zero, LO, HI, torch.int8)
        codes = ops.quantize_per_tensor(x, *about)
        if not self.source[0].shared:
            self.taken.items.append((self.source[0], codes))
        return ops.dequantize_per_tensor(codes, *about)


class Int8Layer(nn.Module):
    """A convolution or linear layer as operators.

    integer: False for a float layer and for the one that writes the network's output, which has no grid: XNNPACK's
    integer kernels have integer outputs, so that this product is taken in float32, of the same values.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: IntLayer, taken: Taken, integer: bool):
        super().__init__()
        self.source, self.integer = [layer], integer and layer.packed is not None
        self.codes = nn.Identity() if layer.input_quantizer is None else Int8Codes(layer.input_quantizer, taken)
        if self.integer:
            numbers, scale = positive(layer)
            self.register_buffer("weight", numbers)
            self.register_buffer("scale", scale)
            self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        else:
            self.register_buffer("weight", layer.values.clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.clone())

    @property
    def stored(self) -> LayerFile:
        """How the weight lies in the file."""
        name, bits, packing = self.source[0].name, self.source[0].bits, "int8" if self.integer else "float32"
        return LayerFile(name, bits, packing, self.weight.numel(), self.weight.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        layer, weight, x = self.source[0], self.weight, self.codes(x)
        if self.integer:
            ops: Any = torch.ops.quantized_decomposed
            weight = ops.dequantize_per_channel(weight, self.scale, self.zero, 0, LO, HI, torch.int8)
        if not isinstance(layer, IntConv):
            return F.linear(x, weight, self.bias)
        convolve: Any = F.conv1d if len(layer.kernel_size) == 1 else F.conv2d
        return convolve(x, weight, self.bias, layer.stride, pads_of(layer), layer.dilation, layer.groups)


def refuse_bias(layer: Int8Layer, output_scale: float) -> None:
    """Raise BitwrightError where the bias, rounded to a whole number of the sums' steps, would move too many codes."""
    bias, codes = layer.source[0].bias, layer.source[0].input_quantizer
    if bias is None or codes is None:
        return
    step = layer.scale.double() * codes.scale.double()
    moved = float(((bias.double() / step).round() * step - bias.double()).abs().max())
    if moved > LARGEST_SHIFT * output_scale:
        raise BitwrightError(
            f"{layer.source[0].name}: target executorch would move its bias by {moved / output_scale:.2g} steps of its "
            f"output, more than {LARGEST_SHIFT}; train it without bias, or use target onnx"
        )


def positive(layer: IntLayer) -> tuple[Tensor, Tensor]:
    """(int8 numbers, scales (channels,) float32 above 0) of a weight: XNNPACK takes no other scales.

    Beside a bias that is not on the grid of the sums, numbers of narrow weights are larger by a power of two, and
    scales smaller: the same values, and a finer grid for the bias to be rounded to.
    """
    assert layer.packed is not None
    numbers, scale = layer.packed.numbers.int(), layer.packed.scale.expand(layer.packed.numbers.shape[0])
    if layer.bias is not None and layer.bias_codes is None:
        multiple = 1 << max((HI // max(int(numbers.abs().max()), 1)).bit_length() - 1, 0)
        numbers, scale = numbers * multiple, scale / multiple
    turned = torch.where(along_first(scale < 0, numbers.ndim), -numbers, numbers)
    if int(turned.max()) > HI:
        raise BitwrightError(
            f"{layer.name}: a channel behind a negative BatchNorm gain has the code -128, and target executorch has no "
            "128; use target onnx"
        )
    if not bool((scale != 0).all()):
        raise BitwrightError(f"{layer.name}: target executorch keeps no channel whose scale is 0; use target onnx")
    return turned.to(torch.int8).contiguous(), scale.abs().contiguous()


class Int8Sum(nn.Module):
    """A sum of quantized operands."""

    def __init__(self, source: IntAdd, taken: Taken):
        super().__init__()
        slots = (source.input_quantizer, source.other_quantizer)
        self.operands = nn.ModuleList([nn.Identity() if c is None else Int8Codes(c, taken) for c in slots])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.operands[0](a) + self.operands[1](b)


class Int8Form(nn.Module):
    """A network in operators that XNNPACK takes; with `probe`, its outputs are the logits and every quantizer's codes.

    Args:
        frozen: free of what `refuse_what_is_lost` names; it is not changed.
        example: one image. probe: whether codes are outputs too.
    """

    def __init__(self, frozen: nn.Module, example: Tensor, *, probe: bool = False):
        super().__init__()
        self.taken, self.probe = Taken(), probe
        last = writer(frozen, example)
        self.network = nn.ModuleList([copy.deepcopy(frozen)])
        self.replace(self.network, last)

    def replace(self, parent: nn.Module, last: str | None) -> None:
        """Put operators in the place of integer layers below `parent`."""
        for key, child in list(parent._modules.items()):
            if isinstance(child, IntConv | IntLinear):
                parent._modules[key] = Int8Layer(child, self.taken, child.name != last)
            elif isinstance(child, OutputCodes):
                parent._modules[key] = Int8Codes(child.codes, self.taken)
            elif isinstance(child, IntAdd):
                parent._modules[key] = Int8Sum(child, self.taken)
            elif child is not None:
                self.replace(child, last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.taken.items.clear()
        logits = self.network[0](x)
        return (logits, *(codes for _, codes in self.taken.items)) if self.probe else (logits,)


def writer(frozen: nn.Module, example: Tensor) -> str | None:
    """The layer whose output, as it is or reshaped, is the network's; None if another module writes that."""
    found: dict[int, str] = {}
    held = []

    def note(layer: Any, _args: Any, y: Tensor) -> None:
        found[y.data_ptr()] = layer.name
        held.append(y)  # its memory is not used again while it is held

    handles = [m.register_forward_hook(note) for m in frozen.modules() if isinstance(m, IntLayer)]
    try:
        with torch.no_grad():
            return found.get(frozen(example).data_ptr())
    finally:
        for handle in handles:
            handle.remove()
