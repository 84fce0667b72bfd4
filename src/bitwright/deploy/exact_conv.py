"""Convolutions whose output stays float, on integers held in float32: equal sums in whatever order they are taken.

Codes are dequantized with scale 1 and weights not at all, so that every product and partial sum is an integer that
float32 holds. One multiplication per channel follows, as in `bitwright.kernels.reproducible.scaled`; a `Sum` of one
operand keeps a runtime from multiplying it into the weights. These are float kernels: onnxruntime's integer one that
gives its sums (ConvInteger) takes five to eight times as long.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from bitwright.deploy.builder import container_zero
from bitwright.deploy.compact_lowering import CompactLowering
from bitwright.deploy.integer import DOMAIN, InputCodes, IntConv, IntLayer
from bitwright.layers.fold import magnitudes
from bitwright.layers.whole import EXACT

# What `shown` needs, behind a layer's name: its scales, (channels, 1, …), and its bias in units of the sums' step.
SCALES, BIAS_SUMS = ".scales", ".bias_sums"
# Where sums may be too large, weights and biases are taken apart at this power of two.
HIGH = 16
# Runtimes move a quantizer in front of these, or make bounds of codes of them.
SEEN_THROUGH = {
    "Relu",
    "Clip",
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "DepthToSpace",
}


def bounds(layer: IntConv) -> torch.Tensor:
    """Per channel the largest size of a partial sum, in one piece and in two, (2, channels) int64."""
    assert layer.weight_codes is not None
    assert layer.input_quantizer is not None
    numbers = layer.weight_codes.long()
    bias = torch.zeros(len(numbers), dtype=torch.int64) if layer.bias_codes is None else layer.bias_codes
    low, low_bias = numbers % HIGH, bias % HIGH
    pieces = [(numbers, bias), ((numbers - low) // HIGH, (bias - low_bias) // HIGH), (low, low_bias)]
    found = torch.stack([magnitudes(n) * layer.input_quantizer.reach + b.abs() for n, b in pieces])
    return torch.stack([found[0], found[1:].amax(0)])


def called(node: NodeProto) -> str:
    """The name of the layer or quantizer that a placeholder stands for."""
    return next((helper.get_attribute_value(a).decode() for a in node.attribute if a.name == "name"), "")


@dataclass
class ExactConvLowering(CompactLowering):
    """reader: the one node of the exported graph that reads a tensor, by tensor. uses: of placeholders, by name.
    constants: names of the exported graph's."""

    reader: dict[str, NodeProto] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    uses: Counter[str] = field(default_factory=Counter)

    def look_at_graph(self, graph: onnx.GraphProto) -> None:
        super().look_at_graph(graph)
        self.uses = Counter(called(node) for node in graph.node if node.domain == DOMAIN)
        self.constants = {tensor.name for tensor in graph.initializer}
        self.reader = {name: node for node in graph.node for name in node.input if name in self.read_once}

    def behind(self, y: str) -> str:
        """What is left of `y` once a runtime has taken norms, products and sums with constants that follow it into the
        convolution, as it does where the weights are constants; `y` where none follows."""
        node = self.reader.get(y)
        while node is not None and (
            node.op_type == "BatchNormalization"
            or (node.op_type in ("Mul", "Add") and any(name in self.constants for name in node.input))
        ):
            y = node.output[0]
            node = self.reader.get(y)
        return y

    def merged(self, y: str) -> bool:
        """Whether a quantizer alone reads `y`: a runtime then makes an integer kernel of it and what is in front."""
        node = self.reader.get(y)
        while node is not None and node.op_type in SEEN_THROUGH and y in node.input[:1]:
            y = node.output[0]
            node = self.reader.get(y)
        if node is None or node.domain != DOMAIN:
            return False
        name = called(node)
        codes = self.quantizers.get(name) or getattr(self.layers.get(name), "input_quantizer", None)
        return codes is not None and codes.integer and not codes.shared

    def conv(self, layer: IntConv, at: str, x: str, y: str, pads: list[int], sizes: list[int]) -> None:
        whole = layer.bias is None or layer.bias_codes is not None
        merged = self.merged(y)
        if not layer.integer or (whole and merged):
            return super().conv(layer, at, x, y, pads, sizes)
        if not layer.reproducible:
            # Constant weights in front of a quantizer a runtime would round to 8 bits of its own.
            if not merged and not self.merged(self.behind(y)) and self.uses[layer.name] == 1:
                self.floating.add(layer.name)
            return super().conv(layer, at, x, y, pads, sizes)
        one_piece, two_pieces = (int(bound.max()) < EXACT for bound in bounds(layer))
        if not (one_piece or two_pieces):
            return super().conv(layer, at, x, y, pads, sizes)
        codes, mode = layer.input_quantizer, layer.padding_mode
        assert codes is not None
        apart = pads if any(pads) and mode != "zeros" else None
        x = self.numbers_of(codes, x, at, apart, mode)
        kept = self.window(layer, pads if apart is None else [])
        operands = self.operands(layer)
        sums = f"{at}.sums"
        if one_piece:
            self.nodes.append(helper.make_node("Conv", [x, *operands], [f"{at}.sum"], name=at, **kept))
            self.kept(f"{at}.sum", sums)
        else:
            high, low = zip(*(self.pieces(operand) for operand in operands), strict=True)
            self.node("Conv", [x, *high], f"{at}.high", name=at, **kept)
            self.node("Conv", [x, *low], f"{at}.low", **kept)
            # Each on its own, so that neither convolution starts from the other's sums.
            for part in ("high", "low"):
                self.kept(f"{at}.{part}", f"{at}.{part}_sums")
            self.node("Add", [f"{at}.high_sums", f"{at}.low_sums"], sums)
        late = layer.bias is not None and not whole
        self.node("Mul", [sums, self.step(layer)], f"{at}.scaled" if late else y)
        if late:
            bias = self.column(f"{layer.name}.bias", layer.bias.numpy(), len(layer.kernel_size))  # pyright: ignore
            self.node("Add", [f"{at}.scaled", bias], y)

    def numbers_of(self, codes: InputCodes, x: str, at: str, pads: list[int] | None, mode: str) -> str:
        """The integers of a quantized input, as floats, padded where `pads` says so."""
        one = self.scalar(1.0, np.float32)
        if codes.shared:
            scale, zero = self.input_scale(codes), self.zero_point(codes, container_zero(codes))
            k = self.node("QuantizeLinear", [x, scale, zero], f"{at}.again")
            k = k if pads is None else self.padded(k, pads, mode, at)
            return self.node("DequantizeLinear", [k, one, zero], f"{at}.numbers")
        x = self.quantized(codes, x, pads=pads, mode=mode)
        self.nodes[-1].input[1] = one
        return x

    def operands(self, layer: IntConv) -> list[str]:
        """The weight's integers and, if it has one, the bias's, as floats that are made at load."""
        name = layer.name
        numbers = f"{name}.weight_numbers"
        if numbers not in self.made:
            self.made.add(numbers)
            self.node("Cast", [self.unpacked(layer, False)], numbers, to=TensorProto.FLOAT)
            if layer.bias_codes is not None:
                codes = self.integers(f"{name}.bias_codes", layer.bias_codes.numpy())
                self.node("Cast", [codes], f"{name}{BIAS_SUMS}", to=TensorProto.FLOAT)
        return [numbers] if layer.bias_codes is None else [numbers, f"{name}{BIAS_SUMS}"]

    def pieces(self, numbers: str) -> list[str]:
        """[multiples of `HIGH`, what is left of it], whose sum the numbers are."""
        high, low = f"{numbers}_high", f"{numbers}_low"
        if high not in self.made:
            self.made.add(high)
            unit = self.scalar(float(HIGH), np.float32)
            parts = self.node("Floor", [self.node("Div", [numbers, unit], f"{numbers}_parts")], f"{numbers}_whole")
            self.node("Mul", [parts, unit], high)
            self.node("Sub", [numbers, high], low)
        return [high, low]

    def step(self, layer: IntConv) -> str:
        """Input scale times weight scale, (channels, 1, …), made once per layer."""
        out = f"{layer.name}.step"
        if out not in self.made:
            self.made.add(out)
            assert layer.weight_scale is not None
            assert layer.input_quantizer is not None
            column = self.column(f"{layer.name}{SCALES}", layer.weight_scale.numpy(), len(layer.kernel_size))
            self.node("Mul", [self.input_scale(layer.input_quantizer), column], out)
        return out


