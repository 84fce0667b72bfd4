"""Batch norm in training and what follows it (an addition, relu, quantization) as one pass each way: `norm.c`."""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitwright.kernels.build import library
from bitwright.kernels.fused import make_call, space
from bitwright.kernels.pool import empty_like
from bitwright.kernels.steady import steady

# Channels that the kernels have room for where channels lie innermost.
WIDEST = 4096


class CNorm(ctypes.Structure):
    """`Norm` of norm.c."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("weight", "bias", "mean", "invstd", "running_mean", "running_var")),
        *((n, ctypes.c_double) for n in ("eps", "momentum")),
        *((n, ctypes.c_int64) for n in ("samples", "channels", "columns", "last", "relu", "threads")),
    )


class Norm(NamedTuple):
    """A batch norm of one batch: per channel its gain and bias (parameters), the batch's mean and 1 / deviation.

    All of shape (channels,), float32, contiguous.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor


def make_norm(
    x: Tensor, norm: Norm, relu: bool = False, running: tuple[Tensor, Tensor] | None = None, *numbers: float
) -> CNorm:
    """The C structure, which points into its arguments; x: (samples, channels, ...), numbers: eps, momentum."""
    pointers = (t.data_ptr() for t in (*norm, *(running or ())))
    samples, channels = x.shape[:2]
    sizes = (samples, channels, x.numel() // (samples * channels), not x.is_contiguous())
    return CNorm(*(*pointers, None, None)[:6], *(numbers or (0.0, 0.0)), *sizes, relu, torch.get_num_threads())


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Any:
    """The C function `name` for an element type."""
    function = getattr(library(), f"{name}_{'f32' if dtype == torch.float32 else 'bf16'}")
    others = {"statistics": 1, "forward_norm": 5, "backward_norm": 11}[name]
    function.argtypes = [ctypes.POINTER(CNorm), *[ctypes.c_void_p] * others]
    return function


def quantized(x: Tensor, quantizer: tuple[Any, ...] | None) -> Any:
    """A pointer to the C structure of a quantizer of tensors like `x`, or None."""
    return None if quantizer is None else ctypes.byref(make_call(x, *quantizer))


def call(name: str, x: Tensor, *arguments: Any) -> None:
    """Run the C function `name` for `x`'s type; tensors are given by their addresses."""
    if kernel(name, x.dtype)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)):
        raise MemoryError(f"{name}: no room for partial sums")


def measure(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, eps: float, momentum: float
) -> Norm:
    """The norm of a batch; moves `running` (mean, variance), if any, by the share `momentum` as torch does.

    x: float32 or bfloat16 on the CPU, (samples, channels, ...), at least two values per channel; contiguous, or
        channels last with at most `WIDEST` channels.

    Raises:
        MemoryError: there is no room for partial sums; so do `forward` and `backward`.
    """
    norm = Norm(steady(weight), steady(bias), torch.empty_like(weight), torch.empty_like(weight))
    call("statistics", x, make_norm(x, norm, False, running, eps, momentum), x)
    if running:
        torch.autograd.graph.increment_version(running)
    return norm


def forward(
    x: Tensor, norm: Norm, other: Tensor | None, relu: bool, quantizer: tuple[Any, ...] | None, keep: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(z, y): z = norm(x), plus `other`, relu if asked for; y = z quantized. All shaped, laid out and typed as `x`.

    quantizer: the arguments of `bitwright::fake_quantize` behind its first, with one scale, and maybe a `Form`; None:
        y is None.
    keep: whether z is wanted; else it is None.
    """
    z = torch.empty_like(x) if keep else None
    y, made = space(x, quantizer) if quantizer else (None, None)
    call("forward_norm", x, make_norm(x, norm, relu), quantized(x, quantizer), x, other, z, y)
    return z, made and made()


class Gradients(NamedTuple):
    """Of the loss in x, in what was added (and z before relu), in gain, bias, scale and zeros."""

    x: Tensor
    other: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    zeros: Tensor | None = None


def backward(
    gy: Tensor | None,
    gz: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    norm: Norm,
    relu: bool,
    quantizer: tuple[Any, ...] | None,
) -> Gradients:
    """The gradients of `forward` for those of y (None without a quantizer) and of z (None: nothing reads it).

    z: the values, if something was added; None: made again from x.
    """
    like: list[Tensor | None] = [None if g is None else dense_as(g, x) for g in (gy, gz)]
    dx = empty_like(x)
    other = None if z is None else empty_like(x)
    dweight, dbias = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
    dscale = None if quantizer is None else torch.empty_like(quantizer[0])
    dzeros = None if quantizer is None or quantizer[1] is None else torch.empty_like(quantizer[1])
    tensors = (*like, x, z, dx if other is None else other, dx, dweight, dbias, dscale, dzeros)
    call("backward_norm", x, make_norm(x, norm, relu), quantized(x, quantizer), *tensors)
    return Gradients(dx, other, dweight, dbias, dscale, dzeros)


def dense_as(g: Tensor, x: Tensor) -> Tensor:
    """`g` with the strides and the type of `x`."""
    return g if g.stride() == x.stride() and g.dtype == x.dtype else torch.empty_like(x).copy_(g)
