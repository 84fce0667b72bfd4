"""Weights at their own width inside an ONNX file, unpacked by standard operators that a runtime folds at load.

Eight bits are a plain integer tensor and four bits ONNX's INT4. Every other width b is the sum of its powers of two:
3 = 2 + 1 is one tensor of 2-bit fields and one of 1-bit fields (bit planes), fields of the same width packed into
bytes from the lowest bit upwards. An ONNX function per width unpacks them, so a layer costs one node.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bitwright.deploy.integer import DOMAIN

OPSET = 21
BIAS = "Bias"  # the name of the function that makes a bias


def varints(name: str, numbers: Sequence[int]) -> TensorProto:
    """An int64 vector as protobuf's own integers: a byte each where they are small and not negative."""
    return helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)


def field_widths(bits: int) -> list[int]:
    """The powers of two that add up to `bits`, widest first: 7 is [4, 2, 1]."""
    return [w for w in (8, 4, 2, 1) if bits & w]


def pack_fields(stored: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """`stored` (any shape, values below 2^bits) as one byte array (n, 1) per field width, widest first.

    The first width holds the highest bits. Elements are padded with zeros to a multiple of eight, so that every
    array unpacks to the same length.
    """
    flat = stored.reshape(-1)
    flat = np.concatenate([flat, np.zeros(-flat.size % 8, np.uint8)])
    fields, below = [], bits
    for width in field_widths(bits):
        below -= width
        part = (flat >> below) & ((1 << width) - 1)
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        fields.append(np.bitwise_or.reduce(part.reshape(-1, 8 // width) << shifts, axis=1)[:, None].astype(np.uint8))
    return fields


def pack_int4(numbers: NDArray[np.int8]) -> bytes:
    """Integers in [-8, 7] as ONNX's INT4 raw data: two to a byte, the first in the low half."""
    flat = numbers.reshape(-1).astype(np.uint8) & 15
    flat = np.concatenate([flat, np.zeros(flat.size % 2, np.uint8)])
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def function_name(bits: int, target: int) -> str:
    """The name of the function that unpacks `bits` bits into `target` (an ONNX element type)."""
    return f"Unpack{bits}{'Float' if target == TensorProto.FLOAT else ''}"


def unpack_function(bits: int, target: int) -> onnx.FunctionProto:
    """Inputs: one byte array per field width, then shape (int64), step and offset (int32).

    Output: step * stored + offset as `target` (INT8 or FLOAT), in that shape.
    """
    widths = field_widths(bits)
    inputs = [f"field{w}" for w in widths]
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, args: Sequence[str], out: str, **attributes) -> str:
        nodes.append(helper.make_node(kind, list(args), [out], **attributes))
        return out

    def constant(name: str, values: NDArray) -> str:
        return node("Constant", [], name, value=onnx.numpy_helper.from_array(values, name))

    whole = ""
    below = bits
    for width, field in zip(widths, inputs, strict=True):
        below -= width
        part = field
        if width < 8:
            shifts = constant(f"shifts{width}", np.arange(0, 8, width, dtype=np.uint8)[None])
            part = node("BitShift", [field, shifts], f"shifted{width}", direction="RIGHT")
            part = node(
                "BitwiseAnd", [part, constant(f"mask{width}", np.array([(1 << width) - 1], np.uint8))], f"part{width}"
            )
        part = node("Reshape", [part, constant(f"flat{width}", np.array([-1], np.int64))], f"line{width}")
        if below:
            up = constant(f"up{width}", np.array([below], np.uint8))
            part = node("BitShift", [part, up], f"high{width}", direction="LEFT")
        whole = node("BitwiseOr", [whole, part], f"sum{width}") if whole else part
    count = node("ReduceProd", ["shape"], "count", keepdims=1)
    cut = node("Slice", [whole, constant("start", np.array([0], np.int64)), count], "cut")
    number = node("Cast", [cut], "stored", to=TensorProto.INT32)
    number = node("Add", [node("Mul", [number, "step"], "stepped"), "offset"], "number")
    shaped = node("Reshape", [number, "shape"], "shaped")
    node("Cast", [shaped], "weight", to=target)
    return helper.make_function(
        DOMAIN,
        function_name(bits, target),
        [*inputs, "shape", "step", "offset"],
        ["weight"],
        nodes,
        [helper.make_opsetid("", OPSET)],
    )


def bias_function() -> onnx.FunctionProto:
    """Inputs: codes (channels,), int16 or int32, and the scales of input () and weight () or (channels,), float32.

    Output: codes * (input scale * weight scale), float32 (channels,). The product of the scales is rounded once, as
    everywhere, so that it need not be stored.
    """
    nodes = [
        helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.INT32),
        helper.make_node("Mul", ["input_scale", "weight_scale"], ["step"]),
        helper.make_node("DequantizeLinear", ["wide", "step"], ["bias"], axis=0),
    ]
    inputs = ["codes", "input_scale", "weight_scale"]
    return helper.make_function(DOMAIN, BIAS, inputs, ["bias"], nodes, [helper.make_opsetid("", OPSET)])
