"""What each kind of node becomes: a handler emits it and says so, or leaves it to onnxruntime."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from bitwright.runtime.constants import Graph
from bitwright.runtime.ops import Add, AddFloat, Codes, Conv, MaxPool, Mean, Quantize, Table, View, Window
from bitwright.runtime.patterns import (
    grid_of,
    quantizer_of,
    requantization,
    tail_of,
    weight_of,
    whole,
    whole_weight,
    window_of,
)
from bitwright.runtime.planner import Handlers, Planner, Value, to_planar
from bitwright.runtime.program import Host, Program


def plan(graph: Graph, winograd: bool = True) -> Program:
    """The program of a file; without `winograd` that kernel is not used."""
    return Planner(graph, winograd).plan(HANDLERS)


def quantize(plan: Planner, node: NodeProto) -> bool:
    """QuantizeLinear with its Clip: of floats, or from one grid to another by a table."""
    found = quantizer_of(plan.graph, node)
    x = plan.values.get(node.input[0])
    if found is None or x is None:
        return False
    codes, name = found
    plan.take([node] if name == node.output[0] else [node, plan.graph.producer[name]])
    if x.codes is not None:
        table = requantization(x.codes, codes)
        reached = table[x.codes.lo : x.codes.hi + 1]
        codes = Codes(codes.scale, codes.zero, int(reached.min()), int(reached.max()))
        plan.emit(Table(table), [x], name, Value(name, codes, x.image))
        return True
    planar = not x.image and plan.rank(node.input[0]) == 4
    plan.emit(Quantize(codes, planar), [x], name, Value(name, codes, x.image or planar))
    return True


def dequantize(plan: Planner, node: NodeProto) -> bool:
    """DequantizeLinear: nothing to do, the value stays codes, if with a scale of its own then of another grid."""
    x = plan.values.get(node.input[0])
    grid = grid_of(plan.graph, node)
    if x is None or x.codes is None or grid is None or grid.zero != x.codes.zero:
        return False
    plan.values[node.output[0]] = replace(x, codes=replace(x.codes, scale=grid.scale))
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

    plan.emit(Host(run, "blocks"), [x], node.output[0], Value(node.output[0], x.codes, image=True))
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
    sums = scaled_behind(plan, node, out) if (step == 1).all() else None
    if sums is not None and (late is None or whole(late, 2**24)):
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
    if x is None or x.codes is None or x.image or weight is None or weight.numbers.dtype != np.int8:
        return False
    scale = weight.scales(1) if weight.numbers.ndim == 2 else None
    if scale is None or (plan.rank(node.input[0]) or 0) < 2:
        return False
    numbers = np.ascontiguousarray(weight.numbers.T)[:, :, None, None]
    step = np.float32(x.codes.scale) * scale
    return weighted(plan, node, Linear(numbers, np.zeros(len(numbers), np.int32), step, x, Window((1, 1))))


def add(plan: Planner, node: NodeProto) -> bool:
    """A sum of two images or of two plain tensors of one shape; of codes where a quantizer follows."""
    a, b = (plan.values.get(name) for name in node.input)
    shapes = [plan.graph.shapes.get(name) for name in node.input]
    if a is None or b is None or None in shapes or shapes[0] != shapes[1] or (a.kind, b.kind) != (1, 1):
        return False
    if plan.rank(node.input[0]) == 4:
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
    to = Value(node.output[0], image.codes, True)
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
    image = plan.as_image(x, node.input[0]) if x is not None else None
    if image is None:
        return False
    out = Value(node.output[0], None, keep)
    made = out if keep else Value(f"{node.output[0]}#mean", None, True)
    plan.emit(Mean(image.codes), [image], node.output[0], made)
    if not keep:
        plan.emit(View((0, -1)), [made], node.output[0], out)
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
    if x is None or not to or x.kind != 1:
        return False
    known = plan.graph.shapes.get(node.input[0])
    if x.image:
        single = known is not None and known[2:] == (1, 1)
        op = View((0, -1, 1, 1)) if single else Host(to_planar, "transpose")
        x = plan.derived(x, "planar", op, image=False)
    plan.emit(View(to), [x], node.output[0], Value(node.output[0], x.codes, False))
    return True


# Where an axis of (N, C, H, W) lies in (N, H, W, C).
MOVED = (0, 3, 1, 2)


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
    plan.emit(op, [x], node.output[0], Value(node.output[0], x.codes, True))
    return True


def pad(plan: Planner, node: NodeProto) -> bool:
    """Pad of an image with constant zeros, which are the zero point in codes."""
    x = plan.values.get(node.input[0])
    attributes = plan.graph.attributes(node)
    numbers = [plan.graph.array(name) if name else np.zeros(1) for name in node.input[1:]]
    if x is None or not x.image or len(numbers) != 1 or attributes.get("mode", b"constant") != b"constant":
        return False
    ends = numbers[0]
    if ends is None or ends.size != 8 or ends.min() < 0 or (x.codes and not x.codes.lo <= x.codes.zero <= x.codes.hi):
        return False
    order = [MOVED.index(axis) for axis in range(4)]
    before, after = (ends[part][order].astype(int) for part in (slice(0, 4), slice(4, 8)))
    zero = x.codes.zero if x.codes is not None else 0

    def run(array: NDArray) -> list[NDArray]:
        out = np.full(array.shape + before + after, zero, array.dtype)
        out[tuple(slice(b, b + n) for b, n in zip(before, array.shape, strict=True))] = array
        return [out]

    op = Host(run, "pad")
    plan.emit(op, [x], node.output[0], Value(node.output[0], x.codes, True))
    return True


HANDLERS: Handlers = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "SpaceToDepth": space_to_depth,
    "Conv": conv,
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
