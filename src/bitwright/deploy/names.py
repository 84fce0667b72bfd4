"""Short names of tensors inside a file: in a small network at few bits the long ones are a tenth of it.

A file names its layers, and quantizers that belong to none, once, at one node each. What belongs to the k-th such node
is called by k in base 62 and a letter: `1b.w` is its weight. Readers put the names back before they look at anything.
"""

import itertools
from collections import Counter
from collections.abc import Container, Mapping, Set

import onnx

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The ends of names that `verify` and readers of a file ask for.
ENDS = {
    ".input.codes": ".i",
    ".output.codes": ".o",
    ".codes": ".c",
    ".taps": ".k",
    ".weight": ".w",
    ".split_weight": ".s",
    ".bias": ".b",
    ".negative_bias": ".n",
    ".table_scale": ".t",
    ".scales": ".p",
    ".bias_sums": ".q",
}
LONG = {short: long for long, short in ENDS.items()}
# Says in a file's metadata that its names are short ones.
MARK = ("names", "short")


def base62(number: int) -> str:
    """A number in as few characters as possible."""
    head = base62(number // len(DIGITS) - 1) if number >= len(DIGITS) else ""
    return head + DIGITS[number % len(DIGITS)]


def number(digits: str) -> int:
    """The inverse of `base62`; -1 for what has other letters."""
    value = 0
    for digit in digits:
        value = value * len(DIGITS) + DIGITS.find(digit) + 1
        if digit not in DIGITS:
            return -1
    return value - 1


def end_of(name: str) -> str:
    """The end of a name that can be asked for; "" for all others."""
    return next((end for end in ENDS if name.endswith(end)), "")


def owner_of(name: str, owners: Container[str]) -> str | None:
    """The longest of `owners` that `name` begins with, up to a dot."""
    ends = [i for i, letter in enumerate(name) if letter == "."]
    return next((name[:i] for i in reversed(ends) if name[:i] in owners), None)


def rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call tensors as `names` says, in place; those that it lacks keep their names."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def named(graph: onnx.GraphProto) -> list[str]:
    """Names of nodes that have one, in order."""
    return [node.name for node in graph.node if node.name]


def shorten(model: onnx.ModelProto) -> None:
    """Give tensors short names, in place; `spelled_out` gives those that can be asked for their own again."""
    graph = model.graph
    layers = set(named(graph))
    for node in graph.node:
        for name in node.output:
            if name.endswith(".codes") and not node.name and owner_of(name, layers) is None:
                node.name = name.removesuffix(end_of(name))
    owners = {name: base62(i) for i, name in enumerate(named(graph))}
    names = {}
    for name in tensors_of(graph):
        owner = owner_of(name, owners) if end_of(name) else None
        if owner is not None:
            end = name[len(owner) :]
            names[name] = owners[owner] + ENDS.get(end, end)
    # In a network of one layer, which has no name, there are names that are nothing but an end.
    rename(graph, names | numbered(graph, {*names, *(name for name in tensors_of(graph) if end_of(name) == name)}))
    model.metadata_props.add(key=MARK[0], value=MARK[1])


def tensors_of(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is made or read by a node."""
    return Counter(name for node in graph.node for name in (*node.input, *node.output) if name)


def numbered(graph: onnx.GraphProto, kept: Set[str]) -> dict[str, str]:
    """The shortest names for tensors that are not `kept`, inputs or outputs; the most frequent get the shortest."""
    used, kept = tensors_of(graph), kept | {value.name for value in (*graph.input, *graph.output)}
    others = sorted(used.keys() - kept, key=lambda name: (-used[name], name))
    free = (name for i in itertools.count() if (name := base62(i)) not in kept)
    return dict(zip(others, free, strict=False))


def spelled_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, changed in place, with the names that `shorten` took away; others stay as they are."""
    mark = next((p for p in model.metadata_props if (p.key, p.value) == MARK), None)
    if mark is None:
        return model
    model.metadata_props.remove(mark)
    owners = {base62(i): name for i, name in enumerate(named(model.graph))}

    def long(name: str) -> str:
        owner, dot, end = name.partition(".")
        return owners[owner] + LONG.get(dot + end, dot + end) if dot and owner in owners else name

    names = {t.name for t in model.graph.initializer}
    names |= {name for node in model.graph.node for name in (*node.input, *node.output)}
    rename(model.graph, {name: long(name) for name in names})
    return model
