"""GELU that waits for its quantizer: what the quantizer would read is neither written nor kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitwright.kernels import gelu as gelus
from bitwright.kernels.deferred import Deferred, Pending
from bitwright.kernels.fused import lasting
from bitwright.kernels.sources import GeluSource, remember


class PendingGelu(Pending):
    """gelu(x)."""

    def compute(self) -> Tensor:
        with torch.no_grad():
            return F.gelu(self.x)

    def quantize(self, t: Deferred, *quantizer: Any) -> Tensor | None:
        if not torch.is_grad_enabled():
            return gelus.forward(self.x, *quantizer)
        made = Gelu.apply(self.x, *quantizer)  # pyright: ignore
        return remember(made, GeluSource(self.x, lasting(quantizer)))


class Gelu(torch.autograd.Function):
    """GELU: deferred, or with the further arguments of `bitwright::fake_quantize` quantized.

    A quantizer's node is one beside that of the deferred tensor, which has the gradients of other readers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *quantizer: Any) -> Tensor:
        ctx.save_for_backward(x, *quantizer[:7])
        ctx.numbers = quantizer[7:]
        if quantizer:
            return gelus.forward(x, *quantizer)
        pending = PendingGelu(x)
        pending.tracked = True  # by this node
        return Deferred(pending)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *tensors = ctx.saved_tensors
        if not ctx.numbers:
            return torch.ops.aten.gelu_backward.default(g, x)
        grads = gelus.backward(g, x, *tensors, *ctx.numbers)
        return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


def gelu(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu`, deferred; `x`: see `bitwright.kernels.gelu.forward`."""
    return Gelu.apply(x) if torch.is_grad_enabled() else Deferred(PendingGelu(x))  # pyright: ignore
