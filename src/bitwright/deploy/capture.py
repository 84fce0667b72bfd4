"""Which BatchNorm follows which layer, read from the captured graph: names and definition order say nothing."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from bitwright.errors import BitwrightError
from bitwright.layers import QuantConv1d, QuantConv2d, QuantLinear
from bitwright.prepare import quantizers, set_bypass

ATEN = torch.ops.aten
CONVOLUTIONS = {ATEN.conv1d.default: 3, ATEN.conv2d.default: 4, ATEN.conv1d.padding: 3, ATEN.conv2d.padding: 4}


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch's exporters warn about their own internals; none of it is the user's doing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, for messages that must be one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_plain_norm(module: nn.Module) -> bool:
    """Whether `module` normalises and does nothing else, or is timm's norm with `drop` and `act` behind it."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    timm_norm = type(module).__module__.startswith("timm.") and type(module).__name__ == "BatchNormAct2d"
    return type(module) in plain or timm_norm


def without_norm(module: nn.Module) -> nn.Module:
    """What is left of a norm that was folded: its activation, if it had one."""
    if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm) or type(module) is nn.BatchNorm2d:
        return nn.Identity()
    return nn.Sequential(module.drop, module.act)  # pyright: ignore[reportArgumentType]


def norm_pairs(model: nn.Module, example: Tensor) -> dict[str, str]:
    """{layer name: BatchNorm name}: norms that alone read the output of a convolution or linear layer.

    Both must be called exactly once, and the norm must run on its stored statistics along the layer's output
    channels. Everything else stays float in the deployed network.

    Args:
        model: prepared; it is not changed.
        example: one input batch.

    Raises:
        BitwrightError: `torch.export` cannot capture the model.
    """
    twin = copy.deepcopy(model).eval()
    set_bypass(quantizers(twin).values(), True)  # the float graph has the same layers and far fewer nodes
    try:
        with quiet_export(), torch.no_grad():
            program = torch.export.export(twin, (example,), strict=False)
    except Exception as error:
        raise BitwrightError(f"{type(model).__name__}: torch.export cannot capture it: {first_line(error)}") from error
    modules = dict(twin.named_modules())
    buffers = program.graph_signature.inputs_to_buffers
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}
    for node in program.graph.nodes:
        owner = layer_of(node, modules)
        calls.update([owner] if owner else [])
        if node.target is ATEN.batch_norm.default:
            norm = norm_of(node, buffers)
            calls.update([norm] if norm else [])
            before = layer_of(node.args[0], modules)
            if norm and before and len(node.args[0].users) == 1 and is_plain_norm(modules[norm]):
                pairs[before] = norm
    return {layer: norm for layer, norm in pairs.items() if calls[layer] == 1 and calls[norm] == 1}


def layer_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The quantized layer whose output (batched, channels along axis 1) `node` is, or None."""
    axes = 2 if node.target is ATEN.linear.default else CONVOLUTIONS.get(node.target)
    stack = node.meta.get("nn_module_stack")
    if axes is None or not stack or node.meta["val"].ndim != axes:
        return None
    name = list(stack.values())[-1][0]
    return name if isinstance(modules.get(name), QuantConv1d | QuantConv2d | QuantLinear) else None


def norm_of(node: fx.Node, buffers: dict[str, str]) -> str | None:
    """The module whose running statistics a `batch_norm` node reads, or None if it uses the batch's own."""
    mean, training = node.args[3], node.args[5]
    if training or not isinstance(mean, fx.Node) or mean.name not in buffers:
        return None
    return buffers[mean.name].rpartition(".")[0]
