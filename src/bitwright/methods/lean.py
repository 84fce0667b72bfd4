"""A frozen float network in the form that runs fastest: norms folded, memory laid out for the convolutions."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bitwright.layers.add import Add
from bitwright.methods.probe import unwrap

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ReLUInPlace(nn.ReLU):
    """Relu that writes over its input, and whose gradient lies in memory as the values do.

    Strided slices and poolings give contiguous gradients, which cost several times as much beside channels last.
    """

    def forward(self, input: Tensor) -> Tensor:
        y = F.relu(input, inplace=True)
        if y.requires_grad and is_channels_last(y):
            y.register_hook(channels_last)
        return y


class AddInPlace(Add):
    """a + b, written over a where it has room for that."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.add_(b) if (a.shape, a.dtype) == (b.shape, b.dtype) else a + b


IN_PLACE = {nn.ReLU: ReLUInPlace, Add: AddInPlace}


@torch.no_grad()
def lean_copy(model: nn.Module, x: Tensor, outputs: Callable[[nn.Module, Tensor], list[Any]]) -> nn.Module:
    """A copy of the frozen `model` in evaluation mode that computes the same, up to rounding, in less time.

    A batch norm that normalises just what a convolution puts out becomes part of that convolution's weight; relu and
    sums of what a convolution or a sum puts out are computed in place of it; on the CPU convolutions then run channels
    last. What one of these would change is left as it was: the outputs before and after are compared.

    Args:
        model: it stays as it is. Wrapped models (compiled, distributed) are given back uncopied.
        x: a few rows of input.
        outputs: `(model, x) -> list of tensors` that must not change.
    """
    if unwrap(model) is not model:
        return model
    made = copy.deepcopy(model).requires_grad_(False).eval()
    wanted = outputs(made, x)
    folded = copy.deepcopy(made)
    for conv, norm in pairs(folded, x, CONVOLUTIONS, NORMS):
        if folded.get_submodule(norm).running_mean is not None:
            put(folded, conv, fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm)))  # pyright: ignore
            put(folded, norm, nn.Identity())
    if alike(outputs(folded, x), wanted):
        made = folded.requires_grad_(False).eval()
    if x.device.type == "cpu":
        made = made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    writing = copy.deepcopy(made)
    for _, name in pairs(writing, x, (*CONVOLUTIONS, Add), tuple(IN_PLACE)):
        module = writing.get_submodule(name)
        module.__class__ = IN_PLACE[type(module)]
    return writing if alike(outputs(writing, x), wanted) and has_gradient(writing, x) else made


def has_gradient(model: nn.Module, x: Tensor) -> bool:
    """Whether gradients reach the input: nothing is written over that they need."""
    try:
        with torch.enable_grad():
            model(x.clone().requires_grad_()).sum().backward()
    except RuntimeError:
        return False
    return True


def is_channels_last(t: Tensor) -> bool:
    """Whether `t` lies in memory with its channels innermost."""
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def channels_last(t: Tensor) -> Tensor:
    """The same values with channels innermost."""
    return t.contiguous(memory_format=torch.channels_last)


def alike(outputs: list[Any], wanted: list[Any]) -> bool:
    """Whether two lists of outputs are the same up to rounding."""
    return all(close(a, b) for a, b in zip(outputs, wanted, strict=True))


def close(a: Any, b: Any) -> bool:
    """Whether two outputs are the same up to the rounding of another order of operations."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def pairs(
    model: nn.Module, x: Tensor, makers: tuple[type[nn.Module], ...], readers: tuple[type[nn.Module], ...]
) -> list[tuple[str, str]]:
    """(maker, reader) by name, of these types: the reader's first input is the maker's output itself; each ran once."""
    ran: list[str] = []
    made: dict[int, tuple[str, Tensor]] = {}  # the outputs are kept, so that no other tensor gets their identity
    found: list[tuple[str, str]] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            made[id(output)] = (name, output)

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            ran.append(name)
            if type(module) in readers and args and id(args[0]) in made:
                found.append((made[id(args[0])][0], name))

        return hook

    handles = []
    for name, module in model.named_modules():
        if type(module) in (*makers, *readers):
            handles.append(module.register_forward_pre_hook(before(name)))
        if type(module) in makers:
            handles.append(module.register_forward_hook(after(name)))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [(m, r) for m, r in found if ran.count(m) == ran.count(r) == 1]
