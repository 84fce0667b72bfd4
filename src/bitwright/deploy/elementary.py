"""`bitwright.kernels.reproducible` as ONNX functions of standard operators, node for node."""

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from bitwright.deploy.integer import InputCodes
from bitwright.deploy.streams import Body
from bitwright.kernels.reproducible import EXP_UNITS, GELU_COUNT, GELU_STEP, GELU_ZERO, SCORE_GRID, gelu_table

NORM, POOL, SOFTMAX, GELU, GELU_CODES = "Norm", "Pool", "Softmax", "Gelu", "GeluCodes"


def norm_function() -> onnx.FunctionProto:
    """x (..., n), gain and shift (n,), eps float64: the norm over the last axis."""
    body = Body()
    axis = body.constant(np.array([-1], np.int64))
    mean = body.add("ReduceMean", body.add("Cast", "x", to=TensorProto.DOUBLE), axis)
    centered = body.add("Sub", "x", body.add("Cast", mean, to=TensorProto.FLOAT))
    squares = body.add("Cast", body.add("Mul", centered, centered), to=TensorProto.DOUBLE)
    variance = body.add("ReduceMean", squares, axis)
    # In float64, as some builds take float32 roots by an approximation.
    deviation = body.add("Cast", body.add("Sqrt", body.add("Add", variance, "eps")), to=TensorProto.FLOAT)
    body.add("Add", body.add("Mul", body.add("Div", centered, deviation), "gain"), "shift")
    return body.function(NORM, ["x", "gain", "shift", "eps"])


def pool_function() -> onnx.FunctionProto:
    """x (N, C, H, W): the mean over rows and columns, (N, C, 1, 1)."""
    body = Body()
    mean = body.add(
        "ReduceMean", body.add("Cast", "x", to=TensorProto.DOUBLE), body.constant(np.array([2, 3], np.int64))
    )
    body.add("Cast", mean, to=TensorProto.FLOAT)
    return body.function(POOL, ["x"])


def softmax_function() -> onnx.FunctionProto:
    """x (..., n): softmax over the last axis."""
    body = Body()
    axis = body.constant(np.array([-1], np.int64))
    x = body.add("Add", "x", body.constant(np.array(SCORE_GRID, np.float32)))
    below = body.add("Sub", x, body.add("ReduceMax", x, axis))
    units = body.add("Mul", body.add("Exp", below), body.constant(np.array(EXP_UNITS, np.float32)))
    units = body.add("Round", units)
    body.add("Div", units, body.add("ReduceSum", units, axis))
    return body.function(SOFTMAX, ["x"])


def place(body: Body) -> tuple[str, list[str]]:
    """(which of GELU's inputs x is, uint16; step and zero point)."""
    grid = [body.constant(np.array(GELU_STEP, np.float32)), body.constant(np.array(GELU_ZERO, np.uint16))]
    return body.add("QuantizeLinear", "x", *grid), grid


def gelu_function() -> onnx.FunctionProto:
    """x: its GELU, up to a runtime's own rounding; for readers that are no quantizers."""
    body = Body()
    k, grid = place(body)
    body.add("Gelu", body.add("DequantizeLinear", k, *grid))
    return body.function(GELU, ["x"])


def gelu_codes_function() -> onnx.FunctionProto:
    """x, starts uint16, codes uint8 of `gelu_runs`: the codes of GELU(x), uint8, from a table that is made at load."""
    body = Body()
    minus, one = body.constant(np.array([-1], np.int64)), body.constant(np.array([1], np.int64))
    starts = body.add("Cast", "starts", to=TensorProto.INT32)
    none = onnx.helper.make_tensor("none", TensorProto.INT32, [1], [0])
    mark = onnx.helper.make_tensor("mark", TensorProto.INT32, [1], [1])
    empty = body.add("ConstantOfShape", body.constant(np.array([GELU_COUNT], np.int64)), value=none)
    marks = body.add(
        "ScatterElements", empty, starts, body.add("ConstantOfShape", body.add("Shape", starts), value=mark)
    )
    run = body.add("CumSum", marks, body.add("Sub", one, one))
    table = body.add("Gather", "codes", run)
    k, _ = place(body)
    line = body.add("Reshape", body.add("Cast", k, to=TensorProto.INT32), minus)
    body.add("Reshape", body.add("GatherElements", table, line), body.add("Shape", "x"))
    return body.function(GELU_CODES, ["x", "starts", "codes"])


FUNCTIONS = {
    NORM: norm_function,
    POOL: pool_function,
    SOFTMAX: softmax_function,
    GELU: gelu_function,
    GELU_CODES: gelu_codes_function,
}


def gelu_runs(codes: InputCodes, base: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Where the codes of GELU change along its inputs, (n,), and the codes before, between and behind, (n + 1,).

    base: what is added to a code in the file.
    """
    table = (codes.codes(gelu_table(torch.device("cpu"))) + base).numpy().astype(np.uint8)
    # The last place counts as a change, so that there is always one.
    starts = np.flatnonzero(np.append(table[1:-1] != table[:-2], True)) + 1
    return starts.astype(np.uint16), table[np.append(0, starts)]
