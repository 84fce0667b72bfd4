"""Runs of nodes that come again, as a transformer's blocks do, and the calls of ONNX functions that stand for them.

In a function the k-th node with a name is called k, and what belongs to it by k and its end: `3.w`. A call carries the
names of its nodes, so that the n-th named node of the network stays the n-th. Constants that one call alone reads are
joined, all bytes and all numbers, for every tensor costs some twenty bytes beside its own.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.names import base62, number
from bitwright.deploy.packing import OPSET

# What functions are called, and what stands between the names of a call's nodes: no path of a module has two dots.
BLOCK, BETWEEN = "Block", ".."
# The last inputs of a function that takes joined constants apart, which its first three nodes do.
JOINED = ["bytes", "numbers"]
# Nodes of a run at most; a transformer's block has some fifty.
LONGEST = 80
# Bytes that a function has to save.
WORTH = 100
# Bytes of a constant beside its own: its type, shape and name.
BESIDE = 17


def size(message: NodeProto | onnx.FunctionProto) -> int:
    """Bytes of a node or a function in a file."""
    return message.ByteSize() + (2 if message.ByteSize() < 128 else 3)


def names_of(node: NodeProto) -> list[str]:
    """The names that a node carries: its own, those of a block's nodes, or none."""
    return node.name.split(BETWEEN) if node.name else []


def is_block(node: NodeProto) -> bool:
    """Whether a node calls a block's function."""
    return node.domain == DOMAIN and node.op_type.startswith(BLOCK)


def what(node: NodeProto) -> tuple:
    """What a node does, whatever its tensors."""
    attributes = tuple(a.SerializeToString() for a in node.attribute)
    return node.domain, node.op_type, bool(node.name), len(node.input), len(node.output), attributes


@dataclass(frozen=True, eq=False)
class Run:
    """Nodes `start` to `end` of a graph, the last of which is not in it.

    call: the node that stands for them. function: what it calls, without a name. joined: (bytes, numbers) that become
    the call's last inputs, or (). saved: bytes that the call takes less than the nodes.
    """

    start: int
    end: int
    call: NodeProto
    function: onnx.FunctionProto
    joined: tuple[tuple[str, ...], ...]
    saved: int


