"""From an ONNX graph to a `Program`: quantized arithmetic becomes integer operators, the rest runs in onnxruntime."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from bitwright.errors import BitwrightError
from bitwright.runtime.constants import Graph
from bitwright.runtime.ops import (
    Codes,
    Dequantize,
    MaxPool,
    Op,
)
from bitwright.runtime.patterns import (
    grid_of,
    quantizer_of,
    tail_of,
)
from bitwright.runtime.program import Host, Program, Step

TYPES = {
    **{"tensor(float)": TensorProto.FLOAT, "tensor(double)": TensorProto.DOUBLE, "tensor(bool)": TensorProto.BOOL},
    **{"tensor(uint8)": TensorProto.UINT8, "tensor(int8)": TensorProto.INT8},
    **{"tensor(int32)": TensorProto.INT32, "tensor(int64)": TensorProto.INT64},
}


Handlers = dict[str, Callable[["Planner", NodeProto], bool]]


@dataclass(frozen=True)
class Value:
    """Where a tensor of the file lies. name: in the program. codes: None for floats and all else.

    image: (N, C, H, W) of the file is kept as (N, H, W, C). kind: ONNX element type in the file; float32 also for
    codes that a DequantizeLinear has read there.
    """

    name: str
    codes: Codes | None = None
    image: bool = False
    kind: int = TensorProto.FLOAT


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

    def plan(self, handlers: Handlers) -> Program:
        """The whole network; what no handler takes goes to onnxruntime."""
        graph = self.graph
        self.values[graph.input] = Value(graph.input)
        for node in graph.nodes:
            if node.output[0] in graph.constant or node.output[0] in self.done:
                continue
            waits = {n for p in self.pending for n in p.output} & set(node.input)
            dequantizer = node.op_type == "DequantizeLinear" and grid_of(graph, node) is not None
            if waits and (dequantizer or quantizer_of(graph, node) is not None):
                self.flush()
            handler = handlers.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if handler is None or not handler(self, node):
                self.pending.append(node)
        self.flush()
        if graph.output not in self.values:
            raise BitwrightError(f"{graph.path}: its output {graph.output!r} is computed by no node")
        output = self.as_in_file(graph.output)
        images = frozenset(v.name for v in self.values.values() if v.image)
        kept = {n: v.codes for n, v in self.values.items() if n == v.name and v.kind == TensorProto.FLOAT and v.codes}
        return Program(tuple(self.steps), graph.input, output.name, images, kept)

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

    def planar(self, x: Value) -> Value:
        """Channels where the file has them; codes stay codes."""
        return self.derived(x, "planar", Host(to_planar, "transpose"), image=False) if x.image else x

    def as_in_file(self, name: str) -> Value:
        """What the file calls `name`, channels second: floats, or codes where no DequantizeLinear has read them yet."""
        x = self.values[name]
        return self.planar(x if x.kind == TensorProto.UINT8 else self.floats(x))

    def floats(self, x: Value) -> Value:
        """Codes dequantized; the same codes can be those of two grids."""
        if x.codes is None:
            return x
        return self.derived(x, f"float*{x.codes.scale}", Dequantize(x.codes), codes=None)

    def as_image(self, x: Value, name: str) -> Value | None:
        """Channels last; None where the tensor is no image."""
        if x.image:
            return x
        return self.derived(x, "image", Host(to_image, "transpose"), image=True) if self.rank(name) == 4 else None

    def codes_of(self, name: str) -> Value | None:
        """The codes that a dequantized tensor comes from."""
        value = self.values.get(name)
        return value if value is not None and value.codes is not None and value.kind == TensorProto.FLOAT else None

    def flush(self) -> None:
        """Hand the pending nodes to onnxruntime as one step."""
        if not self.pending:
            return
        nodes, self.pending = self.pending, []
        own = {out for node in nodes for out in node.output}
        fed = [n for n in dict.fromkeys(n for node in nodes for n in node.input) if n in self.values and n not in own]
        outside = {n for node in self.graph.nodes if node.output[0] not in own for n in node.input} | {
            self.graph.output
        }
        outputs = [out for node in nodes for out in node.output if out in outside]
        inputs = [self.as_in_file(name) for name in fed]
        infos = [helper.make_tensor_value_info(n, v.kind, None) for n, v in zip(fed, inputs, strict=True)]
        kinds = sorted({node.op_type for node in nodes})
        what = f"{nodes[0].name or nodes[0].output[0]} ({', '.join(kinds)})"
        session = self.graph.session(infos, outputs, what, nodes)
        for found in session.get_outputs():
            if found.type not in TYPES:
                raise BitwrightError(
                    f"{self.graph.path}: {what}: gives a {found.type}; {', '.join(TYPES)} are accepted"
                )
            self.values[found.name] = Value(found.name, kind=TYPES[found.type])

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
        kind = TensorProto.FLOAT if tail.codes is None else TensorProto.UINT8
        last = Value(tail.value, tail.codes, image, kind)
        value = last if not pools else replace(last, name=f"{tail.value}#0")
        self.emit(made, inputs, tail.value, value, layer)
        for i, window in enumerate(pools):
            to = last if i == len(pools) - 1 else replace(last, name=f"{tail.value}#{i + 1}")
            value = self.emit(MaxPool(window), [value], tail.value, to, f"{layer} pool")
        return True


def to_planar(x: NDArray) -> list[NDArray]:
    """(N, H, W, C) to (N, C, H, W)."""
    return [np.ascontiguousarray(np.moveaxis(x, 3, 1))]


def to_image(x: NDArray) -> list[NDArray]:
    """(N, C, H, W) to (N, H, W, C)."""
    return [np.ascontiguousarray(np.moveaxis(x, 1, 3))]
