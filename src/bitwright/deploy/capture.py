"""What surrounds each layer, read from the captured graph: names and definition order say nothing."""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.batches import exportable, inputs_of
from bitwright.deploy.integer import symbol
from bitwright.errors import BitwrightError
from bitwright.layers import QuantBatchNorm2d, QuantConv, QuantProduct, attach_output, has_output
from bitwright.layers.reproducible import FoldedNorm
from bitwright.prepare import quant_layers, quantizers, set_bypass
from bitwright.quantizer import Quantizer

ATEN = torch.ops.aten
CONVOLUTIONS: dict[Any, int] = {  # axes of the output
    ATEN.conv1d.default: 3,
    ATEN.conv2d.default: 4,
    ATEN.conv3d.default: 5,
    ATEN.conv1d.padding: 3,
    ATEN.conv2d.padding: 4,
    ATEN.conv3d.padding: 5,
    ATEN.conv_transpose1d.default: 3,
    ATEN.conv_transpose2d.input: 4,
    ATEN.conv_transpose3d.input: 5,
}
# Runtimes merge these into the convolution before and the quantizer behind, or move the quantizer before them.
PASSED = {
    *(ATEN.relu, ATEN.relu_, ATEN.relu6, ATEN.hardtanh, ATEN.hardtanh_, ATEN.clamp, ATEN.clamp_min, ATEN.clamp_max),
    *(ATEN.view, ATEN.reshape, ATEN.flatten, ATEN.unflatten, ATEN.permute, ATEN.transpose, ATEN.squeeze),
    *(ATEN.unsqueeze, ATEN.slice, ATEN.dropout, ATEN.contiguous, ATEN.clone, ATEN.pixel_shuffle),
    *(ATEN.max_pool1d, ATEN.max_pool2d, ATEN.max_pool3d),
}


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch's exporters warn and log about their own internals; none of it is the user's doing."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # says that torchvision is absent
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, for messages that must be one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Surroundings:
    """What follows a convolution or linear layer.

    norm: name of the BatchNorm that alone reads its output, or None. readers: names of the quantizers that read its
    output as it is, or behind the norm and operators that runtimes see through (`PASSED`). alone: nothing else does.
    """

    norm: str | None
    readers: tuple[str, ...]
    alone: bool


class Mark(nn.Module):
    """Stands for a quantizer of an input or output in the captured graph."""

    def forward(self, x: Tensor) -> Tensor:
        return symbol("Quantize", x, x.shape, x.dtype, {})


def is_plain_norm(module: nn.Module) -> bool:
    """Whether `module` normalises and does nothing else, or is timm's norm with `drop` and `act` behind it."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, QuantBatchNorm2d, nn.SyncBatchNorm)
    timm_norm = type(module).__module__.startswith("timm.") and type(module).__name__ == "BatchNormAct2d"
    return type(module) in plain or isinstance(module, FoldedNorm) or timm_norm


def without_norm(module: Any) -> nn.Module:
    """What is left of a norm that was folded: its activation, if it had one."""
    return nn.Sequential(module.drop, module.act) if hasattr(module, "act") else nn.Identity()


def marked(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are float and whose other quantizers are marks."""
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.clear()  # says which module a node belonged to when it was traced, without our marks
    set_bypass(quantizers(twin).values(), True)
    for layer in quant_layers(twin).values():
        for slot in layer.input_slots:
            if isinstance(getattr(layer, slot, None), Quantizer):
                setattr(layer, slot, Mark())
    for module in list(twin.modules()):
        if has_output(module):
            attach_output(module, Mark())
    return twin


@dataclass(frozen=True)
class Captured:
    """A model's graph in evaluation. program: of `twin`, in which weights are float and other quantizers marks."""

    program: torch.export.ExportedProgram
    twin: nn.Module


def captured(model: nn.Module, example: Any) -> Captured:
    """The graph of a prepared model, which is not changed; `example` is one input batch.

    Raises:
        BitwrightError: `torch.export` cannot capture the model.
    """
    twin = marked(model)
    try:
        with quiet_export(), torch.no_grad(), exportable(twin, inputs_of(example, "export")) as given:
            return Captured(torch.export.export(twin, given.args, given.kwargs, strict=False), twin)
    except BitwrightError:
        raise
    except Exception as error:
        raise BitwrightError(f"{type(model).__name__}: torch.export cannot capture it: {first_line(error)}") from error


