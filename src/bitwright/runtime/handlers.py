"""What each kind of node becomes: a handler emits it and says so, or leaves it to onnxruntime."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from bitwright.runtime.constants import Graph
from bitwright.runtime.hard import hardswish
from bitwright.runtime.moves import dequantize, pad, reshape, slice_, space_to_depth
from bitwright.runtime.ops import Add, AddFloat, Codes, Conv, MaxPool, Mean, Quantize, Table, View, Window
from bitwright.runtime.patterns import (
    quantizer_of,
    read_as_image,
    requantization,
    tail_of,
    weight_of,
    whole,
    whole_weight,
    window_of,
)
from bitwright.runtime.planner import Handlers, Planner, Value
from bitwright.runtime.program import Program


def plan(graph: Graph, winograd: bool = True) -> Program:
    """The program of a file; without `winograd` that kernel is not used."""
    return Planner(graph, winograd).plan(HANDLERS)


def quantize(plan: Planner, node: NodeProto) -> bool:
    """QuantizeLinear with its Clip: of floats, or from one grid to another by a table."""
    found = quantizer_of(plan.graph, node)
    x = plan.values.get(node.input[0])
    if found is None or x is None or x.kind != TensorProto.FLOAT:
        return False
    codes, name = found
    plan.take([node] if name == node.output[0] else [node, plan.graph.producer[name]])
    if x.codes is not None:
        table = requantization(x.codes, codes)
        reached = table[x.codes.lo : x.codes.hi + 1]
        codes = Codes(codes.scale, codes.zero, int(reached.min()), int(reached.max()))
        plan.emit(Table(table), [x], name, Value(name, codes, x.image, TensorProto.UINT8))
        return True
    planar = not x.image and plan.rank(node.input[0]) == 4 and read_as_image(plan.graph, name)
    plan.emit(Quantize(codes, planar), [x], name, Value(name, codes, x.image or planar, TensorProto.UINT8))
    return True


def conv(plan: Planner, node: NodeProto) -> bool:
    """A convolution over images of codes; what follows it up to a quantizer belongs to it."""
    graph = plan.graph
    x, weight = plan.codes_of(node.input[0]), weight_of(graph, node.input[1])
    if weight is None and x is not None and x.codes is not None and x.codes.scale == 1:
        weight = whole_weight(graph, node.input[1])
    if x is None or x.codes is None or weight is None or weight.numbers.dtype != np.int8 or weight.numbers.ndim != 4:
        return False
    window = window_of(graph, node, weight.numbers.shape[2:])
    scale = weight.scales(0)
    x = plan.as_image(x, node.input[0])
    groups = graph.attributes(node).get("group", 1)
    out = weight.numbers.shape[0]
    if window is None or scale is None or x is None or x.codes is None or groups < 1 or out % groups:
        return False
    step = np.float32(x.codes.scale) * scale
    bias, late = np.zeros(out, np.int32), None
    if len(node.input) > 2 and node.input[2]:
        found = weight_of(graph, node.input[2])
        on_grid = found is not None and np.allclose(found.scale.reshape(-1), step, rtol=1e-6, atol=0)
        if found is not None and on_grid and found.numbers.dtype == np.int32 and found.numbers.shape == (out,):
            bias = found.numbers
        else:
            late = graph.array(node.input[2])
            if late is None or late.shape != (out,):
                return False
    unscaled = bool((step == 1).all()) and (late is None or whole(late, 2**24))
    sums = scaled_behind(plan, node, out) if unscaled else None
    if sums is not None:
        node, step = sums
        bias, late = (bias if late is None else late.astype(np.int32)), None
    return weighted(plan, node, Linear(weight.numbers, bias, step, x, window, groups, late))


def scaled_behind(plan: Planner, node: NodeProto, channels: int) -> tuple[NodeProto, NDArray[np.float32]] | None:
    """Sums of integers that are scaled behind a convolution, by Sum and Mul: (the node with these, the scales)."""
    kept = plan.graph.sole_reader(node.output[0])
    scaling = plan.graph.sole_reader(kept.output[0]) if kept is not None and kept.op_type == "Sum" else None
    if kept is None or scaling is None or scaling.op_type != "Mul" or len(kept.input) > 1:
        return None
    step = plan.graph.array(scaling.input[1])
    if step is None or step.dtype != np.float32 or step.shape not in ((channels, 1, 1), (1, 1, 1)):
        return None
    plan.take([kept, scaling])
    scales = np.broadcast_to(step.reshape(-1), (channels,)).astype(np.float32)
    return NodeProto(name=node.name or node.output[0], output=[scaling.output[0]]), scales


@dataclass(frozen=True, eq=False)
class Linear:
    """What a convolution and a matrix product have in common."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    step: NDArray[np.float32]
    x: Value
    window: Window
    groups: int = 1
    late: NDArray[np.float32] | None = None


def weighted(plan: Planner, node: NodeProto, linear: Linear) -> bool:
    """Emit a convolution or product with a bias added behind it, and what follows."""
    late, value = linear.late, node.output[0]
    if late is None:
        late, value = late_bias(plan, value, linear.weight.shape[0], 3 if linear.x.image else 1)
    codes_in = linear.x.codes
    assert codes_in is not None

    def made(codes: Codes | None, relu: bool) -> Conv:
        multiplier = linear.step if codes is None else linear.step / np.float32(codes.scale)
        layer = node.name or node.output[0]
        kept = {"groups": linear.groups, "late_bias": late, "relu": relu, "winograd": plan.winograd}
        return Conv(layer, linear.weight, linear.bias, multiplier, codes_in, linear.window, codes, **kept)

    if late is None:
        return plan.finish(node, made, [linear.x])
    # A float bias is no integer: it is added to floats, and a quantizer behind it is a step of its own.
    reader = plan.graph.sole_reader(value)
    relu = reader is not None and reader.op_type == "Relu"
    if relu and reader is not None:
        plan.take([reader])
        value = reader.output[0]
    plan.emit(made(None, relu), [linear.x], value, Value(value, None, linear.x.image), node.name or node.output[0])
    return True


