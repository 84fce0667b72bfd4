"""Quantization topology: where else a network needs quantizers, so that it runs on integers from end to end.

Input quantizers alone (`fpres`) leave the residual stream in float, and with it every convolution whose output is
read by anything but one input quantizer. Integer kernels write integers: they need to know the grid of their output.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from bitwright.errors import BitwrightError
from bitwright.flow import Flow, Value, trace
from bitwright.layers import CONVOLUTIONS, candidates, is_quantized, multiplies
from bitwright.rules import Rule, resolve, weight_layers
from bitwright.spec import QuantizerSpec
from bitwright.wrappers import unwrap

Topology = Literal["fpres", "res8", "act8", "shared"]
TOPOLOGIES = ("fpres", "res8", "act8", "shared")

# Runtimes merge these into the kernel before, and a quantizer behind them into it as well.
FUSED = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip"}
POOLS = {"max_pool1d", "max_pool2d", "max_pool3d"}
# The codes of their output are codes of their input, so that a quantizer may stand on either side.
MOVED = POOLS | {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "pixel_shuffle"),
    *("unsqueeze", "__getitem__", "contiguous", "clone", "dropout", "pad"),
}
# What a network makes of its last layer: a mask at the picture's size, a probability, a pixel.
LAST = {"interpolate", "sigmoid", "tanh", "softmax", "log_softmax"}
# What integers go through where what they read has the grid `hard`.
HARD = {"hardswish", "hardsigmoid"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__"}
ADDITIONS = {"add", "__add__", "__radd__", "__iadd__"}


def topology(
    model: nn.Module,
    example: Any,
    kind: Topology = "res8",
    *,
    rules: Sequence[Rule] | None = None,
    bits: int = 8,
    grid: str = "lsq",
    grid_options: dict[str, Any] | None = None,
) -> list[Rule]:
    """Rules for output quantizers, to come after those for weights and inputs.

    `bw.prepare(model, bw.rules("w4a4") + bw.topology(model, example))`.

    Args:
        model: float; it runs once, in evaluation mode, and is not changed.
        example: an input batch, as `calibrate` takes them; its first sample is used.
        kind: "fpres": none, sums are float. "res8" (default): 8-bit quantizers on the output of every convolution
            (behind its norm and activation) that is not read by one input quantizer alone, and on every sum of such
            outputs. "act8": as res8, and Hardswish and Hardsigmoid gates run on integers: what they read is on the
            grid `hard`, and what Hardswish and a gate's product put out has an 8-bit quantizer as well, unless one
            input quantizer alone reads it. "shared": as res8, but a tensor that convolutions or linear layers read is
            quantized once, at the bits of their inputs, for them and for the sum; it needs `rules`.
        rules: those for weights and inputs: a layer that they leave in float, weight or input, counts as float here.
            None: every layer that can be quantized is.
        bits: of these quantizers.
        grid, grid_options: see `QuantizerSpec`. The default, LSQ, starts here from the scale of least squared error:
            its own start value leaves three quarters of an 8-bit range unused.

    Raises:
        BitwrightError: `kind` is unknown, "shared" came without rules, the model is prepared already, or a rule names
            no layer.
    """
    if kind not in TOPOLOGIES:
        raise BitwrightError(f"topology {kind!r} is not accepted; use {', '.join(TOPOLOGIES)}")
    model = unwrap(model)
    if any(is_quantized(m) for m in model.modules()):
        raise BitwrightError("topology: the model is prepared already; ask for the rules of the float model")
    if kind == "fpres":
        return []
    options = grid_options if grid_options is not None else {"init": "mse"} if grid == "lsq" else {}
    spec = QuantizerSpec(bits=bits, grid=grid, grid_options=options)  # pyright: ignore[reportArgumentType]
    if kind == "shared" and rules is None:
        raise BitwrightError("topology 'shared' takes the bits of inputs from rules; give rules=bw.rules(...)")
    layers, flow = integer_layers(model, rules), trace(model, example)
    found = dict(places(model, flow, layers, hard=kind == "act8"))
    bent = {n for n, v in found.items() if kind == "act8" and any(r.kind in HARD for r in v.readers)}
    # Both signs whatever the data: the zero point of a gate lies below that of its input.
    of_bent = QuantizerSpec(bits=bits, grid="hard", grid_options={"init": "mse"}, signed=True)
    groups = [(tuple(n for n in found if n not in bent), spec), (tuple(n for n in found if n in bent), of_bent)]
    made = [Rule(match=names, output=each) for names, each in groups if names]
    if kind == "shared":
        inputs = {n: fields["input"] for n, fields in resolve(model, list(rules or [])).items() if n in layers}
        for name, value in found.items():
            made += shared_input(model, flow, name, value, inputs)
    return made


def shared_input(
    model: nn.Module, flow: Flow, name: str, value: Value, inputs: dict[str, QuantizerSpec]
) -> Iterator[Rule]:
    """Rules by which the layers that read `value`, the output of the module `name`, share its quantizer.

    The widest of their input quantizers is shared by those who have the same; the others, the first and the last
    layer of the model and layers that pad with anything but zeros keep their own.

    inputs: {layer: its input quantizer's spec}.
    """
    ordered = weight_layers(model)
    specs = {
        n: inputs[n]
        for n in readers(value)
        if n in inputs
        and n not in (ordered[0], ordered[-1])
        and flow.calls[n] == 1
        and not inputs[n].per_channel
        and getattr(model.get_submodule(n), "padding_mode", "zeros") == "zeros"
    }
    if specs:
        widest = max(specs.values(), key=lambda spec: spec.bits)
        yield Rule(match=(name,), output=widest)
        yield Rule(match=tuple(n for n, spec in specs.items() if spec == widest), shares=name)


def readers(value: Value) -> Iterator[str]:
    """Names of the modules whose functions read `value`, maybe behind moves of codes."""
    for reader in value.readers:
        yield reader.owner
        if reader.kind in MOVED - {"pad"}:
            yield from readers(reader)


def integer_layers(model: nn.Module, rules: Sequence[Rule] | None) -> Mapping[str, nn.Module]:
    """The layers that will multiply integers, by name: convolutions, linear layers."""
    layers = {n: m for n, m in candidates(model).items() if multiplies(m)}
    if rules is None:
        return layers
    wanted = resolve(model, list(rules))
    return {n: m for n, m in layers.items() if {"weight", "input"} <= wanted.get(n, {}).keys()}


def places(
    model: nn.Module, flow: Flow, layers: Mapping[str, nn.Module], hard: bool = False
) -> Iterator[tuple[str, Value]]:
    """Names of the modules whose outputs need a quantizer for `res8`, and these outputs, in the order of execution.

    hard: for `act8`.
    """
    convolutions = {n for n, m in layers.items() if isinstance(m, CONVOLUTIONS)}
    sums: set[Value] = set()
    for value in flow.values:
        if value.kind.startswith("conv") and value.owner in convolutions:
            start = behind_norm(value)
        elif joins(value, convolutions, sums) or (hard and bends(value, convolutions, sums)):
            sums.add(value)
            start = value
        else:
            continue
        if read_by_one_layer(start, layers):
            continue
        end = settled(start)
        if is_output(end[-1]):
            continue
        names = [(name, v) for v in reversed(end) for name in flow.once(v)]
        # The same value may leave an identity inside a norm and the norm: the norm says more.
        telling = [(n, v) for n, v in names if type(model.get_submodule(n)) is not nn.Identity]
        yield from (telling or names)[:1]


def is_output(value: Value) -> bool:
    """Whether the network puts out `value`, maybe in another shape or size or squashed: quantized logits would tie."""
    return value.leaves or any(r.kind in MOVED | LAST and is_output(r) for r in value.readers)


def is_sum(value: Value) -> bool:
    """Whether `value` is the sum of two tensors of the network, and not of one and a constant."""
    return value.kind in ADDITIONS and len(value.inputs) == 2


def joins(value: Value, convolutions: set[str], sums: set[Value]) -> bool:
    """Whether `value` is the sum of two tensors of integers."""
    return is_sum(value) and all(from_integers(v, convolutions, sums) for v in value.inputs)


def bends(value: Value, convolutions: set[str], sums: set[Value]) -> bool:
    """Whether `value` is the Hardswish of integers, or the product of integers and a Hardsigmoid of integers."""
    if value.kind == "hardswish":
        return from_integers(value.inputs[0], convolutions, sums)
    if value.kind not in PRODUCTS or len(value.inputs) != 2:
        return False
    gated = [v.inputs[0] if v.kind == "hardsigmoid" else v for v in value.inputs]
    hard = sum(v.kind == "hardsigmoid" for v in value.inputs)
    return hard == 1 and all(from_integers(v, convolutions, sums) for v in gated)


def behind_norm(value: Value) -> Value:
    """The output of the norm that alone reads a convolution's output and is folded into it, or that output itself."""
    after = value.readers[0] if len(value.readers) == 1 and not value.leaves else value
    return after if after.kind == "batch_norm" else value


def from_integers(value: Value, convolutions: set[str], sums: set[Value]) -> bool:
    """Whether `value` comes from a convolution or an integer sum through what changes no code."""
    while value not in sums and value.owner not in convolutions:
        if value.kind not in FUSED | MOVED | {"batch_norm"}:
            return False
        value = value.inputs[0]
    return True


def read_by_one_layer(value: Value, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the input of one convolution or linear layer is all that reads `value`, maybe behind moves of codes."""
    while len(value.readers) == 1 and not value.leaves:
        value = value.readers[0]
        if value.owner in layers:
            return True
        if value.kind not in FUSED | MOVED - {"pad"}:
            return False
    return False


def settled(value: Value) -> list[Value]:
    """`value` and what a kernel or its output's quantizer makes of it before anything else reads it."""
    chain = [value]
    while len(value.readers) == 1 and not value.leaves and value.readers[0].kind in FUSED | POOLS:
        value = value.readers[0]
        chain.append(value)
    return chain
