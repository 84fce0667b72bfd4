"""Groups of nodes that come again and again, as one call of an ONNX function each; runtimes undo that at load.

A quantizer is three nodes, a weight three and a bias two, some hundred bytes a layer. What is outlined is what stands
in front of a scaling: its operators and constants' decoders, where the same group occurs often enough.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import onnx
from onnx import NodeProto, helper

from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.names import end_of
from bitwright.deploy.packing import BIAS, OPSET
from bitwright.deploy.split import SPLIT
from bitwright.deploy.streams import FIXED, FLOATING, WHOLE

# What a group ends with and what may stand before it, with the name of the function for either.
LAST = {"DequantizeLinear": "W", "Mul": "W", BIAS: "B"}
BEFORE = {"QuantizeLinear": "Q", "Clip": "Q", "Cast": "W", "Reshape": "W", FLOATING: "W", FIXED: "W", WHOLE: "B"}
# These too, by or with one number: what a quantizer with a zero point between codes consists of besides.
WITH_NUMBER = {"Div": "H", "Add": "H", "Sub": "H"}
# A function of its own takes as many bytes as outlining saves on so many groups.
OFTEN = 4


@dataclass(frozen=True)
class Group:
    """Nodes at `places` of the graph, in order. inputs: names from outside. outputs: names that are read outside.

    key: equal for groups that do the same to their inputs and give the same outputs.
    """

    places: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    key: tuple


def inner(node: NodeProto, numbers: set[str]) -> bool:
    """Whether a node may stand inside a group; numbers: constants that are one number."""
    plain = node.op_type in BEFORE or node.op_type.startswith("Unpack")
    return not node.name and (plain or (node.op_type in WITH_NUMBER and node.input[1] in numbers))


def group_at(
    graph: onnx.GraphProto, last: int, producer: dict[str, int], readers: dict[str, list[int]], numbers: set[str]
) -> Group | None:
    """The group that ends with node `last`; None where it is that node alone or its outputs are read too early.

    producer: of every tensor that is made by a node which is in no group yet. numbers: see `inner`.
    """
    places, todo = set(), [last]
    while todo:
        place = todo.pop()
        places.add(place)
        before = [p for name in graph.node[place].input if (p := producer.get(name, -1)) >= 0]
        todo += [p for p in before if inner(graph.node[p], numbers)]
    order = sorted(places)
    nodes = [graph.node[i] for i in order]
    made = {name: (j, k) for j, node in enumerate(nodes) for k, name in enumerate(node.output)}
    inputs = tuple(dict.fromkeys(n for node in nodes for n in node.input if n and n not in made))
    outside = {name: [i for i in readers[name] if i not in places] for name in made}
    outputs = tuple(name for name in made if outside[name] or end_of(name))
    if len(nodes) == 1 or any(i < last for name in outputs for i in outside[name]):
        return None
    place_of = {"": (), **{name: (i,) for i, name in enumerate(inputs)}, **made}
    key = tuple(
        (n.domain, n.op_type, *(a.SerializeToString() for a in n.attribute), *(place_of[name] for name in n.input))
        for n in nodes
    )
    return Group(tuple(order), inputs, outputs, (*key, *(made[name] for name in outputs)))


def groups(graph: onnx.GraphProto) -> list[list[Group]]:
    """Groups that come again, those that are alike together."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
    readers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.node):
        for name in node.input:
            readers[name].append(i)
    numbers = {t.name for t in graph.initializer if not t.dims}
    alike: dict[tuple, list[Group]] = defaultdict(list)
    for i, node in enumerate(graph.node):
        if node.op_type not in LAST or node.output[0].endswith(SPLIT):
            continue
        group = group_at(graph, i, producer, readers, numbers)
        if group is not None:
            producer = {name: place for name, place in producer.items() if place not in group.places}
            alike[group.key].append(group)
    return [found for found in alike.values() if len(found) >= OFTEN]


def outline(model: onnx.ModelProto) -> None:
    """Replace such groups, in place."""
    graph = model.graph
    count: Counter[str] = Counter()
    calls: dict[int, NodeProto] = {}
    dropped: set[int] = set()
    for alike in groups(graph):
        first = alike[0]
        nodes = [graph.node[i] for i in first.places]
        kind = (BEFORE | WITH_NUMBER).get(nodes[0].op_type, LAST[nodes[-1].op_type])
        count[kind] += 1
        name = kind if count[kind] == 1 else f"{kind}{count[kind]}"
        model.functions.append(function_of(name, nodes, first))
        for group in alike:
            dropped.update(group.places)
            calls[group.places[-1]] = helper.make_node(name, group.inputs, group.outputs, domain=DOMAIN)
    kept = [calls.get(i, node) for i, node in enumerate(graph.node) if i in calls or i not in dropped]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(kept)
    if calls and not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def function_of(name: str, nodes: list[NodeProto], group: Group) -> onnx.FunctionProto:
    """The function that does what the group's nodes do; tensors in it have letters for names."""
    tensors = dict.fromkeys([*group.inputs, *(out for node in nodes for out in node.output)])
    short = {"": "", **{tensor: f"t{i}" for i, tensor in enumerate(tensors)}}
    body = []
    for node in nodes:
        copy = NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [short[n] for n in node.input]
        copy.output[:] = [short[n] for n in node.output]
        body.append(copy)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    inputs, outputs = ([short[n] for n in names] for names in (group.inputs, group.outputs))
    return helper.make_function(DOMAIN, name, inputs, outputs, body, opsets)
