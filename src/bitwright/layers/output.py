"""Output quantizers: any module's output on a grid, by a forward hook; and inputs that share one."""

from typing import Any

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.quantizer import Quantizer

OUTPUT = "output_quantizer"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def quantize_output(module: nn.Module, args: Any, output: Any) -> Tensor:
    """The forward hook of every module with an output quantizer.

    One function for all: copies, pickles, compilers and exporters find it by name, and the quantizer as a child.
    """
    del args
    if not isinstance(output, Tensor):
        raise BitwrightError(
            f"the output of a {type(module).__name__} is a {type(output).__name__}; "
            "only single tensors have an output quantizer"
        )
    return module.get_submodule(OUTPUT)(output)


class SharedInput(nn.Module):
    """Stands in a layer's input slot where the input has the codes of an output quantizer already; does nothing.

    Attributes:
        source: that quantizer, which is the child of another module and not of this one: it is in the state dict, in
            the optimizer and in tables once. A copy of the whole model keeps the reference.
    """

    source: Quantizer

    def __init__(self, source: Quantizer):
        super().__init__()
        self.__dict__["source"] = source

    def forward(self, x: Tensor) -> Tensor:
        return x


def quantizer_in(layer: nn.Module, slot: str) -> Quantizer | None:
    """The quantizer that `slot` of a layer holds or refers to; None where that tensor is float."""
    found = getattr(layer, slot, None)
    if isinstance(found, SharedInput):
        return found.source
    return found if isinstance(found, Quantizer) else None


def attach_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Give `module` an output quantizer, or replace the one it has."""
    if not has_output(module):
        module.register_forward_hook(quantize_output)
    module.add_module(OUTPUT, quantizer)


def detach_output(module: nn.Module) -> None:
    """Undo `attach_output`; of no effect on a module without an output quantizer."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is quantize_output:
            del module._forward_hooks[key]
    module._modules.pop(OUTPUT, None)


LOST = (
    "its output quantizer is not called: the module was replaced after prepare, as convert_sync_batchnorm does; "
    "convert first, then prepare"
)


def lost_hooks(model: nn.Module) -> list[str]:
    """Names of modules that have an output quantizer, but not the hook that calls it."""
    found = [(n, m) for n, m in model.named_modules() if has_output(m)]
    return [n for n, m in found if quantize_output not in m._forward_hooks.values()]


def takes_output(module: nn.Module) -> bool:
    """Whether `module` may have an output quantizer; containers run whatever child they have."""
    return not isinstance(module, CONTAINERS)


def has_output(module: nn.Module) -> bool:
    """Whether `module` has an output quantizer."""
    return module._modules.get(OUTPUT) is not None
