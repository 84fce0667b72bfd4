"""Quantization topology: where else a network needs quantizers, so that it runs on integers from end to end.

Input quantizers alone (`fpres`) leave the residual stream in float, and with it every convolution whose output is
read by anything but one input quantizer. Integer kernels write integers: they need to know the grid of their output.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.flow import Flow, Value, trace
from bitwright.layers import candidates, is_quantized
from bitwright.rules import Rule, resolve
from bitwright.spec import QuantizerSpec

Topology = Literal["fpres", "res8"]
TOPOLOGIES = ("fpres", "res8")

# Runtimes merge these into the kernel before, and a quantizer behind them into it as well.
FUSED = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip"}
# The codes of their output are codes of their input, so that a quantizer may stand on either side.
MOVED = {
    *("max_pool1d", "max_pool2d", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze"),
    *("unsqueeze", "__getitem__", "contiguous", "clone", "dropout", "pad"),
}
ADDITIONS = {"add", "__add__", "__radd__", "__iadd__"}


def topology(
    model: nn.Module,
    example: Tensor,
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
        example: an input batch; its first sample is used.
        kind: "fpres": none, sums are float. "res8" (default): 8-bit quantizers on the output of every convolution
            (behind its norm and activation) that is not read by one input quantizer alone, and on every sum of such
            outputs.
        rules: those for weights and inputs: a layer that they leave in float, weight or input, counts as float here.
            None: every layer that can be quantized is.
        bits: of these quantizers.
        grid, grid_options: see `QuantizerSpec`. The default, LSQ, starts here from the scale of least squared error:
            its own start value leaves three quarters of an 8-bit range unused.

    Raises:
        BitwrightError: `kind` is unknown, the model is prepared already, or a rule names no layer.
    """
    if kind not in TOPOLOGIES:
        raise BitwrightError(f"topology {kind!r} is not accepted; use {', '.join(TOPOLOGIES)}")
    if any(is_quantized(m) for m in model.modules()):
        raise BitwrightError("topology: the model is prepared already; ask for the rules of the float model")
    if kind == "fpres":
        return []
    options = grid_options if grid_options is not None else {"init": "mse"} if grid == "lsq" else {}
    spec = QuantizerSpec(bits=bits, grid=grid, grid_options=options)  # pyright: ignore[reportArgumentType]
    layers = integer_layers(model, rules)
    names = list(dict.fromkeys(places(model, trace(model, example), layers)))
    return [Rule(match=tuple(names), output=spec)] if names else []


def integer_layers(model: nn.Module, rules: Sequence[Rule] | None) -> Mapping[str, nn.Module]:
    """The layers that will multiply integers, by name: convolutions, linear layers."""
    layers = {n: m for n, m in candidates(model).items() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    if rules is None:
        return layers
    wanted = resolve(model, list(rules))
    return {n: m for n, m in layers.items() if {"weight", "input"} <= wanted.get(n, {}).keys()}


def places(model: nn.Module, flow: Flow, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the modules whose outputs need a quantizer for `res8`, in the order of execution."""
    convolutions = {n for n, m in layers.items() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    sums: set[Value] = set()
    for value in flow.values:
        if value.kind.startswith("conv") and value.owner in convolutions:
            start = behind_norm(value)
        elif is_sum(value) and all(from_integers(v, convolutions, sums) for v in value.inputs):
            sums.add(value)
            start = value
        else:
            continue
        if read_by_one_layer(start, layers):
            continue
        end = settled(start)
        if any(v.leaves for v in end):
            continue
        names = [name for v in reversed(end) for name in flow.once(v)]
        # The same value may leave an identity inside a norm and the norm: the norm says more.
        telling = [n for n in names if type(model.get_submodule(n)) is not nn.Identity]
        yield from (telling or names)[:1]


def is_sum(value: Value) -> bool:
    """Whether `value` is the sum of two tensors of the network, and not of one and a constant."""
    return value.kind in ADDITIONS and len(value.inputs) == 2


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
    while (
        len(value.readers) == 1 and not value.leaves and value.readers[0].kind in FUSED | {"max_pool1d", "max_pool2d"}
    ):
        value = value.readers[0]
        chain.append(value)
    return chain
