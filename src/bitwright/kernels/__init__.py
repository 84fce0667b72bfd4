"""Fake quantization as functions: the one place where rounding happens during training.

One signature, several homes: `reference` (plain torch: any device, traceable, twice differentiable; compilers and
exporters see this one) and `fused` (C, for eager float32 and bfloat16 on the CPU).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitwright.kernels import reference
from bitwright.kernels.reference import Rounding
from bitwright.kernels.sources import Source, keep_sources, remember

__all__ = ["Rounding", "fake_quantize", "fused_available", "keep_sources", "reference_only"]

_reference_depth = 0


@contextmanager
def reference_only() -> Iterator[None]:
    """Use the reference for a while: for second derivatives, which the fused kernels do not have."""
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


def fused_available() -> bool:
    """Whether the fused CPU kernels could be built here (the first call builds them)."""
    from bitwright.kernels.build import library

    return library() is not None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | float, lo: Tensor, hi: Tensor, rounding: Rounding) -> Tensor:
    """Move `x` to the nearest of the values (k - zero) * scale, k an integer in [lo, hi].

    Args and result: see `bitwright.kernels.reference.fake_quantize`, whose values every home equals to the last bit
    and whose gradients it equals to rounding.
    """
    if takes_fused(x, scale, zero, rounding) and fused_available():
        from bitwright.kernels import fused

        delta = rounding.delta if isinstance(getattr(rounding, "delta", None), Tensor) else lo
        rule = fused.RULES[getattr(rounding, "kernel_rule")]  # noqa: B009
        scale = scale.reshape(-1)
        y = torch.ops.bitwright.fake_quantize(x, scale, zero, lo, hi, delta, rule)
        return remember(y, Source(x.detach(), scale.detach(), float(zero), lo, hi, delta, rule))
    return reference.fake_quantize(x, scale, zero, lo, hi, rounding)


def takes_fused(x: Tensor, scale: Tensor, zero: Tensor | float, rounding: Rounding) -> bool:
    """Whether the fused kernels cover this call."""
    return (
        getattr(rounding, "kernel_rule", None) is not None
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and scale.dtype == torch.float32
        and not isinstance(zero, Tensor)
        and not torch.compiler.is_compiling()
        and _reference_depth == 0
        and x.numel() > 0
        and (scale.numel() == 1 or (scale.ndim == x.ndim and scale.numel() == scale.shape[0] == x.shape[0]))
        and (x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)))
    )
