"""ONNX functions that read the streams of `bitwright.deploy.compact`, from operators that a runtime folds at load."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitwright.deploy.compact import POWERS, WIDEST
from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.packing import OPSET

BITS, POWER, WHOLE, FIXED, FLOATING = "Bits", "Power", "Whole", "Fixed", "Floating"


class Body:
    """Nodes of one function, each with a short name for its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, kind: str, *inputs: str, domain: str | None = None, **attributes) -> str:
        """Append a node; the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def constant(self, values: NDArray) -> str:
        """A constant of the function."""
        return self.add("Constant", value=numpy_helper.from_array(values))

    def parts(self, count: int) -> list[str]:
        """The elements of `about`, (1,) int64 each."""
        names = [f"a{i}" for i in range(count)]
        self.nodes.append(helper.make_node("Split", ["about"], names, num_outputs=count))
        return names

    def codes(self) -> str:
        """The codes of the stream, int64."""
        return self.add(BITS, "packed", "about", domain=DOMAIN)

    def function(self, name: str, inputs: list[str]) -> onnx.FunctionProto:
        """The function of the nodes so far; the last one's output is its own."""
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self.nodes):
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_function(DOMAIN, name, inputs, [self.nodes[-1].output[0]], self.nodes, opsets)


def bits_function() -> onnx.FunctionProto:
    """packed (bytes, 1) uint8, about int64: the codes, (count,) int64."""
    body = Body()
    shifts = body.constant(np.arange(8, dtype=np.uint8)[None])
    bit = body.add("BitShift", "packed", shifts, direction="RIGHT")
    bit = body.add("BitwiseAnd", bit, body.constant(np.array([1], np.uint8)))
    line = body.add("Reshape", bit, body.constant(np.array([-1], np.int64)))
    zero, one, two = (body.constant(np.array([i], np.int64)) for i in range(3))
    shape = body.add("Slice", "about", zero, two)
    cut = body.add("Slice", line, zero, body.add("ReduceProd", shape, keepdims=1))
    rows = body.add("Cast", body.add("Reshape", cut, shape), to=TensorProto.INT64)
    places = body.constant(1 << np.arange(WIDEST))
    places = body.add("Slice", places, zero, body.add("Slice", "about", one, two))
    body.add("ReduceSum", body.add("Mul", rows, places), one, keepdims=0)
    return body.function(BITS, ["packed", "about"])


def power_function() -> onnx.FunctionProto:
    """k int64: 2^-k, exact, float32 of the same shape."""
    body = Body()
    table = body.constant(np.ldexp(np.float32(1), -np.arange(POWERS)))
    body.add("Gather", table, "k")
    return body.function(POWER, ["k"])


def whole_function() -> onnx.FunctionProto:
    """packed, about of `compact.whole`: the integers, (count,) int32."""
    body = Body()
    _, _, shift = body.parts(3)
    body.add("Cast", body.add("Sub", body.codes(), shift), to=TensorProto.INT32)
    return body.function(WHOLE, ["packed", "about"])


def fixed_function() -> onnx.FunctionProto:
    """packed, about of `compact.fixed`: the values, (count,) float32."""
    body = Body()
    _, _, shift, k = body.parts(4)
    number = body.add("Cast", body.add("Sub", body.codes(), shift), to=TensorProto.FLOAT)
    body.add("Mul", number, body.add(POWER, k, domain=DOMAIN))
    return body.function(FIXED, ["packed", "about"])


def floating_function() -> onnx.FunctionProto:
    """packed, about of `compact.floating`: the values, (count,) float32; every product is exact."""
    body = Body()
    code = body.codes()
    _, _, signs, mantissas, first, k = body.parts(6)
    place = body.add("Add", body.add("Div", code, signs), first)
    mantissa = body.add("Add", body.add("Mod", place, mantissas), mantissas)
    power = body.add(POWER, body.add("Sub", k, body.add("Div", place, mantissas)), domain=DOMAIN)
    size = body.add("Mul", body.add("Cast", mantissa, to=TensorProto.FLOAT), power)
    negative = body.add("Cast", body.add("Mod", code, signs), to=TensorProto.BOOL)
    body.add("Where", negative, body.add("Neg", size), size)
    return body.function(FLOATING, ["packed", "about"])


def functions_of(kind: str) -> dict[str, onnx.FunctionProto]:
    """The function `kind` (WHOLE, FIXED or FLOATING) and those that it calls, by name."""
    made = {BITS: bits_function}
    made |= {WHOLE: whole_function} if kind == WHOLE else {POWER: power_function}
    made |= {FIXED: fixed_function} if kind == FIXED else {}
    made |= {FLOATING: floating_function} if kind == FLOATING else {}
    return {name: make() for name, make in made.items()}
