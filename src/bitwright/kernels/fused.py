"""Fused fake quantization on the CPU as a registered operator: `bitwright::fake_quantize`."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.build import library

BLOCK = 16384  # elements per partial sum, as in fused.c

RULES = {"clipped_ste": 0, "ewgs": 1, "ste": 2}


def layout(x: Tensor, channels: int) -> tuple[int, int]:
    """(rows, columns) for the kernels: one row per scale, or one row in all."""
    return (channels, x.numel() // channels) if channels > 1 else (1, x.numel())


def kernel(direction: str, dtype: torch.dtype) -> Any:
    """The C function for a direction and an element type."""
    found = library()
    assert found is not None
    return getattr(found, f"{direction}_{'f32' if dtype == torch.float32 else 'bf16'}")


def pointer(t: Tensor) -> ctypes.c_void_p:
    """The address of the first element."""
    return ctypes.c_void_p(t.data_ptr())


# Plain registrations: `torch.library.custom_op` adds Python checks to every call, which small tensors feel.
LIBRARY = torch.library.Library("bitwright", "DEF")
ARGUMENTS = "Tensor x, Tensor scale, float zero, Tensor lo, Tensor hi, Tensor delta, int rule"
LIBRARY.define(f"fake_quantize({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"fake_quantize_backward(Tensor g, {ARGUMENTS}) -> (Tensor, Tensor)")


def forward_cpu(x: Tensor, scale: Tensor, zero: float, lo: Tensor, hi: Tensor, delta: Tensor, rule: int) -> Tensor:
    """(round(clip(x / scale + zero, lo, hi)) - zero) * scale; see `bitwright.kernels.fake_quantize`.

    Args:
        x: float32 or bfloat16, not empty, dense with axis 0 outermost (contiguous or
            channels_last). scale: (1,) or (x.shape[0],), float32.
        lo, hi, delta: (1,) float32; delta is the strength of the EWGS rule. rule: a value of `RULES`.
    """
    y = torch.empty_like(x)
    rows, columns = layout(x, scale.numel())
    scale = scale.contiguous()
    numbers = (ctypes.c_float(zero), ctypes.c_float(lo.item()), ctypes.c_float(hi.item()))
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(rows), ctypes.c_int64(columns))
    threads = ctypes.c_int(torch.get_num_threads())
    kernel("forward", x.dtype)(pointer(x), pointer(y), pointer(scale), *numbers, *sizes, threads)
    return y


def backward_cpu(
    g: Tensor, x: Tensor, scale: Tensor, zero: float, lo: Tensor, hi: Tensor, delta: Tensor, rule: int
) -> tuple[Tensor, Tensor]:
    """Gradients (dx like `x`, dscale like `scale`) for the gradient `g` of the output, any strides."""
    if g.stride() != x.stride() or g.dtype != x.dtype:
        g = torch.empty_like(x).copy_(g)
    dx = torch.empty_like(x)
    rows, columns = layout(x, scale.numel())
    scale = scale.contiguous()
    parts = torch.empty(rows, -(-columns // BLOCK), dtype=torch.float64)
    numbers = (ctypes.c_float(zero), ctypes.c_float(lo.item()), ctypes.c_float(hi.item()))
    how = (ctypes.c_int(rule), ctypes.c_float(delta.item()))
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(rows), ctypes.c_int64(columns))
    threads = ctypes.c_int(torch.get_num_threads())
    tensors = (pointer(g), pointer(x), pointer(dx), pointer(parts), pointer(scale))
    kernel("backward", x.dtype)(*tensors, *numbers, *how, *sizes, threads)
    return dx, parts.sum(1).to(scale.dtype)


LIBRARY.impl("fake_quantize", forward_cpu, "CPU")
LIBRARY.impl("fake_quantize_backward", backward_cpu, "CPU")
LIBRARY.impl("fake_quantize", lambda x, *_: torch.empty_like(x), "Meta")
LIBRARY.impl("fake_quantize_backward", lambda g, x, s, *_: (torch.empty_like(x), torch.empty_like(s)), "Meta")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass needs: nothing beyond the operator's own inputs."""
    x, scale, ctx.zero, lo, hi, delta, ctx.rule = inputs
    ctx.save_for_backward(x, scale, lo, hi, delta)


def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and scale."""
    x, scale, lo, hi, delta = ctx.saved_tensors
    grads = torch.ops.bitwright.fake_quantize_backward(g, x, scale, ctx.zero, lo, hi, delta, ctx.rule)
    return (*grads, None, None, None, None, None)


torch.library.register_autograd("bitwright::fake_quantize", backward, setup_context=setup_context, lib=LIBRARY)
