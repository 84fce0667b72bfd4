"""Hardswish and Hardsigmoid gates on integers, where what they read has a scale of 3 / n (`bitwright.grids.hard`).

clip(x + 3, 0, 6) / 6 of x = k * 3 / n is (clip(k, -n, n) + n) / (2 n): the same codes within other bounds, with the
scale 1 / (2 n) and the zero point -n. Nothing is rounded there. What it is multiplied with has codes as well, and a
quantizer reads the product, so that a runtime makes one kernel of the multiplication (QLinearMul) and no float tensor
is left. A gate's input is the average of what it scales: that is computed on codes too (QLinearGlobalAveragePool).
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from bitwright.grids.hard import BEND


@dataclass(frozen=True)
class Source:
    """A dequantized tensor: the name of its codes, their scale and their zero point, one of each."""

    codes: str
    scale: np.float32
    zero: int


@dataclass
class HardGraph:
    """A graph whose hard activations are rewritten.

    producer: node by what it makes. readers: nodes by what they read; an output of the graph has None among them.
    numbers: constants that are one number. made: those that are new, by name. hard: Hardswish's outputs on integers,
    and what gates scale.
    """

    graph: onnx.GraphProto
    producer: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto | None]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    made: dict[str, onnx.TensorProto] = field(default_factory=dict)
    hard: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self.graph.node:
            self.producer |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers[name].append(node)
        for value in self.graph.output:
            self.readers[value.name].append(None)
        self.numbers = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer if not t.dims}

    def source(self, name: str) -> Source | None:
        """What a tensor is dequantized from; None where it is not, or has several scales."""
        node = self.producer.get(name)
        if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
            return None
        scale, zero = (self.numbers.get(n) for n in node.input[1:])
        return None if scale is None or zero is None else Source(node.input[0], np.float32(scale), int(zero))

    def quantized(self, name: str) -> bool:
        """Whether quantizers alone read a tensor."""
        found = self.readers[name]
        return bool(found) and all(n is not None and n.op_type == "QuantizeLinear" for n in found)

    def averaged(self, name: str) -> bool:
        """Whether quantizers alone read an average, maybe as a vector: runtimes move them in front of a reshape."""
        only = self.readers[name][0] if len(self.readers[name]) == 1 else None
        flat = only is not None and only.op_type in ("Reshape", "Flatten") and only.input[0] == name
        return self.quantized(only.output[0] if flat and only is not None else name)

    def parts(self, name: str) -> int:
        """n of a dequantized tensor whose scale is 3 / n and for whose code of -3 there is a byte; else 0."""
        source = self.source(name)
        n = 0 if source is None else round(BEND / float(source.scale))
        fits = source is not None and source.scale == np.float32(BEND) / np.float32(max(n, 1)) and n <= source.zero
        return n if fits else 0

    def number(self, value: float | int, kind: type) -> str:
        """A constant of one number."""
        name = f"{np.dtype(kind).name}_{value}"
        if name not in self.numbers:
            self.made[name] = numpy_helper.from_array(np.array(value, kind), name)
        return name

    def gate(self, x: str, y: str) -> list[NodeProto]:
        """Nodes that make `y`, the hardsigmoid of `x`, of its codes."""
        source, n = self.source(x), self.parts(x)
        assert source is not None
        low, high = source.zero - n, source.zero + n
        bounds = [self.number(low, np.uint8), self.number(high, np.uint8) if high < 255 else ""]
        codes, inputs = f"{y}_gate", [source.codes, *bounds]
        scale = self.number(float(np.float32(1 / (2 * n))), np.float32)
        return [
            helper.make_node("Clip", inputs if bounds[1] else inputs[:2], [codes]),
            helper.make_node("DequantizeLinear", [codes, scale, bounds[0]], [y]),
        ]

    def hardswish(self, node: NodeProto) -> list[NodeProto]:
        """The product of a value and its gate; the node itself where it is not between codes."""
        x, y = node.input[0], node.output[0]
        if not self.parts(x) or not self.quantized(y):
            return [node]
        self.hard.add(y)
        return [*self.gate(x, f"{y}_gated"), helper.make_node("Mul", [x, f"{y}_gated"], [y])]

    def hardsigmoid(self, node: NodeProto) -> list[NodeProto]:
        """A gate; the node itself where it is none, or not between codes."""
        x, y = node.input[0], node.output[0]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        slopes = np.isclose(attributes.get("alpha", 0.2), 1 / 6) and np.isclose(attributes.get("beta", 0.5), 0.5)
        reader = self.readers[y][0] if len(self.readers[y]) == 1 else None
        if not slopes or not self.parts(x) or reader is None or reader.op_type != "Mul":
            return [node]
        other = next((n for n in reader.input if n != y), "")
        if self.source(other) is None or not self.quantized(reader.output[0]):
            return [node]
        self.hard.add(other)
        return self.gate(x, y)

    def average(self, node: NodeProto) -> list[NodeProto]:
        """A mean over the pixels of what a gate scales or Hardswish made, as a pool: runtimes have that on codes."""
        x, attributes = node.input[0], {a.name: helper.get_attribute_value(a) for a in node.attribute}
        axes = next((numpy_helper.to_array(t) for t in self.graph.initializer if t.name in node.input[1:]), np.zeros(0))
        over_pixels = sorted(int(a) % 4 for a in axes) == [2, 3] and attributes.get("keepdims", 1) == 1
        source = self.source(x)
        if not over_pixels or source is None or not self.averaged(node.output[0]):
            return [node]
        before = self.producer.get(source.codes)
        while before is not None and before.op_type in ("Clip", "QuantizeLinear"):
            x = before.input[0] if before.input[0] in self.hard else x
            before = self.producer.get(before.input[0]) if before.op_type == "Clip" else None
        return [helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output))] if x in self.hard else [node]

    def rewritten(self) -> list[NodeProto]:
        """All nodes; gates first, since averages are those of what they scale."""
        changed = {}
        kinds = {"HardSwish": self.hardswish, "HardSigmoid": self.hardsigmoid, "ReduceMean": self.average}
        for kind, rewrite in kinds.items():
            changed |= {n.output[0]: rewrite(n) for n in self.graph.node if n.op_type == kind and not n.domain}
        return [new for node in self.graph.node for new in changed.get(node.output[0], [node])]


def hard_on_integers(model: onnx.ModelProto) -> None:
    """Rewrite the hard activations of a graph of plain nodes, in place."""
    work = HardGraph(model.graph)
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in work.rewritten()]
    read = {name for node in nodes for name in node.input}
    kept = [t for t in (*model.graph.initializer, *work.made.values()) if t.name in read]
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