def late_bias(plan: Planner, value: str, channels: int, axes: int) -> tuple[NDArray[np.float32] | None, str]:
    """(bias, what comes out) of an Add of, or Sub by, a constant per channel that alone reads a value."""
    node = plan.graph.sole_reader(value)
    if node is None or node.op_type not in ("Add", "Sub") or (node.op_type == "Sub" and node.input[0] != value):
        return None, value
    bias = plan.graph.array(node.input[1] if node.input[0] == value else node.input[0])
    shape = (channels, 1, 1) if axes == 3 else (channels,)
    if bias is None or bias.dtype != np.float32 or bias.shape not in (shape, (1, *shape)):
        return None, value
    plan.take([node])
    flat = bias.reshape(-1)
    return (-flat if node.op_type == "Sub" else flat), node.output[0]


def matmul(plan: Planner, node: NodeProto) -> bool:
    """A product of codes, channels last, with an integer weight (in, out)."""
    x, weight = plan.codes_of(node.input[0]), weight_of(plan.graph, node.input[1])
    if x is None or x.codes is None or weight is None or weight.numbers.dtype != np.int8:
        return False
    scale = weight.scales(1) if weight.numbers.ndim == 2 else None
    if scale is None or (plan.rank(node.input[0]) or 0) < 2:
        return False
    numbers = np.ascontiguousarray(weight.numbers.T)[:, :, None, None]
    step, x = np.float32(x.codes.scale) * scale, plan.planar(x)
    return weighted(plan, node, Linear(numbers, np.zeros(len(numbers), np.int32), step, x, Window((1, 1))))


def add(plan: Planner, node: NodeProto) -> bool:
    """A sum of two images or of two plain tensors of one shape; of codes where a quantizer follows."""
    a, b = (plan.values.get(name) for name in node.input)
    shapes = [plan.graph.shapes.get(name) for name in node.input]
    if a is None or b is None or None in shapes or shapes[0] != shapes[1] or {a.kind, b.kind} != {TensorProto.FLOAT}:
        return False
    if a.image or b.image:
        a, b = (plan.as_image(v, n) or v for v, n in ((a, node.input[0]), (b, node.input[1])))
    tail = tail_of(plan.graph, node.output[0], a.image)
    if a.codes is not None and b.codes is not None and tail.codes is not None:
        first, second = a.codes, b.codes
        return plan.finish(node, lambda codes, _: Add(first, second, codes or first), [a, b])
    floats = [plan.floats(v) for v in (a, b)]
    reader = plan.graph.sole_reader(node.output[0])
    relu = reader is not None and reader.op_type == "Relu"
    out = node.output[0]
    if relu and reader is not None:
        plan.take([reader])
        out = reader.output[0]
    plan.emit(AddFloat(relu), floats, out, Value(out, None, a.image), node.name or node.output[0])
    return True


def max_pool(plan: Planner, node: NodeProto) -> bool:
    """A pool of codes or of floats."""
    x = plan.values.get(node.input[0])
    window = window_of(plan.graph, node, tuple(plan.graph.attributes(node)["kernel_shape"]))
    image = plan.as_image(x, node.input[0]) if x is not None else None
    if image is None or window is None or not window.meets_image or len(node.output) > 1:
        return False
    if image.codes is None and image.kind != TensorProto.FLOAT:
        return False
    to = replace(image, name=node.output[0])
    plan.emit(MaxPool(window, image.codes is None), [image], node.output[0], to)
    return True


def average(plan: Planner, node: NodeProto) -> bool:
    """GlobalAveragePool, or ReduceMean over rows and columns."""
    x, keep = plan.values.get(node.input[0]), True
    if node.op_type == "ReduceMean":
        attributes = plan.graph.attributes(node)
        axes = plan.graph.array(node.input[1]) if len(node.input) > 1 else np.array(attributes.get("axes", ()))
        keep = bool(attributes.get("keepdims", 1))
        if axes is None or plan.rank(node.input[0]) != 4 or sorted(int(a) % 4 for a in axes) != [2, 3]:
            return False
    image = plan.as_image(x, node.input[0]) if x is not None and x.kind == TensorProto.FLOAT else None
    if image is None:
        return False
    out = Value(node.output[0], None, keep)
    made = out if keep else Value(f"{node.output[0]}#mean", None, True)
    plan.emit(Mean(image.codes), [image], node.output[0], made)
    if not keep:
        plan.emit(View((0, -1)), [made], node.output[0], out)
    return True


HANDLERS: Handlers = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "SpaceToDepth": space_to_depth,
    "Conv": conv,
    "Clip": hardswish,
    "MatMul": matmul,
    "Add": add,
    "MaxPool": max_pool,
    "GlobalAveragePool": average,
    "ReduceMean": average,
    "Flatten": reshape,
    "Reshape": reshape,
    "Slice": slice_,
    "Pad": pad,
}
