"""From placeholder nodes to standard ONNX: QuantizeLinear, Clip, DequantizeLinear, Conv, MatMul, Gather.

Names are those of the training form: the node of a layer is called as the layer, `<layer>.codes` and `<layer>.weight`
are its weight as integers and dequantized, `<layer>.input.codes` its input's codes; `verify` asks for them by name. The
tensors in between have short names.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import nn

from bitwright.deploy.builder import GraphBuilder, clippings, read_once, shuffles
from bitwright.deploy.integer import DOMAIN, KEEP, InputCodes, IntConv, IntEmbedding, IntLayer, IntLinear
from bitwright.deploy.packing import (
    BIAS,
    OPSET,
    bias_function,
    field_widths,
    function_name,
    pack_fields,
    pack_int4,
    unpack_function,
    varints,
)
from bitwright.deploy.phase_nodes import laid_out
from bitwright.deploy.phases import PhaseConv
from bitwright.errors import BitwrightError
from bitwright.layers.fold import Weight

# Ends of the names that `verify` and readers of a file ask for.
ASKED_FOR = (
    ".codes",
    ".taps",
    ".weight",
    ".split_weight",
    ".bias",
    ".negative_bias",
    ".table_scale",
    ".scales",
    ".bias_sums",
)


@dataclass(frozen=True)
class LayerFile:
    """How one layer's weight lies in the file. packing: "int8", "int4", "fields 2+1", …, or "float32"."""

    name: str
    bits: int
    packing: str
    weights: int
    size_bytes: int