def surroundings(graph: Captured) -> dict[str, Surroundings]:
    """What follows each quantized convolution and linear layer that is called exactly once.

    A norm counts if it is called once too and runs on its stored statistics along the layer's output channels;
    every other norm stays float in the deployed network.
    """
    program, modules = graph.program, dict(graph.twin.named_modules())
    buffers = program.graph_signature.inputs_to_buffers
    nodes = {n: owner for n in program.graph.nodes if (owner := layer_of(n, modules))}
    calls = Counter(nodes.values())
    calls.update(norm for n in program.graph.nodes if (norm := norm_of(n, buffers)))
    found = {}
    for node, name in nodes.items():
        if calls[name] > 1:
            continue
        after = next(iter(node.users), None)
        norm = norm_of(after, buffers) if after is not None and len(node.users) == 1 else None
        foldable = norm is not None and calls[norm] == 1 and is_plain_norm(modules[norm])
        end = after if foldable and after is not None else node
        found[name] = Surroundings(norm if foldable else None, tuple(readers(end, modules)), alone(end, modules))
    return found


def norm_readers(graph: Captured) -> dict[str, tuple[str, ...]]:
    """The quantizers that read each layer norm which runs once, as `readers` finds them, by the norm's name."""
    modules = dict(graph.twin.named_modules())
    nodes = [n for n in graph.program.graph.nodes if n.target is ATEN.layer_norm.default]
    calls = Counter(owner_of(n) for n in nodes)
    return {owner_of(n): tuple(readers(n, modules)) for n in nodes if calls[owner_of(n)] == 1}


@dataclass(frozen=True)
class Requantized:
    """A quantizer that reads what others wrote: one value on their grid, or the sum of two. Names of quantizers."""

    reader: str
    sources: tuple[str, ...]


def requantized(graph: Captured) -> list[Requantized]:
    """Every quantizer that reads quantized values or a sum of two, in the order of execution."""
    modules = dict(graph.twin.named_modules())
    found = []
    for node in graph.program.graph.nodes:
        owner = owner_of(node)
        before = next((n for n in node.all_input_nodes), None)
        if before is not None and isinstance(modules.get(owner), Mark) and owner_of(before) != owner:
            sources = origins(before, modules)
            if sources:
                found.append(Requantized(owner, sources))
    return found


def origins(node: fx.Node, modules: dict[str, nn.Module], sums: int = 1) -> tuple[str, ...]:
    """The quantizers whose values, or the sum of whose values, `node` is, behind at most `sums` sums; () for none."""
    if isinstance(modules.get(owner_of(node)), Mark):
        return (owner_of(node),)
    kind = getattr(node.target, "overloadpacket", None)
    zeros = (kind is ATEN.constant_pad_nd and not any(node.args[2:])) or (kind is ATEN.pad and len(node.args) == 2)
    if kind in PASSED or zeros:
        return origins(node.all_input_nodes[0], modules, sums)
    if kind in (ATEN.add, ATEN.add_) and sums and len(node.all_input_nodes) == 2 and not node.kwargs:
        parts = [origins(n, modules, sums - 1) for n in node.all_input_nodes]
        return parts[0] + parts[1] if all(len(part) == 1 for part in parts) else ()
    return ()


def layer_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The quantized layer whose output (batched, channels along axis 1) `node` is, or None."""
    axes = 2 if node.target is ATEN.linear.default else CONVOLUTIONS.get(node.target)
    if axes is None or node.meta["val"].ndim != axes:
        return None
    name = owner_of(node)
    return name if isinstance(modules.get(name), QuantConv | QuantProduct) else None


def owner_of(node: fx.Node) -> str:
    """The innermost module that `node` comes from."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return list(stack.values())[-1][0]


def norm_of(node: fx.Node, buffers: Mapping[str, str]) -> str | None:
    """The module whose running statistics a `batch_norm` node reads; None for other nodes and batch statistics."""
    if node.target is not ATEN.batch_norm.default:
        return None
    mean, training = node.args[3], node.args[5]
    if training or not isinstance(mean, fx.Node) or mean.name not in buffers:
        return None
    return buffers[mean.name].rpartition(".")[0]


def readers(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names of the quantizers that read `node`, also behind operators that runtimes see through."""
    for user in node.users:
        if isinstance(modules.get(owner_of(user)), Mark):
            yield owner_of(user)
        elif getattr(user.target, "overloadpacket", None) in PASSED:
            yield from readers(user, modules)


def alone(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `readers` are all that reads `node`; the operators before them keep the order of numbers."""
    return bool(node.users) and all(
        isinstance(modules.get(owner_of(user)), Mark)
        or (getattr(user.target, "overloadpacket", None) in PASSED and alone(user, modules))
        for user in node.users
    )
