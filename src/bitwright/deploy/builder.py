"""An ONNX graph under construction, and how an input is quantized in it."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from bitwright.deploy.integer import InputCodes

# `stem.input_quantizer` is `stem.input` in the file.
PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def container_zero(codes: InputCodes) -> int:
    """What is added to codes in the file, where all are uint8: 128 where they can be negative.

    x86 kernels want unsigned inputs, and onnxruntime rewrites int8 ones on its own, not always correctly.
    """
    return 128 if codes.lo < 0 else 0


@dataclass(frozen=True)
class Clipping:
    """A Relu or Clip of the exported graph whose output is read once: `output` = `source` within [low, high]."""

    source: str
    low: float
    high: float


def read_once(graph: GraphProto) -> set[str]:
    """Names of the tensors that one node alone reads, or that are the output and nothing else."""
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    return {name for name, count in readers.items() if count == 1}


def clippings(graph: GraphProto) -> dict[str, Clipping]:
    """Relus and Clips with constant bounds that one node alone reads, by output."""
    constants = {t.name: t for t in graph.initializer}
    once = read_once(graph)
    found = {}
    for node in graph.node:
        if node.op_type not in ("Relu", "Clip") or node.output[0] not in once:
            continue
        low, high = (0.0, np.inf) if node.op_type == "Relu" else (-np.inf, np.inf)
        bounds = [*node.input[1:], "", ""][:2]
        if any(b and b not in constants for b in bounds):
            continue
        low, high = (
            float(numpy_helper.to_array(constants[b])) if b else d for b, d in zip(bounds, (low, high), strict=True)
        )
        found[node.output[0]] = Clipping(node.input[0], low, high)
    return found


def shuffles(graph: GraphProto) -> dict[str, NodeProto]:
    """Nodes that lay channels out as pixels (DepthToSpace), and cuts of what they make, by output.

    Those whose output one node alone reads.
    """
    once, found = read_once(graph), {}
    for node in graph.node:
        if node.op_type == "DepthToSpace" or (node.op_type == "Slice" and node.input[0] in found):
            found[node.output[0]] = node
    return {name: node for name, node in found.items() if name in once}


@dataclass
class GraphBuilder:
    """Nodes and initializers so far.

    clippings, shuffles: of the exported graph. absorbed: outputs of nodes that became part of a quantizer: clippings as
    bounds of its codes, shuffles behind it. read_once: names of the exported graph, see there.
    """

    clippings: dict[str, Clipping] = field(default_factory=dict)
    shuffles: dict[str, NodeProto] = field(default_factory=dict)
    read_once: set[str] = field(default_factory=set)
    absorbed: set[str] = field(default_factory=set)
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def node(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        """Append a node; returns the name of its output. Only what carries a layer's name has a name: they add up."""
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        """An initializer, made once per name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.array(values, order="C"), name)
        return name

    def scalar(self, value: float, dtype: type) -> str:
        """A shared scalar constant."""
        return self.constant(f"{np.dtype(dtype).name}_{value}", np.array(value, dtype))

    def call(self, name: str) -> str:
        """`name`, or `name:1`, `name:2`, … for a module that the graph calls again."""
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}:{self.calls[name] - 1}"

    def quantized(
        self, codes: InputCodes, x: str, *, integer: bool = True, pads: list[int] | None = None, mode: str = ""
    ) -> str:
        """Quantize `x`, unless it is already; returns the dequantized tensor. With `pads` the codes are padded between.

        With `integer` a runtime may compute on the codes; without, or where the zero points are no codes, nothing in
        the graph says that the tensor was quantized (onnxruntime would then quantize a float weight on its own).
        """
        name = codes.label
        at = self.call(name)
        if codes.shared:
            return x if pads is None else self.padded(x, pads, mode, at)
        base = container_zero(codes)
        x, low, high, behind = self.unclipped(codes, x)
        lo, hi = low + base, high + base
        per_axis = {} if codes.per_tensor else {"axis": codes.axis}
        narrow = (lo, hi) != (0, 255)
        last = f"{at}.codes"
        out = f"{at}.channels" if behind else last
        scale = zero = ""
        if codes.whole:
            scale = self.input_scale(codes)
            zero = self.zero_point(codes, base)
            k = self.node("QuantizeLinear", [x, scale, zero], f"{at}.q" if narrow else out, **per_axis)
        else:
            # A fractional zero point is added in floating point, as in training, and rounded afterwards.
            v = self.node("Div", [x, self.spread(codes, codes.scale, "scale")], f"{at}.steps")
            v = self.node("Add", [v, self.spread(codes, codes.zero, "zero")], f"{at}.shifted")
            unit, none = self.scalar(1.0, np.float32), self.scalar(base, np.uint8)
            k = self.node("QuantizeLinear", [v, unit, none], f"{at}.q" if narrow else out)
        if narrow:
            bounds = [self.scalar(lo, np.uint8) if lo > 0 else "", self.scalar(hi, np.uint8) if hi < 255 else ""]
            k = self.node("Clip", [k, *bounds] if bounds[1] else [k, bounds[0]], out)
        for i, shuffle in enumerate(behind, 1):
            moved = NodeProto()
            moved.CopyFrom(shuffle)
            moved.input[0], moved.output[0] = k, last if i == len(behind) else f"{at}.shuffled{i}"
            self.nodes.append(moved)
            k = moved.output[0]
        if codes.whole and integer:
            if pads is not None:
                k = self.padded(k, pads, mode, at)
            return self.node("DequantizeLinear", [k, scale, zero], f"{at}.x", **per_axis)
        number = self.node("Cast", [k], f"{at}.number", to=TensorProto.FLOAT)
        number = self.node("Sub", [number, self.spread(codes, codes.zero + base, "center")], f"{at}.centered")
        value = self.node("Mul", [number, self.spread(codes, codes.scale, "scale")], f"{at}.x")
        return value if pads is None else self.padded(value, pads, mode, at)

    def input_scale(self, codes: InputCodes) -> str:
        """The scales of a quantizer, () or (channels,)."""
        values = codes.scale.numpy()
        name = f"{codes.label}.scale"
        return self.constant(name, values.reshape(()) if codes.per_tensor else values)

    def zero_point(self, codes: InputCodes, base: int) -> str:
        """The zero points of a quantizer, in its container."""
        zero = codes.zero.numpy().round() + base
        if codes.per_tensor:
            return self.scalar(int(zero[0]), np.uint8)
        values = np.broadcast_to(zero, codes.scale.shape).astype(np.uint8)
        return self.constant(f"{codes.label}.zero_point", values)

    def spread(self, codes: InputCodes, t: Tensor, what: str) -> str:
        """Per-channel numbers of a quantizer shaped to broadcast against its tensor."""
        values = t.numpy()
        if values.size == 1:
            return self.scalar(float(values.reshape(-1)[0]), np.float32)
        values = values.reshape(-1, *[1] * (-codes.axis - 1))
        return self.constant(f"{codes.label}.{what}_spread", values)

    def padded(self, x: str, pads: list[int], mode: str, at: str) -> str:
        """`x` padded at its spatial axes."""
        half = len(pads) // 2
        full = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        return self.node("Pad", [x, self.constant(f"{at}.pads", full)], f"{at}.padded", mode=PAD_MODES[mode])

    def unclipped(self, codes: InputCodes, x: str) -> tuple[str, int, int, list[NodeProto]]:
        """(tensor, lowest code, highest code, nodes to come behind): what stands in front of a quantizer and need not.

        Relus and Clips become bounds of its codes: rounding is monotonic, so clipping before it and after it are the
        same. Shuffles of pixels come behind it. For a runtime merges a convolution with the quantizer that directly
        follows, whatever the bounds and the signedness.
        """
        lo, hi, behind = codes.lo, codes.hi, []
        if not (codes.whole and codes.per_tensor):
            return x, lo, hi, behind
        scale, zero = codes.scale.numpy()[0], int(codes.zero[0])
        while x in self.clippings or x in self.shuffles:
            self.absorbed.add(x)
            if x in self.shuffles:
                behind.insert(0, self.shuffles[x])
                x = behind[0].input[0]
                continue
            clipping = self.clippings[x]
            x = clipping.source
            lowest, highest = (np.rint(np.float32(v) / scale) + zero for v in (clipping.low, clipping.high))
            lo, hi = int(np.clip(lowest, lo, hi)), int(np.clip(highest, lo, hi))
        return x, lo, hi, behind
