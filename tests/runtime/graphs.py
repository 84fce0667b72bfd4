"""ONNX graphs as `export` writes them, built by hand from random numbers."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitwright.deploy.packing import field_widths, function_name, pack_fields, pack_int4, unpack_function


@dataclass
class Net:
    """A graph under construction; every method returns the name of what it makes."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)

    def node(self, kind: str, inputs: list[str], out: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [out], name=attributes.pop("name", ""), **attributes))
        return out

    def constant(self, name: str, values) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def quantized(self, x: str, at: str, scale: float, bits: int, zero: int = 0, signed: bool = False) -> str:
        """QuantizeLinear, Clip of the codes, DequantizeLinear; signed codes lie around 128."""
        zero = 128 if signed else zero
        lo, hi = (128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1)) if signed else (0, 2**bits - 1)
        pair = [self.constant(f"{at}.scale", np.float32(scale)), self.constant(f"{at}.zero", np.uint8(zero))]
        narrow = (lo, hi) != (0, 255)
        k = self.node("QuantizeLinear", [x, *pair], f"{at}.q" if narrow else f"{at}.codes")
        if narrow:
            low = self.constant(f"{at}.lo", np.uint8(lo)) if lo else ""
            k = self.node("Clip", [k, low, self.constant(f"{at}.hi", np.uint8(hi))], f"{at}.codes")
        return self.node("DequantizeLinear", [k, *pair], f"{at}.x")

    def packed(self, name: str, numbers: NDArray[np.int8], bits: int) -> str:
        """Integers at their own width: INT4 with Cast, bit fields with a function, or INT8."""
        out = f"{name}.codes"
        if bits == 8:
            return self.constant(out, numbers)
        if bits == 4:
            tensor = helper.make_tensor(f"{name}.int4", TensorProto.INT4, numbers.shape, pack_int4(numbers), raw=True)
            self.initializers[tensor.name] = tensor
            return self.node("Cast", [tensor.name], out, to=TensorProto.INT8)
        half = 2 ** (bits - 1)
        fields = pack_fields((numbers.astype(int) + half).astype(np.uint8), bits)
        names = [self.constant(f"{name}.u{w}", f) for w, f in zip(field_widths(bits), fields, strict=True)]
        numbers_of = [np.array(numbers.shape, np.int64), np.int32(1), np.int32(-half)]
        names += [
            self.constant(f"{name}.{what}", v) for what, v in zip(("shape", "step", "offset"), numbers_of, strict=True)
        ]
        kind = function_name(bits, TensorProto.INT8)
        self.functions[kind] = unpack_function(bits, TensorProto.INT8)
        return self.node(kind, names, out, domain="bitwright")

    def weight(self, name: str, bits: int, scale: float, *shape: int, axis: int = 0) -> str:
        """A random dequantized weight with a scale per output channel, its spread about `scale`."""
        numbers = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
        scales = (scale * self.rng.uniform(0.5, 1.5, shape[axis]) / 2 ** (bits - 1)).astype(np.float32)
        inputs = [self.packed(name, numbers, bits), self.constant(f"{name}.weight_scale", scales)]
        return self.node("DequantizeLinear", inputs, f"{name}.weight", axis=axis)

    def conv(self, x: str, x_scale: float, name: str, bits: int, *shape: int, bias: bool = True, **attributes) -> str:
        """A convolution of a dequantized input, its bias on the grid of the sums."""
        inputs = [x, self.weight(name, bits, 1.5 / np.sqrt(np.prod(shape[1:])), *shape)]
        if bias:
            scales = numpy_helper.to_array(self.initializers[f"{name}.weight_scale"])
            grid = (np.float64(np.float32(x_scale)) * scales).astype(np.float32)
            pair = [self.constant(f"{name}.bias_codes", self.rng.integers(-40, 40, shape[0]).astype(np.int32))]
            pair.append(self.constant(f"{name}.bias_scale", grid))
            inputs.append(self.node("DequantizeLinear", pair, f"{name}.bias", axis=0))
        return self.node("Conv", inputs, f"{name}.out", name=name, **attributes)

    def linear(self, x: str, name: str, bits: int, inside: int, out: int) -> str:
        """A product and a float bias, as Sub of its negative."""
        y = self.node("MatMul", [x, self.weight(name, bits, 1 / np.sqrt(inside), inside, out, axis=1)], f"{name}.sum")
        bias = self.constant(f"{name}.negative_bias", self.rng.standard_normal(out).astype(np.float32))
        return self.node("Sub", [y, bias], f"{name}.out")

    def model(self, output: str, axes: int, *shape: int | None) -> onnx.ModelProto:
        """The finished file: one float input of `shape` and one output of so many axes."""
        ends = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * axes)]
        graph = helper.make_graph(self.nodes, "network", ends, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bitwright", 1)]
        return helper.make_model(graph, functions=list(self.functions.values()), opset_imports=opsets, ir_version=10)


def residual_net(rng: np.random.Generator, *, shared: bool, bits: int = 4) -> onnx.ModelProto:
    """Stem with pool, a plain block, a strided block with a projection, grouped and depth-wise layers, a linear.

    shared: one quantizer of a sum feeds the next layers; else they have their own behind an 8-bit one.
    """
    net = Net(rng)
    x = net.quantized("input", "stem.input", 0.02, 8, signed=True)
    x = net.conv(x, 0.02, "stem", 8, 32, 3, 7, 7, strides=[2, 2], pads=[3, 3, 3, 3])
    x = net.node("Relu", [x], "stem.relu")
    x = net.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    wide = bits if shared else 8
    step = 4.017 / 2**wide
    x = net.quantized(x, "pool.output", step, wide)

    def inner(x: str, at: str) -> str:
        return x if shared else net.quantized(x, f"{at}.input", 4.029 / 2**bits, bits)

    size = 4.029 / 2**bits if not shared else step

    def block(x: str, at: str, inside: int, out: int, stride: int, second: dict) -> str:
        y = net.conv(inner(x, f"{at}.a"), size, f"{at}.a", bits, out, inside, 3, 3, pads=[1] * 4, strides=[stride] * 2)
        y = net.quantized(y, f"{at}.b.input", 1.013 / 2**bits, bits)
        per_group = out // second.get("group", 1)
        y = net.conv(y, 1.013 / 2**bits, f"{at}.b", bits, out, per_group, 3, 3, pads=[1] * 4, **second)
        y = net.quantized(y, f"{at}.b.output", 0.0217, 8, signed=True)
        if stride > 1 and shared:  # the shortcut without weights
            bounds = [[0, 0], [2**40, 2**40], [2, 3], [stride, stride]]
            cut = [net.constant(f"{at}.cut{i}", np.array(b, np.int64)) for i, b in enumerate(bounds)]
            more = net.constant(f"{at}.more", np.array([0, 3, 0, 0, 0, out - inside - 3, 0, 0], np.int64))
            x = net.node("Pad", [net.node("Slice", [x, *cut], f"{at}.slice"), more], f"{at}.pad")
        elif stride > 1:
            x = net.conv(inner(x, f"{at}.c"), size, f"{at}.c", 8, out, inside, 1, 1, strides=[stride] * 2, bias=False)
            x = net.quantized(x, f"{at}.c.output", 0.0311, 8, signed=True)
        total = net.node("Relu", [net.node("Add", [y, x], f"{at}.sum")], f"{at}.relu")
        return net.quantized(total, f"{at}.output", step, wide)

    x = block(x, "one", 32, 32, 1, {})
    x = block(x, "two", 32, 36, 2, {"group": 3})
    x = block(x, "three", 36, 48, 2, {"group": 48})
    x = net.node("GlobalAveragePool", [x], "mean")
    x = net.node("Flatten", [x], "flat")
    x = net.quantized(x, "head.input", 1.007 / 2**bits, bits)
    return net.model(net.linear(x, "head", bits, 48, 10), 2, None, 3, 45, 39)
