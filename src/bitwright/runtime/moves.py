"""Handlers of nodes that change no number: reshapes, slices, pads, blocks, and DequantizeLinear. Codes stay codes."""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from bitwright.runtime.ops import View
from bitwright.runtime.patterns import grid_of
from bitwright.runtime.planner import Planner, to_planar
from bitwright.runtime.program import Host


def dequantize(plan: Planner, node: NodeProto) -> bool:
    """DequantizeLinear: nothing to do, the value stays codes, if with a scale of its own then of another grid.

    Codes that onnxruntime computed can be any of 256.
    """
    x = plan.values.get(node.input[0])
    grid = grid_of(plan.graph, node)
    if x is None or grid is None:
        return False
    codes = grid if x.codes is None and x.kind == TensorProto.UINT8 else x.codes
    if codes is None or grid.zero != codes.zero:
        return False
    plan.values[node.output[0]] = replace(x, codes=replace(codes, scale=grid.scale), kind=TensorProto.FLOAT)
    return True


def space_to_depth(plan: Planner, node: NodeProto) -> bool:
    """SpaceToDepth of codes; blocks of channels-last images are runs of memory."""
    x = plan.values.get(node.input[0])
    x = None if x is None or x.codes is None else plan.as_image(x, node.input[0])
    if x is None:
        return False
    size = plan.graph.attributes(node)["blocksize"]

    def run(codes: NDArray) -> list[NDArray]:
        n, rows, columns, channels = codes.shape
        blocks = codes.reshape(n, rows // size, size, columns // size, size * channels).swapaxes(2, 3)
        return [np.ascontiguousarray(blocks).reshape(n, rows // size, columns // size, -1)]

    plan.emit(Host(run, "blocks"), [x], node.output[0], replace(x, name=node.output[0]))
    return True


def reshape(plan: Planner, node: NodeProto) -> bool:
    """Flatten or Reshape: codes stay codes; an image of more than one pixel is put in the file's order first."""
    x = plan.values.get(node.input[0])
    attributes = plan.graph.attributes(node)
    if node.op_type == "Flatten":
        to: tuple[int, ...] = (0, -1) if attributes.get("axis", 1) == 1 else ()
    else:
        shape = plan.graph.array(node.input[1])
        to = tuple(int(n) for n in shape) if shape is not None else ()
        if attributes.get("allowzero", 0) and 0 in to:
            return False
    if x is None or not to or (x.codes is None and x.kind != TensorProto.FLOAT):
        return False
    known = plan.graph.shapes.get(node.input[0])
    if x.image:
        single = known is not None and known[2:] == (1, 1)
        op = View((0, -1, 1, 1)) if single else Host(to_planar, "transpose")
        x = plan.derived(x, "planar", op, image=False)
    plan.emit(View(to), [x], node.output[0], replace(x, name=node.output[0]))
    return True


# Where an axis of (N, C, H, W) lies in (N, H, W, C).
MOVED = (0, 3, 1, 2)
# Modes of ONNX's Pad as numpy's.
PAD_MODES: dict[bytes, Literal["constant", "reflect", "edge", "wrap"]] = {
    **{b"constant": "constant", b"reflect": "reflect"},
    **{b"edge": "edge", b"wrap": "wrap"},
}


def slice_(plan: Planner, node: NodeProto) -> bool:
    """Slice of an image with constant bounds; codes stay codes."""
    x = plan.values.get(node.input[0])
    numbers = [plan.graph.array(name) for name in node.input[1:]]
    if x is None or not x.image or len(numbers) < 3 or any(n is None for n in numbers):
        return False
    starts, ends, axes, *steps = ([int(v) for v in n] for n in numbers if n is not None)
    cut = [slice(None)] * 4
    for at, axis in enumerate(axes):
        cut[MOVED[axis % 4]] = slice(starts[at], ends[at], steps[0][at] if steps else 1)
    if any(c.step is not None and c.step < 1 for c in cut):
        return False
    op = Host(lambda array: [np.ascontiguousarray(array[tuple(cut)])], "slice")
    plan.emit(op, [x], node.output[0], replace(x, name=node.output[0]))
    return True


def pad(plan: Planner, node: NodeProto) -> bool:
    """Pad of an image with zeros, which are the zero point in codes, or with its own pixels."""
    x = plan.values.get(node.input[0])
    attributes = plan.graph.attributes(node)
    numbers = [plan.graph.array(name) if name else np.zeros(1) for name in node.input[1:]]
    mode = PAD_MODES.get(attributes.get("mode", b"constant"))
    if x is None or not x.image or len(numbers) != 1 or mode is None:
        return False
    ends = numbers[0]
    if ends is None or ends.size != 8 or ends.min() < 0:
        return False
    filled = x.kind == TensorProto.FLOAT  # codes themselves would be filled with code 0
    if mode == "constant" and x.codes and not (filled and x.codes.lo <= x.codes.zero <= x.codes.hi):
        return False
    order = [MOVED.index(axis) for axis in range(4)]
    before, after = (ends[part][order].astype(int) for part in (slice(0, 4), slice(4, 8)))
    zero, widths = 0 if x.codes is None else x.codes.zero, list(zip(before, after, strict=True))

    def run(array: NDArray) -> list[NDArray]:
        return [np.pad(array, widths, constant_values=zero) if mode == "constant" else np.pad(array, widths, mode)]

    plan.emit(Host(run, "pad"), [x], node.output[0], replace(x, name=node.output[0]))
    return True
