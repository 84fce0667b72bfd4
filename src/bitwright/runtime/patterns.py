"""Pieces of an ONNX graph read as integer arithmetic: quantizers, weights, what a node's output passes through."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from bitwright.runtime import reference
from bitwright.runtime.constants import Graph
from bitwright.runtime.ops import Codes, Dequantize, Window


@dataclass(frozen=True, eq=False)
class Weight:
    """Integers and their scale: value = numbers * scale along `axis` (one scale: for all)."""

    numbers: NDArray
    scale: NDArray[np.float32]
    axis: int

    def scales(self, axis: int) -> NDArray[np.float32] | None:
        """One scale per element of an axis; None where they lie along another."""
        count = self.numbers.shape[axis]
        if self.scale.size == 1:
            return np.full(count, self.scale.reshape(-1)[0], np.float32)
        return self.scale if self.axis % self.numbers.ndim == axis and self.scale.size == count else None


def weight_of(graph: Graph, name: str) -> Weight | None:
    """A constant as the integers that a DequantizeLinear or a Mul scales; None if it is none, or has zero points."""
    node = graph.producer.get(name)
    if node is None or name not in graph.constant:
        return None
    if node.op_type == "Mul":
        found, scale = whole_weight(graph, node.input[0]), graph.array(node.input[1])
        if found is None or scale is None or scale.size not in (1, scale.shape[:1][0] if scale.ndim else 1):
            return None
        return replace(found, scale=scale.reshape(-1).astype(np.float32))
    if node.op_type != "DequantizeLinear":
        return None
    numbers, scale = (graph.array(n) for n in node.input[:2])
    zero = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    attributes = graph.attributes(node)
    if numbers is None or scale is None or zero is None or zero.any() or attributes.get("block_size", 0):
        return None
    return Weight(numbers, scale.astype(np.float32), attributes.get("axis", 1)) if scale.ndim < 2 else None


def whole(values: NDArray[np.float32], below: float) -> bool:
    """Whether floats are integers, smaller than `below` in size."""
    return bool((np.rint(values) == values).all() and (np.abs(values) < below).all())


def whole_weight(graph: Graph, name: str) -> Weight | None:
    """A float constant of integers that int8 holds, which nothing scales yet; None if it is none."""
    values = graph.array(name)
    if values is None or values.dtype != np.float32 or not whole(values, 128.5) or (values == 128).any():
        return None
    return Weight(values.astype(np.int8), np.ones(1, np.float32), 0)


def grid_of(graph: Graph, node: NodeProto) -> Codes | None:
    """The grid of a QuantizeLinear or DequantizeLinear: one scale, codes uint8; None for others."""
    scale = graph.array(node.input[1])
    zero = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if zero.dtype != np.uint8 or graph.attributes(node).get("output_dtype", 0) not in (0, 2):
        return None
    step = float(scale.reshape(-1)[0])
    return Codes(step, int(zero.reshape(-1)[0])) if np.isfinite(step) and step > 0 else None


def limits(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Bounds of a Relu or of a Clip with constant bounds."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    found = [-np.inf, np.inf]
    for i, name in enumerate(node.input[1:3]):
        if name:
            value = graph.array(name)
            if value is None or value.size != 1:
                return None
            found[i] = float(value.reshape(-1)[0])
    return found[0], found[1]


def quantizer_of(graph: Graph, node: NodeProto) -> tuple[Codes, str] | None:
    """A QuantizeLinear with the Clip of its codes, if one follows: (what the codes can be, their name)."""
    codes = grid_of(graph, node) if node.op_type == "QuantizeLinear" else None
    if codes is None:
        return None
    out = node.output[0]
    reader = graph.sole_reader(out)
    bounds = limits(graph, reader) if reader is not None and reader.op_type == "Clip" else None
    if reader is None or bounds is None:
        return codes, out
    lo, hi = int(max(bounds[0], 0)), int(min(bounds[1], 255))
    return (replace(codes, lo=lo, hi=hi), reader.output[0]) if lo <= hi else None


def read_as_image(graph: Graph, codes: str) -> bool:
    """Whether channels lie along axis 1 of a tensor of codes with four axes; a linear layer has them at the end."""
    floats = [node.output[0] for node in graph.readers[codes] if node.op_type == "DequantizeLinear"]
    return not any(reader.op_type == "MatMul" for name in floats for reader in graph.readers[name])


def window_of(graph: Graph, node: NodeProto, kernel: tuple[int, ...]) -> Window | None:
    """The window of a convolution or pool over images; None if it is anything else."""
    attributes = graph.attributes(node)
    if len(kernel) != 2 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or attributes.get("ceil_mode", 0):
        return None
    pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
    strides, dilations = (tuple(attributes.get(k, (1, 1))) for k in ("strides", "dilations"))
    positive = min(*kernel, *strides, *dilations) > 0 and min(pads) >= 0
    return Window(kernel, strides, pads, dilations) if positive else None  # type: ignore[arg-type]


@dataclass
class Tail:
    """What a node's output passes through before anything else reads it.

    nodes: those passed, the quantizer's included. pools: windows of maxima on the way. relu: a Relu is among them.
    codes: what comes out of a quantizer, with every bound on the way; None where there is no quantizer.
    value: name of what comes out.
    """

    value: str
    nodes: list[NodeProto] = field(default_factory=list)
    pools: list[Window] = field(default_factory=list)
    relu: bool = False
    codes: Codes | None = None


def tail_of(graph: Graph, value: str, image: bool) -> Tail:
    """Follow an output to the quantizer behind it, over Relu, Clip and, where it is an image, MaxPool.

    Rounding is monotonic, so bounds and maxima may as well follow it: they become bounds of codes and pools of codes.
    Without a quantizer at the end only a leading Relu is taken.
    """
    tail, bounds = Tail(value), []
    while (node := graph.sole_reader(tail.value)) is not None:
        between = limits(graph, node) if node.input[0] == tail.value else None
        found = quantizer_of(graph, node)
        if between is not None:
            bounds.append(between)
            tail.relu |= node.op_type == "Relu"
        elif image and node.op_type == "MaxPool" and len(node.output) == 1:
            window = window_of(graph, node, tuple(graph.attributes(node)["kernel_shape"]))
            if window is None or not window.meets_image:
                break
            tail.pools.append(window)
        elif found is not None:
            tail.codes, tail.value = clipped(found[0], bounds), found[1]
            tail.nodes += [node] if found[1] == node.output[0] else [node, graph.producer[found[1]]]
            return tail
        else:
            break
        tail.nodes.append(node)
        tail.value = node.output[0]
    first = graph.sole_reader(value)
    if first is not None and first.op_type == "Relu":
        return Tail(first.output[0], [first], relu=True)
    return Tail(value)


def clipped(codes: Codes, bounds: list[tuple[float, float]]) -> Codes:
    """Codes of values that were within `bounds` before they were quantized."""
    for pair in reversed(bounds):  # the last one has the last word
        scaled = np.array(pair, np.float32) / np.float32(codes.scale)
        low, high = (int(k) for k in reference.rounded(scaled, codes))
        codes = replace(codes, lo=low, hi=high)
    return codes


def requantization(a: Codes, b: Codes) -> NDArray[np.uint8]:
    """The table from codes of `a` to those of `b`: dequantize and quantize, in float32."""
    values = reference.run(Dequantize(a), np.arange(256, dtype=np.uint8))
    return reference.rounded(values / np.float32(b.scale), b)
