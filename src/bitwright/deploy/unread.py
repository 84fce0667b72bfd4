"""Layers and quantizers that run without effect on any output, as heads that only training reads; files lack them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import Inputs, outputs_of
from bitwright.prepare import quant_layers, quantizers


def unread(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of quantizers and quantized layers of `model` (in evaluation mode) that no output is computed from.

    Their results get a zero added, and the outputs are asked for its gradient. Where an output has no gradient at all,
    as indices have none, or the network cannot be differentiated, nothing is said to be unread.
    """
    with torch.enable_grad(), zeros_added(model) as zeros:
        try:
            outputs = [*outputs_of(inputs.run(model), "verify").values()]
            if not zeros or not all(t.requires_grad for t in outputs):
                return set()
            found = torch.autograd.grad([t.sum() for t in outputs], [*zeros.values()], allow_unused=True)
        except RuntimeError:  # an operator without a backward pass, or one that writes over what it would need
            return set()
    return {name for name, gradient in zip(zeros, found, strict=True) if gradient is None}


@contextmanager
def zeros_added(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The zeros by the name of what they were added to, filled as the model runs."""
    zeros: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: nn.Module, _args: Any, y: Any) -> Tensor | None:
            if not isinstance(y, Tensor) or not y.is_floating_point():
                return None
            zero = zeros.setdefault(name, torch.zeros((), requires_grad=True, device=y.device))
            return y + zero.to(y.dtype)

        return add

    handles = [m.register_forward_hook(hook(n)) for n, m in {**quantizers(model), **quant_layers(model)}.items()]
    try:
        yield zeros
    finally:
        for handle in handles:
            handle.remove()
