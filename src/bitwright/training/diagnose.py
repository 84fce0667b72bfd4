"""Where a network first stopped being finite."""

import torch
from torch import Tensor, nn

from bitwright.quantizer import Quantizer


class Diverged(Exception):  # noqa: N818
    """The loss or the weights are no longer finite; the command line exits with 1."""

    exit_code = 1


def bad_tensor(name: str, tensor: Tensor) -> str | None:
    """`"NAME holds nan in k of n values"`, or None where every value is finite."""
    if not tensor.is_floating_point():
        return None
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count == 0:
        return None
    kind = "nan" if bool(torch.isnan(tensor).any()) else "infinity"
    return f"{name} holds {kind} in {count} of {tensor.numel()} values"


def first_bad_tensor(model: nn.Module) -> str | None:
    """The first parameter or buffer, in the order of definition, that is not finite."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((found for name, tensor in named if (found := bad_tensor(name, tensor.detach()))), None)


@torch.no_grad()
def first_bad_layer(model: nn.Module, x: Tensor) -> str | None:
    """The first place, in the order of execution, where a forward pass of `x` stops being finite.

    Modules without children are looked at one by one: their parameters (a quantizer's scale, a layer's weight), then
    their outputs. The model runs in its present mode; norm statistics move.
    """
    found = [problem] if (problem := bad_tensor("the input batch", x)) else []

    def look(problem: str | None) -> None:
        if problem and not found:
            found.append(problem)

    def before(name: str, module: nn.Module) -> None:
        for key, tensor in module.named_parameters(recurse=isinstance(module, Quantizer)):
            look(bad_tensor(f"{name}.{key}" if name else key, tensor))

    def after(name: str, module: nn.Module, output: object) -> None:
        kind = "quantizer" if isinstance(module, Quantizer) else type(module).__name__
        if isinstance(output, Tensor):
            look(bad_tensor(f"the output of {name or 'the model'} ({kind})", output))

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _, n=name: before(n, m)))
        hooks.append(module.register_forward_hook(lambda m, _, out, n=name: after(n, m, out)))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
