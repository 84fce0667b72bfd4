"""Fused fake quantization on the CPU as a registered operator: `bitwright::fake_quantize`."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.build import library
from bitwright.kernels.pool import empty_like

RULES = {"clipped_ste": 0, "ste": 1, "ewgs": 2, "scalar": 3, "constant": 4, "dsq": 5}


class Call(ctypes.Structure):
    """`Call` of fused.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "zeros", "lo", "hi", "strength", "rate", "seed")),
        ("zero", ctypes.c_double),
        *((n, ctypes.c_int64) for n in ("rows", "channels", "columns", "count", "rule", "replaced_only", "threads")),
    )


def address(t: Tensor | None) -> int | None:
    """The address of the first element; None (a null pointer) without a tensor."""
    return None if t is None else t.data_ptr()


# Plain registrations: `torch.library.custom_op` adds Python checks to every call, which small tensors feel.
LIBRARY = torch.library.Library("bitwright", "DEF")
ARGUMENTS = (
    "Tensor x, Tensor scale, Tensor? zeros, Tensor lo, Tensor hi, Tensor? strength, Tensor? rate, Tensor? seed, "
    "float zero, int axis, int count, int rule, bool replaced_only"
)
LIBRARY.define(f"fake_quantize({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"fake_quantize_backward(Tensor g, {ARGUMENTS}) -> (Tensor, Tensor, Tensor?)")


def make_call(
    x: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    lo: Tensor,
    hi: Tensor,
    strength: Tensor | None,
    rate: Tensor | None,
    seed: Tensor | None,
    zero: float,
    axis: int,
    count: int,
    rule: int,
    replaced_only: bool,
) -> Call:
    """The C structure for an operator's arguments; it points into them and does not keep them.

    x: float32 or bfloat16, not empty, dense, with `axis` and the axes before it outermost in memory. scale and
    zeros: both (1,) or both (x.shape[axis],), contiguous. All but x and seed (int64) are float32.
    Further: `reference.fake_quantize` and `KernelRule`.
    """
    channels, columns = scale.numel(), x.numel()
    if channels > 1:
        outer = axis + 1 if axis >= 0 else x.ndim + axis + 1
        columns = x.numel() // x.shape[:outer].numel()
    pointers = (address(t) for t in (scale, zeros, lo, hi, strength, rate, seed))
    sizes = (x.numel() // columns, channels, columns, count, rule, replaced_only)
    return Call(*pointers, zero, *sizes, torch.get_num_threads())


def kernel(direction: str, dtype: torch.dtype) -> Any:
    """The C function for a direction and an element type."""
    found = library()
    assert found is not None
    return getattr(found, f"{direction}_{'f32' if dtype == torch.float32 else 'bf16'}")


def forward_cpu(x: Tensor, *arguments: Any) -> Tensor:
    """The quantized tensor, laid out as `x`; arguments: see `make_call`."""
    y = empty_like(x)
    kernel("forward", x.dtype)(
        ctypes.byref(make_call(x, *arguments)), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    )
    return y


def backward_cpu(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (dx like `x`, dscale like `scale`, dzeros like `zeros`) for the gradient `g` of the output.

    Raises:
        MemoryError: there is no room for the partial sums.
    """
    if g.stride() != x.stride() or g.dtype != x.dtype:
        g = torch.empty_like(x).copy_(g)
    scale, zeros = arguments[0], arguments[1]
    dx, dscale = empty_like(x), torch.empty_like(scale)
    dzeros = None if zeros is None else torch.empty_like(scale)
    tensors = [ctypes.c_void_p(address(t)) for t in (g, x, dx, dscale, dzeros)]
    if kernel("backward", x.dtype)(ctypes.byref(make_call(x, *arguments)), *tensors):
        raise MemoryError("fake_quantize_backward: no room for partial sums")
    return dx, dscale, dzeros


def backward_meta(g: Tensor, x: Tensor, scale: Tensor, zeros: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Shapes of the backward operator's results."""
    return torch.empty_like(x), torch.empty_like(scale), None if zeros is None else torch.empty_like(zeros)


LIBRARY.impl("fake_quantize", forward_cpu, "CPU")
LIBRARY.impl("fake_quantize_backward", backward_cpu, "CPU")
LIBRARY.impl("fake_quantize", lambda x, *_: torch.empty_like(x), "Meta")
LIBRARY.impl("fake_quantize_backward", backward_meta, "Meta")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass needs: nothing beyond the operator's own inputs."""
    ctx.save_for_backward(*inputs[:8])
    ctx.numbers = inputs[8:]


def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale and zeros."""
    grads = torch.ops.bitwright.fake_quantize_backward(g, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * 10)


torch.library.register_autograd("bitwright::fake_quantize", backward, setup_context=setup_context, lib=LIBRARY)