class Graph:
    """What a graph's runs are made of.

    before: how many names the nodes before each node carry. last: the last node that reads a tensor. alike: a number
    for each node, equal where nodes do the same. bytes: constants that one call reads. numbers: lengths of
    constants that calls read.
    """

    def __init__(self, graph: onnx.GraphProto):
        self.nodes = list(graph.node)
        self.sizes = [0, *accumulate(map(size, self.nodes))]
        self.before = [0, *accumulate(len(names_of(node)) for node in self.nodes)]
        self.last = {name: i for i, node in enumerate(self.nodes) for name in node.input}
        self.last |= {value.name: len(self.nodes) for value in graph.output}
        # onnxruntime's functions take no INT4.
        narrow = {t.name for t in graph.initializer if t.data_type == TensorProto.INT4}
        numbers: dict[tuple, int] = {}
        self.alike = [
            # What is like no other node is in no run.
            -i if is_block(n) or not narrow.isdisjoint(n.input) else numbers.setdefault(what(n), 1 + len(numbers))
            for i, n in enumerate(self.nodes)
        ]
        uses: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                uses[name].append(node)
        # What goes to nodes of the standard stays as it is: a runtime looks at shapes before it computes constants.
        ours = [t for t in graph.initializer if all(n.domain == DOMAIN for n in uses[t.name]) and "." not in t.name]
        self.bytes = {
            t.name for t in ours if t.data_type == TensorProto.UINT8 and t.dims[1:] == [1] and len(uses[t.name]) == 1
        }
        self.numbers = {t.name: t.dims[0] for t in ours if t.data_type == TensorProto.INT64 and len(t.dims) == 1}

    def owned(self, name: str, start: int, end: int) -> str | None:
        """What a tensor that belongs to a node of a run is called inside; None for others."""
        owner, dot, rest = name.partition(".")
        local = number(owner) - self.before[start] if dot and owner else -1
        return f"{base62(local)}.{rest}" if 0 <= local < self.before[end] - self.before[start] else None

    def run(self, start: int, end: int) -> Run:
        """The run of nodes `start` to `end`, which is not in it."""
        inside: dict[str, str] = {"": ""}
        inputs, outputs, body, names = [], [], [], []
        for node in self.nodes[start:end]:
            copy = NodeProto.FromString(node.SerializeToString())
            for name in node.input:
                if name not in inside:
                    inside[name] = base62(len(inside))
                    inputs.append(name)
            for name in node.output:
                owned = self.owned(name, start, end)
                inside[name] = owned or base62(len(inside))
                if self.last.get(name, 0) >= end or ("." in name and not owned):
                    outputs.append(name)
            copy.input[:] = [inside[name] for name in node.input]
            copy.output[:] = [inside[name] for name in node.output]
            copy.name = base62(len(names)) if node.name else ""
            names += names_of(node)
            body.append(copy)
        joined = tuple(tuple(n for n in inputs if n in kind) for kind in (self.bytes, self.numbers))
        if all(len(part) > 1 for part in joined):
            rest = [name for name in inputs if not any(name in part for part in joined)]
            body[:0] = self.taken_apart(joined, inside)
            first = joined[0][0]
            inputs, given = [*rest, first, f"{first}_"], [*(inside[n] for n in rest), *JOINED]
        else:
            joined, given = (), [inside[name] for name in inputs]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        function = helper.make_function(DOMAIN, "", given, [inside[name] for name in outputs], body, opsets)
        call = helper.make_node(BLOCK, inputs, outputs, name=BETWEEN.join(names) or None, domain=DOMAIN)
        saved = self.sizes[end] - self.sizes[start] - size(call) + BESIDE * sum(len(part) - 1 for part in joined)
        return Run(start, end, call, function, joined, saved)

    def taken_apart(self, joined: tuple[tuple[str, ...], ...], inside: dict[str, str]) -> list[NodeProto]:
        """The nodes that make constants of `bytes` and `numbers`, which begin with how many bytes each has."""
        lengths = np.array([len(joined[0]), *(self.numbers[name] for name in joined[1])])
        return [
            helper.make_node("Constant", [], ["sizes"], value=numpy_helper.from_array(lengths)),
            helper.make_node("Split", ["numbers", "sizes"], ["lengths", *(inside[name] for name in joined[1])]),
            helper.make_node("Split", ["bytes", "lengths"], [inside[name] for name in joined[0]]),
        ]

    def candidates(self) -> Iterator[tuple[int, int, list[int]]]:
        """(bytes saved, length, starts) of runs that may be equal, by what the first of them saves."""
        for length in range(2, LONGEST + 1):
            found: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for start in range(len(self.nodes) - length + 1):
                found[tuple(self.alike[start : start + length])].append(start)
            for starts in found.values():
                count = len(apart(starts, length))
                if count > 1 and (count - 1) * (self.sizes[starts[0] + length] - self.sizes[starts[0]]) > WORTH:
                    first = self.run(starts[0], starts[0] + length)
                    yield first.saved * count - size(first.function), length, starts

    def best(self) -> list[Run]:
        """The equal runs that save most; [] where none saves `WORTH`."""
        chosen, most = [], WORTH
        for promised, length, starts in sorted(self.candidates(), reverse=True):
            if promised <= most:
                break
            equal: dict[bytes, list[Run]] = defaultdict(list)
            for start in starts:
                run = self.run(start, start + length)
                equal[run.function.SerializeToString()].append(run)
            for runs in equal.values():
                kept = set(apart([run.start for run in runs], length))
                runs = [run for run in runs if run.start in kept]
                saved = sum(run.saved for run in runs) - size(runs[0].function)
                if saved > most:
                    chosen, most = runs, saved
        return chosen


def apart(starts: list[int], length: int) -> list[int]:
    """Those of `starts`, in order, whose runs do not overlap."""
    kept: list[int] = []
    for start in starts:
        if not kept or start >= kept[-1] + length:
            kept.append(start)
    return kept
