"""GELU and the quantization behind it as one pass each way: `gelu.c`."""

from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.fused import kernel, make_call, space
from bitwright.kernels.norm import dense_as
from bitwright.kernels.pool import empty_like


def forward(x: Tensor, *quantizer: Any) -> Tensor:
    """gelu(x) quantized; shaped, laid out and typed as `x`.

    x: float32 or bfloat16 on the CPU, dense. quantizer: the arguments of `bitwright::fake_quantize` behind its first,
    with one scale, and maybe a `Form`.
    """
    y, made = space(x, quantizer)
    kernel("forward_gelu", x.dtype)(make_call(x, *quantizer), x.data_ptr(), y.data_ptr())
    return made()


def backward(g: Tensor, x: Tensor, *quantizer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients in x, scale and zeros for the gradient `g` of `forward`'s result.

    Raises:
        MemoryError: there is no room for partial sums.
    """
    scale, zeros = quantizer[:2]
    dx, dscale, dzeros = empty_like(x), torch.empty_like(scale), None if zeros is None else torch.empty_like(zeros)
    g = dense_as(g, x)
    addresses = (None if t is None else t.data_ptr() for t in (g, x, dx, dscale, dzeros))
    if kernel("backward_gelu", x.dtype)(make_call(x, *quantizer), *addresses):
        raise MemoryError("backward_gelu: no room for partial sums")
    return dx, dscale, dzeros
