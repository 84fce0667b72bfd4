"""The operators of `bitwright.kernels.fused` on GPUs, as Triton kernels. Triton comes with torch's GPU builds."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels import reference, traced, triton_source
from bitwright.kernels.fused import LIBRARY, RULES, geometry

# Elements per program: enough to fill the memory bus, few enough that a row of a weight is not mostly padding.
LARGEST_BLOCK, SMALLEST_BLOCK = 4096, 64
PARTS_A_PASS = 1024  # how many programs' parts of a channel's gradients are added at once, at most

logger = logging.getLogger("bitwright")


def blocks_of(columns: int) -> tuple[int, int, int]:
    """(elements per program, programs per row, warps)."""
    block = min(max(1 << (columns - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK)
    return block, -(-columns // block), min(max(block // 512, 1), 8)


def options(block: int, warps: int) -> dict[str, Any]:
    """How kernels are compiled: a * b + c in two roundings, as torch takes it."""
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """The quantized tensor, laid out as `x` (dense, not empty); arguments: see `fused.make_call`."""
    scale, zeros, lo, hi, _, rate, seed, zero, axis, count, _, _ = arguments
    y = torch.empty_like(x)
    rows, channels, columns = geometry(x, scale, axis)
    block, blocks, warps = blocks_of(columns)
    flags = {"LEARNED": count > 0, "ZEROS": zeros is not None, "MASKED": rate is not None}
    with on_device(x):
        triton_source.forward_kernel[(rows * blocks,)](
            *(x, y, scale, zeros, lo, hi, rate, seed, zero, channels, columns),
            **flags,
            **options(block, warps),
        )
    return y


def mean_gradient(g: Tensor, scale: Tensor, axis: int, count: int) -> Tensor:
    """Mean |g * scale| over the tensor, shape (), float32: what rule "scalar" multiplies the error by."""
    rows, channels, columns = geometry(g, scale, axis)
    flat = g.as_strided((rows // channels, channels, columns), (channels * columns, columns, 1))
    used = scale.abs() + reference.EPS if count else scale
    return (torch.linalg.vector_norm(flat, 1, dim=(0, 2), dtype=torch.float32) * used).sum() / g.numel()


def backward(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (dx like `x`, dscale like `scale`, dzeros like `zeros`) for the gradient `g` of the output."""
    scale, zeros, lo, hi, strength, rate, seed, zero, axis, count, rule, replaced_only = arguments
    if g.stride() != x.stride() or g.dtype != x.dtype:
        g = torch.empty_like(x).copy_(g)
    rows, channels, columns = geometry(x, scale, axis)
    block, blocks, warps = blocks_of(columns)
    programs = rows * blocks
    dx, dscale = torch.empty_like(x), torch.empty_like(scale)
    dzeros = None if zeros is None else torch.empty_like(scale)
    parts = torch.empty(programs if zeros is None else 2 * programs, dtype=torch.float32, device=x.device)
    mean = mean_gradient(g, scale, axis, count) if rule == RULES["scalar"] else None
    flags = {"LEARNED": count > 0, "ZEROS": zeros is not None}
    rules = {"MASKED": rate is not None, "RULE": rule, "REPLACED_ONLY": replaced_only}
    with on_device(x):
        triton_source.backward_kernel[(programs,)](
            *(g, x, dx, parts, scale, zeros, lo, hi, strength, rate, seed, mean, zero, channels, columns),
            **flags,
            **rules,
            **options(block, warps),
        )
        triton_source.finish_kernel[(channels,)](
            *(parts, dscale, dzeros, scale, hi, programs, channels, blocks, count),
            **flags,
            **options(min(max(1 << (programs // channels - 1).bit_length(), SMALLEST_BLOCK), PARTS_A_PASS), 4),
        )
    return dx, dscale, dzeros


LIBRARY.impl("fake_quantize", forward, "CUDA")
LIBRARY.impl("fake_quantize_backward", backward, "CUDA")


def works(device: torch.device) -> bool:
    """Whether the kernels compile for this device and agree there with plain torch; logs why not."""
    reason = self_check(device)
    if reason is not None:
        logger.warning("bitwright: plain torch quantizes on %s, several times slower: %s", device, reason)
    return reason is None


def self_check(device: torch.device) -> str | None:
    """One quantization and its gradients, as a learned weight's; what is wrong with them, in one line, or None."""
    numbers = torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(0))
    try:
        x, g = numbers.to(device).unbind()
        scale, lo, hi = (torch.tensor(v, device=device) for v in ([0.1, 0.2, -0.3], [-8.0], [7.0]))
        arguments = (scale, None, lo, hi, None, None, None, 0.0, 0, 700)
        ours = (forward(x, *arguments, 0, False), *backward(g, x, *arguments, 0, False)[:2])
        leaves = (x.requires_grad_(), scale.requires_grad_())
        y = traced.Traced.apply(*leaves, *arguments[1:], "clipped_ste", False)
        plain = (y, *torch.autograd.grad(y, leaves, g))  # pyright: ignore[reportCallIssue, reportArgumentType]
        wrong = [not torch.allclose(a, b, rtol=t, atol=t) for a, b, t in zip(ours, plain, (0, 0, 1e-3), strict=True)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return "its Triton kernels give other numbers" if any(wrong) else None
