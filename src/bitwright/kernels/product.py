"""Linear layers in float32 on AMD's processors, where torch's choice (MKL) has no code for wide vectors: by oneDNN."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.kernels.fused import nobody_listens

SMALLEST = 1 << 18  # multiplications; oneDNN takes its time to begin


@functools.cache
def slow_mkl() -> bool:
    """Whether this is such a processor and such a torch."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply these, here and now: in training, as its sums round differently."""
    return (
        not torch.compiler.is_compiling()
        and slow_mkl()
        and torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= SMALLEST
        and nobody_listens(x)
        and nobody_listens(weight)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.get_float32_matmul_precision() == "highest"
    )


def rows_by_rows(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias for matrices of any strides."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")


def linear_gradients(g: Tensor, x: Tensor, weight: Tensor, wants: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of a linear layer in input, weight and bias, those that are wanted.

    g: (rows, out). x: (rows, in). weight: (out, in).
    """
    multiply = rows_by_rows if slow_mkl() and not torch.is_grad_enabled() else F.linear
    dx = multiply(g, weight.t()) if wants[0] else None
    dweight = multiply(g.t(), x.t()) if wants[1] else None
    return dx, dweight, g.sum(0) if wants[2] else None


class Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` of a matrix; twice differentiable, the second time by torch's own operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rows_by_rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return linear_gradients(g, x, weight, ctx.needs_input_grad)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, up to rounding."""
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # pyright: ignore[reportAssignmentType]
    # Outside: a view that a Function gives may not be written to.
    return y.view(*x.shape[:-1], -1) if x.ndim != 2 else y
