"""From an ONNX graph to a `Program`: quantized arithmetic becomes integer operators, the rest runs in onnxruntime."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from bitwright.errors import BitwrightError
from bitwright.runtime.constants import Graph
from bitwright.runtime.ops import (
    Add,
    AddFloat,
    Codes,
    Conv,
    Dequantize,
    MaxPool,
    Mean,
    Op,
    Quantize,
    Table,
    View,
    Window,
)
from bitwright.runtime.patterns import (
    grid_of,
    quantizer_of,
    requantization,
    tail_of,
    weight_of,
    window_of,
)
from bitwright.runtime.program import Host, Program, Step

TYPES = {"tensor(float)": 1, "tensor(int64)": 7, "tensor(int32)": 6, "tensor(bool)": 9, "tensor(uint8)": 2}


@dataclass(frozen=True)
class Value:
    """Where a tensor of the file lies. name: in the program. codes: None for floats and all else.

    image: (N, C, H, W) of the file is kept as (N, H, W, C). kind: ONNX element type.
    """

    name: str
    codes: Codes | None = None
    image: bool = False
    kind: int = 1


@dataclass
class Planner:
    """The program so far.

    values: tensors of the file that the program has. pending: nodes for onnxruntime, not yet in the program.
    done: nodes that another one took with it.
    """

    graph: Graph
    winograd: bool = True
    steps: list[Step] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    pending: list[NodeProto] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def plan(self) -> Program:
        """The whole network."""
        graph = self.graph
        self.values[graph.input] = Value(graph.input)
        for node in graph.nodes:
            if node.output[0] in graph.constant or node.output[0] in self.done:
                continue
            waits = {n for p in self.pending for n in p.output} & set(node.input)
            if waits and quantizer_of(graph, node) is not None:
                self.flush()
            handler = HANDLERS.get(node.op_type)
            if handler is None or not handler(self, node):
                self.pending.append(node)
        self.flush()
        if graph.output not in self.values:
            raise BitwrightError(f"{graph.path}: its output {graph.output!r} is computed by no node")
        output = self.plain(self.values[graph.output])
        images = frozenset(v.name for v in self.values.values() if v.image)
        return Program(tuple(self.steps), graph.input, output.name, images)

    def emit(self, op: Op | Host, inputs: list[Value], name: str, value: Value, layer: str = "") -> Value:
        """Append a step that makes `value`, known in the file as `name`."""
        self.steps.append(Step(op, tuple(v.name for v in inputs), (value.name,), layer or name))
        if name:
            self.values[name] = value
        return value

    def take(self, nodes: list[NodeProto]) -> None:
        """Note nodes that are part of a step."""
        self.done |= {out for node in nodes for out in node.output}

    def rank(self, name: str) -> int | None:
        """Number of axes of a tensor of the file, where known."""
        shape = self.graph.shapes.get(name)
        return None if shape is None else len(shape)

    def derived(self, x: Value, what: str, op: Op | Host, **changes) -> Value:
        """Another form of a value, made once."""
        name = f"{x.name}#{what}"
        made = Value(name, **{"codes": x.codes, "image": x.image, "kind": x.kind, **changes})
        if not any(name in step.outputs for step in self.steps):
            self.emit(op, [x], "", made, name)
        return made

    def plain(self, x: Value) -> Value:
        """As the file has it: floats, channels second."""
        if x.codes is not None:
            x = self.derived(x, "float", Dequantize(x.codes), codes=None)
        return self.derived(x, "planar", Host(to_planar, "transpose"), image=False) if x.image else x

    def as_image(self, x: Value, name: str) -> Value | None:
        """Channels last; None where the tensor is no image."""
        if x.image:
            return x
        return self.derived(x, "image", Host(to_image, "transpose"), image=True) if self.rank(name) == 4 else None

    def codes_of(self, name: str) -> Value | None:
        """The codes that a dequantized tensor comes from."""
        value = self.values.get(name)
        return value if value is not None and value.codes is not None else None

    def flush(self) -> None:
        """Hand the pending nodes to onnxruntime as one step."""
        if not self.pending:
            return
        nodes, self.pending = self.pending, []
        own = {out for node in nodes for out in node.output}
        read = {name for node in nodes for name in node.input if name}
        fed = [n for n in dict.fromkeys(n for node in nodes for n in node.input) if n in self.values and n not in own]
        constants = self.graph.behind([n for n in read if n in self.graph.constant], set())
        outside = {n for node in self.graph.nodes if node.output[0] not in own for n in node.input} | {
            self.graph.output
        }
        outputs = [out for node in nodes for out in node.output if out in outside]
        inputs = [self.plain(self.values[name]) for name in fed]
        infos = [helper.make_tensor_value_info(n, v.kind, None) for n, v in zip(fed, inputs, strict=True)]
        kinds = sorted({node.op_type for node in nodes})
        what = f"{nodes[0].name or nodes[0].output[0]} ({', '.join(kinds)})"
        session = self.graph.session(infos, outputs, what, [*constants, *nodes])
        for found in session.get_outputs():
            self.values[found.name] = Value(found.name, kind=TYPES.get(found.type, 1))

        def run(*arrays: NDArray) -> list[NDArray]:
            return [np.asarray(a) for a in session.run(outputs, dict(zip(fed, arrays, strict=True)))]

        names = tuple(v.name for v in inputs)
        self.steps.append(Step(Host(run, "onnxruntime: " + ", ".join(kinds)), names, tuple(outputs), what))

    def finish(self, node: NodeProto, op: Callable[[Codes | None, bool], Op], inputs: list[Value]) -> bool:
        """Emit `op` for a node together with what follows it: quantizer, bounds, pools, or a Relu."""
        image = inputs[0].image
        tail = tail_of(self.graph, node.output[0], image)
        layer = node.name or node.output[0]
        self.take(tail.nodes)
        made = op(tail.codes, tail.relu and tail.codes is None)
        pools = tail.pools
        last = Value(tail.value, tail.codes, image)
        value = last if not pools else Value(f"{tail.value}#0", tail.codes, image)
        self.emit(made, inputs, tail.value, value, layer)
        for i, window in enumerate(pools):
            to = last if i == len(pools) - 1 else Value(f"{tail.value}#{i + 1}", tail.codes, image)
            value = self.emit(MaxPool(window), [value], tail.value, to, f"{layer} pool")
        return True


def to_planar(x: NDArray) -> list[NDArray]:
    """(N, H, W, C) to (N, C, H, W)."""
    return [np.ascontiguousarray(np.moveaxis(x, 3, 1))]


def to_image(x: NDArray) -> list[NDArray]:
    """(N, C, H, W) to (N, H, W, C)."""
    return [np.ascontiguousarray(np.moveaxis(x, 1, 3))]


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
    """DequantizeLinear: nothing to do, the value stays codes."""
    x = plan.values.get(node.input[0])
    grid = grid_of(plan.graph, node)
    if x is None or x.codes is None or grid is None:
        return False
    if (grid.scale, grid.zero) != (x.codes.scale, x.codes.zero):
        return False
    plan.values[node.output[0]] = x
    return True


def conv(plan: Planner, node: NodeProto) -> bool:
    """A convolution over images of codes; what follows it up to a quantizer belongs to it."""
    graph = plan.graph
    x, weight = plan.codes_of(node.input[0]), weight_of(graph, node.input[1])
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
    return weighted(plan, node, Linear(weight.numbers, bias, step, x, window, groups, late))


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
    floats = [plan.derived(v, "float", Dequantize(v.codes), codes=None) if v.codes is not None else v for v in (a, b)]
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


HANDLERS: dict[str, Callable[[Planner, NodeProto], bool]] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "Conv": conv,
    "MatMul": matmul,
    "Add": add,
    "MaxPool": max_pool,
    "GlobalAveragePool": average,
    "ReduceMean": average,
    "Flatten": reshape,
    "Reshape": reshape,
}
