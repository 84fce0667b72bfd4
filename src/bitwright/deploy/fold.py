"""`fold`: runs of nodes that come again become calls of ONNX functions; `unfold`: the names and nodes of before.

`fold` comes last, when tensors have short names. Our readers unfold a file before they look at anything; a runtime
takes functions apart at load.
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from bitwright.deploy.blocks import BLOCK, JOINED, Graph, Run, is_block, names_of
from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.names import base62, number, numbered, rename, tensors_of
from bitwright.deploy.packing import varints


def fold(model: onnx.ModelProto) -> None:
    """Replace runs of nodes, in place, as long as that saves bytes."""
    graph, count = model.graph, 0
    while runs := Graph(graph).best():
        count += 1
        nodes = list(graph.node)
        function = runs[0].function
        function.name = f"{BLOCK}{count}"
        for run in reversed(runs):
            run.call.op_type = function.name
            nodes[run.start : run.end] = [run.call]
        put(graph, nodes)
        join(graph, runs)
        model.functions.append(function)
    if not count:
        return
    rename(graph, numbered(graph, {name for name in tensors_of(graph) if "." in name}))
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def put(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    """Give a graph other nodes, among them its own."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def join(graph: onnx.GraphProto, runs: list[Run]) -> None:
    """Join the constants of runs: bytes one behind the other; how many each has, and then all numbers."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {}
    for run in runs:
        if run.joined:
            of_bytes, of_numbers = ([numpy_helper.to_array(tensors[name]) for name in names] for names in run.joined)
            first, second = run.call.input[-2:]
            lengths = np.array([len(part) for part in of_bytes])
            made[first] = numpy_helper.from_array(np.concatenate(of_bytes), first)
            made[second] = varints(second, np.concatenate([lengths, *of_numbers]).tolist())
    read = {name for node in graph.node for name in node.input}
    tensors = {name: tensor for name, tensor in (tensors | made).items() if name in read}
    hold(graph, list(tensors.values()))


def hold(graph: onnx.GraphProto, tensors: list[TensorProto]) -> None:
    """Give a graph other constants, among them its own."""
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def unfold(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, changed in place, with the nodes and constants that `fold` replaced."""
    functions = {function.name: function for function in model.functions if function.name.startswith(BLOCK)}
    if not functions:
        return model
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, names = [], 0
    for call in model.graph.node:
        if is_block(call):
            function, at = functions[call.op_type], f"{BLOCK}{len(nodes)}_"
            apart = taken_apart(call, function, tensors, at)
            tensors |= {tensor.name: tensor for tensor in apart}
            nodes += inlined(call, function, names, at, bool(apart))
        else:
            nodes.append(call)
        names += len(names_of(call))
    put(model.graph, nodes)
    hold(model.graph, list(tensors.values()))
    others = [function for function in model.functions if function.name not in functions]
    others = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in others]
    del model.functions[:]
    model.functions.extend(others)
    return model


def taken_apart(
    call: NodeProto, function: onnx.FunctionProto, tensors: dict[str, TensorProto], at: str
) -> list[TensorProto]:
    """The constants that became two, which leave `tensors`; [] where there are none. at: begins their names."""
    if list(function.input[-2:]) != JOINED:
        return []
    sizes, numbers, data = function.node[:3]
    of_bytes, of_numbers = (numpy_helper.to_array(tensors.pop(name)) for name in call.input[-2:])
    lengths, *parts = np.split(of_numbers, np.cumsum(numpy_helper.to_array(sizes.attribute[0].t))[:-1])
    made = [varints(at + name, part.tolist()) for name, part in zip(numbers.output[1:], parts, strict=True)]
    parts = np.split(of_bytes, np.cumsum(lengths)[:-1])
    return made + [numpy_helper.from_array(part, at + name) for name, part in zip(data.output, parts, strict=True)]


def inlined(call: NodeProto, function: onnx.FunctionProto, names: int, at: str, joined: bool) -> list[NodeProto]:
    """The nodes that a call stands for. names: how many names come before. at: begins the names of other tensors.

    joined: constants were taken apart, which is what the first three nodes do.
    """
    outside = {"": "", **dict(zip(function.input, call.input, strict=True))}
    outside |= dict(zip(function.output, call.output, strict=True))
    own, nodes = names_of(call), []
    for i, inner in enumerate(function.node):
        node = NodeProto.FromString(inner.SerializeToString())
        for name in inner.output:
            owner, dot, rest = name.partition(".")
            short = f"{base62(names + number(owner))}.{rest}" if dot else at + name
            outside.setdefault(name, short)
        if joined and i < 3:
            continue
        node.input[:] = [outside[name] for name in inner.input]
        node.output[:] = [outside[name] for name in inner.output]
        node.name = own[number(inner.name)] if inner.name else ""
        nodes.append(node)
    return nodes