@dataclass
class Lowering(GraphBuilder):
    """Replaces the placeholders of one network."""

    layers: dict[str, IntLayer] = field(default_factory=dict)
    quantizers: dict[str, InputCodes] = field(default_factory=dict)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    files: dict[str, LayerFile] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    floating: set[str] = field(default_factory=set)

    def look_at(self, frozen: nn.Module) -> None:
        """Note the layers of the network whose placeholders are replaced."""
        self.layers = {m.name: m for m in frozen.modules() if isinstance(m, IntLayer)}
        self.quantizers = {m.name: m for m in frozen.modules() if isinstance(m, InputCodes)}

    def look_at_graph(self, graph: onnx.GraphProto) -> None:
        """Note what surrounds the placeholders."""

    def unpacked(self, layer: IntLayer, transpose: bool) -> str:
        """The integer weight (FLOAT where it does not fit INT8), stored at its own width; made once per layer."""
        name = layer.name
        if name in self.files:
            return f"{name}.codes"
        if isinstance(layer, PhaseConv) and isinstance(layer.taps, Weight):
            return laid_out(self, layer, self.stored(name, layer.taps, f"{name}.taps", False), f"{name}.codes")
        assert layer.packed is not None
        return self.stored(name, layer.packed, f"{name}.codes", transpose)

    def stored(self, name: str, weight: Weight, out: str, transpose: bool) -> str:
        """The integers of `weight` as the tensor `out`."""
        numbers = weight.numbers.numpy()
        stored = weight.stored.numpy()
        if transpose:
            numbers, stored = numbers.T, stored.T
        if weight.bits == 8 and numbers.dtype == np.int8:
            self.constant(out, numbers)
            packing, size = "int8", numbers.size
        elif weight.bits == 4 and weight.step == 1 and numbers.min() >= -8 and numbers.max() <= 7:
            packed = f"{name}.weight_int4"
            raw = pack_int4(numbers)
            self.initializers[packed] = helper.make_tensor(packed, TensorProto.INT4, numbers.shape, raw, raw=True)
            self.node("Cast", [packed], out, to=TensorProto.INT8)
            packing, size = "int4", len(raw)
        else:
            target = TensorProto.INT8 if numbers.dtype == np.int8 else TensorProto.FLOAT  # odd 9-bit numbers
            fields = pack_fields(stored, weight.bits)
            widths = field_widths(weight.bits)
            names = [self.constant(f"{name}.weight_u{w}", f) for w, f in zip(widths, fields, strict=True)]
            shape = f"shape_{'x'.join(map(str, numbers.shape))}"
            self.initializers[shape] = varints(shape, numbers.shape)
            line = (weight.multiple * weight.step, weight.multiple * weight.offset)
            numbers_of = [self.scalar(number, np.int32) for number in line]
            kind = function_name(weight.bits, target)
            self.functions.setdefault(kind, unpack_function(weight.bits, target))
            self.node(kind, [*names, shape, *numbers_of], out, domain=DOMAIN)
            packing, size = "fields " + "+".join(map(str, widths)), sum(f.nbytes for f in fields)
        self.files[name] = LayerFile(name, weight.bits, packing, numbers.size, size)
        return out

    def weight(self, layer: IntLayer, transpose: bool = False) -> str:
        """The dequantized weight of a layer; `transpose`: (out, in) as (in, out) for MatMul."""
        name, out = layer.name, f"{layer.name}.weight"
        if name in self.files:
            return out
        if layer.packed is None:
            values = layer.values.numpy()
            self.files[name] = LayerFile(name, 32, "float32", values.size, values.nbytes)
            return self.constant(out, values.T if transpose else values)
        codes = self.unpacked(layer, transpose)
        values = layer.packed.scale.numpy()
        axis = 1 if transpose else 0
        ndim = layer.packed.numbers.ndim
        if layer.integer and name not in self.floating:
            per_axis = {"axis": axis} if values.size > 1 else {}
            return self.node("DequantizeLinear", [codes, self.weight_scale(layer)], out, **per_axis)
        # Beside a float input the weight becomes a plain constant at load. A DequantizeLinear would invite onnxruntime
        # to quantize the input itself (MatMulNBits does), and in front of a float kernel it runs anew in every run.
        if layer.packed.numbers.dtype == torch.int8 or layer.integer:
            codes = self.node("Cast", [codes], f"{name}.weight_numbers", to=TensorProto.FLOAT)
        if not layer.integer:
            scale = self.column(f"{name}.weight_scale", values, 0 if transpose else ndim - 1)
        else:  # the bias reads it too, as a line
            scale = self.weight_scale(layer)
            if values.size > 1:
                shape = self.constant(f"shape_{ndim - 1}", np.array([-1, *[1] * (ndim - 1)], np.int64))
                scale = self.node("Reshape", [scale, shape], f"{name}.weight_column")
        return self.node("Mul", [codes, scale], out)

    def weight_scale(self, layer: IntLayer) -> str:
        """The scales of a weight beside an integer input, (channels,) or ()."""
        assert layer.packed is not None
        name, values = f"{layer.name}.weight_scale", layer.packed.scale.numpy()
        return self.vector(name, values) if values.size > 1 else self.constant(name, values.reshape(()))

    def vector(self, name: str, values: np.ndarray) -> str:
        """A float32 constant (n,), made once per name; a target may hold it in fewer bits."""
        return self.constant(name, values)

    def parameter(self, tensor: TensorProto) -> None:
        """A constant of what stays float."""
        self.initializers[tensor.name] = tensor

    def integers(self, name: str, numbers: np.ndarray) -> str:
        """An integer constant (n,) for the function `BIAS`; two bytes each where that is enough."""
        fits = np.abs(numbers).max() < 2**15
        return self.constant(name, numbers.astype(np.int16 if fits else np.int32))

    def conv(self, layer: IntConv, at: str, x: str, y: str, pads: list[int], sizes: list[int]) -> None:
        """A convolution over axes of `sizes`."""
        codes, mode = layer.input_quantizer, layer.padding_mode
        apart = pads if any(pads) and mode != "zeros" else None
        if codes is not None:
            x = self.quantized(codes, x, integer=layer.integer, pads=apart, mode=mode)
        elif apart is not None:
            x = self.padded(x, pads, mode, at)
        self.finish(layer, at, [x, self.weight(layer)], y, self.window(layer, pads if apart is None else []))

    def window(self, layer: IntConv, pads: list[int]) -> dict[str, Any]:
        """The attributes of a convolution that is padded by `pads`."""
        kept: dict[str, Any] = {"group": layer.groups} if layer.groups > 1 else {}
        kept |= {k: v for k, v in (("strides", layer.stride), ("dilations", layer.dilation)) if set(v) != {1}}
        return kept | {"pads": pads} if any(pads) else kept

    def finish(self, layer: IntConv, at: str, inputs: list[str], y: str, kept: dict[str, Any]) -> None:
        """The node, and its bias: an int32 tensor where integer kernels can add it."""
        if layer.bias_codes is not None:
            inputs.append(self.integer_bias(layer))
        elif layer.bias is not None and not layer.late_bias:
            inputs.append(self.vector(f"{layer.name}.bias", layer.bias.numpy()))
        late = layer.bias is not None and len(inputs) == 2
        self.nodes.append(helper.make_node("Conv", inputs, [f"{at}.sum" if late else y], name=at, **kept))
        if late:
            # Given to Conv, a runtime would round it to a grid too coarse or too fine for it.
            bias = self.column(f"{layer.name}.bias", layer.bias.numpy(), len(layer.kernel_size))  # pyright: ignore
            self.nodes.append(helper.make_node("Add", [f"{at}.sum", bias], [y]))

    def column(self, name: str, values: np.ndarray, axes: int) -> str:
        """As `vector`, (n,) or (1,), viewed in front of `axes` more axes."""
        return self.constant(name, values.reshape(-1, *[1] * axes))

    def integer_bias(self, layer: IntLayer) -> str:
        """A bias on the grid of the layer's sums, dequantized; made once per layer."""
        out = f"{layer.name}.bias"
        if out in self.made:
            return out
        self.made.add(out)
        assert layer.input_quantizer is not None
        assert layer.packed is not None
        assert layer.bias_codes is not None
        codes = self.integers(f"{out}_codes", layer.bias_codes.numpy())
        scales = [self.input_scale(layer.input_quantizer), self.weight_scale(layer)]
        self.functions.setdefault(BIAS, bias_function())
        return self.node(BIAS, [codes, *scales], out, domain=DOMAIN)

    def linear(self, layer: IntLinear, at: str, x: str, y: str) -> None:
        """A product without a quantized output, which runtimes compute on integers, and a float bias."""
        if layer.input_quantizer is not None:
            x = self.quantized(layer.input_quantizer, x, integer=layer.integer)
        weight = self.weight(layer, transpose=True)
        last = f"{at}.sum" if layer.bias is not None or layer.reproducible else y
        self.nodes.append(helper.make_node("MatMul", [x, weight], [last], name=at))
        if layer.bias is not None:
            bias = self.vector(f"{layer.name}.negative_bias", -layer.bias.numpy())
            self.nodes.append(helper.make_node("Sub", [last, bias], [y]))
        elif layer.reproducible:
            self.kept(last, y)

    def kept(self, x: str, y: str) -> None:
        """`y` = `x`, rounded to float32: a product is not merged with a quantizer behind it, which would round once."""
        self.nodes.append(helper.make_node("Sum", [x], [y]))

    def embedding(self, layer: IntEmbedding, at: str, x: str, y: str) -> None:
        """Rows of codes are gathered before they are scaled: the table stays packed integers in memory."""
        if layer.packed is None:
            self.nodes.append(helper.make_node("Gather", [self.weight(layer), x], [y], name=at))
            return
        codes = self.unpacked(layer, False)
        values = layer.packed.scale.numpy()
        scale = self.constant(f"{layer.name}.table_scale", values[:, None] if values.size > 1 else values)
        rows = self.node("Gather", [codes, x], f"{at}.rows")
        rows = self.node("Cast", [rows], f"{at}.numbers", to=TensorProto.FLOAT)
        if values.size > 1:
            scale = self.node("Gather", [scale, x], f"{at}.scales")
        self.nodes.append(helper.make_node("Mul", [rows, scale], [y], name=at))

    def replace(self, node: NodeProto) -> None:
        """Append what a placeholder stands for."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name = attributes.get("name", b"").decode()
        x, y = node.input[0], node.output[0]
        if node.op_type == "Quantize":
            self.quantized(self.quantizers[name], x)
            self.nodes[-1].output[0] = y
            return
        if node.op_type == KEEP:
            self.kept(x, y)
            return
        layer = self.layers[name]
        at = self.call(name)
        if isinstance(layer, IntConv):
            self.conv(layer, at, x, y, list(attributes["pads"]), list(attributes["sizes"]))
        elif isinstance(layer, IntLinear):
            self.linear(layer, at, x, y)
        elif isinstance(layer, IntEmbedding):
            self.embedding(layer, at, x, y)
        else:
            raise BitwrightError(f"{name}: a {type(layer).__name__} cannot be written to ONNX")


def lower(
    model: onnx.ModelProto, frozen: nn.Module, kind: type[Lowering] = Lowering
) -> tuple[onnx.ModelProto, list[LayerFile]]:
    """A new model with every placeholder replaced, free of metadata, and how each layer's weight is stored.

    Args:
        model: exported with placeholders; opset 21 or later.
        frozen: the frozen form that was exported.
        kind: what placeholders become; a target with operators of its own overrides some of `Lowering`.
    """
    graph = model.graph
    work = kind(clippings=clippings(graph), shuffles=shuffles(graph), read_once=read_once(graph))
    work.look_at(frozen)
    work.look_at_graph(model.graph)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used:
            work.parameter(strip(tensor))
    for node in model.graph.node:
        if node.domain == DOMAIN:
            work.replace(node)
        else:
            clean = NodeProto()
            clean.CopyFrom(node)
            for unwanted in ("metadata_props", "doc_string", "name"):
                clean.ClearField(unwanted)
            work.nodes.append(clean)
    nodes = [n for n in work.nodes if n.output[0] not in work.absorbed]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in work.initializers.values() if tensor.name in read]
    shorten(nodes, kept)
    graph = helper.make_graph(
        nodes,
        "network",
        [bare(v) for v in model.graph.input],
        [bare(v) for v in model.graph.output],
        initializer=kept,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    opsets += [helper.make_opsetid(DOMAIN, 1)] if work.functions else []
    out = helper.make_model(
        graph,
        functions=called(nodes, work.functions),
        opset_imports=opsets,
        ir_version=model.ir_version,
        producer_name=DOMAIN,
    )
    return out, list(work.files.values())


def called(nodes: list[NodeProto], functions: dict[str, onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """Those of `functions` that nodes call, or functions that they call."""
    found: set[str] = set()
    pending = [node.op_type for node in nodes if node.domain == DOMAIN]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [node.op_type for node in functions[name].node if node.domain == DOMAIN]
    return [function for name, function in functions.items() if name in found]


def shorten(nodes: list[NodeProto], initializers: list[TensorProto]) -> None:
    """Short names, in place, for the tensors that nobody asks for by name: in a small network at 1 bit they add up."""
    short: dict[str, str] = {}

    def name(tensor: str) -> str:
        if "." not in tensor or tensor.endswith(ASKED_FOR):
            return tensor
        return short.setdefault(tensor, f"_{len(short):x}")

    for node in nodes:
        node.input[:] = [name(tensor) for tensor in node.input]
        node.output[:] = [name(tensor) for tensor in node.output]
    for tensor in initializers:
        tensor.name = name(tensor.name)


def strip(tensor: TensorProto) -> TensorProto:
    """A copy without metadata."""
    clean = TensorProto()
    clean.CopyFrom(tensor)
    clean.ClearField("metadata_props")
    clean.ClearField("doc_string")
    return clean


def bare(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A copy of an input or output without metadata; free axes are called "batch" and "tokens"."""
    clean = onnx.ValueInfoProto()
    clean.name = value.name
    clean.type.CopyFrom(value.type)
    dims = clean.type.tensor_type.shape.dim
    for dim, called in zip(dims, ("batch", "tokens"), strict=False):
        if dim.dim_param:
            dim.dim_param = called
    return clean