def shown(graph: onnx.GraphProto, layers: dict[str, IntLayer]) -> list[NodeProto]:
    """Nodes that make the dequantized weight and bias of such layers, which the graph does without."""
    present = {out for node in graph.node for out in node.output} | {t.name for t in graph.initializer}
    made = []
    for name, layer in layers.items():
        if f"{name}{SCALES}" not in present or layer.weight_scale is None or layer.input_quantizer is None:
            continue
        line, flat = f"{name}.line", f"{name}.flat"
        made.append(helper.make_node("Constant", [], [flat], value=numpy_helper.from_array(np.array([-1]))))
        made.append(helper.make_node("Reshape", [f"{name}{SCALES}", flat], [line]))
        made.append(helper.make_node("DequantizeLinear", [f"{name}.codes", line], [f"{name}.weight"], axis=0))
        if f"{name}{BIAS_SUMS}" in present:
            unit, step = f"{name}.unit", f"{name}.bias_step"
            scale = numpy_helper.from_array(layer.input_quantizer.scale.numpy())
            made.append(helper.make_node("Constant", [], [unit], value=scale))
            made.append(helper.make_node("Mul", [unit, line], [step]))
            made.append(helper.make_node("Mul", [f"{name}{BIAS_SUMS}", step], [f"{name}.bias"]))
    return made
