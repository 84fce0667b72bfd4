"""Fake quantization as functions: the one place where rounding happens during training.

One signature, several homes: `reference` (plain torch: any device, twice differentiable; exporters see this one),
`traced` (plain torch with written-out gradients, for compilers) and two for eager training in float32, bfloat16 and
on GPUs float16: `fused` (C, on the CPU) and `gpu` (Triton).
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitwright.kernels import codes, deferred, fused, reference, traced
from bitwright.kernels.deferred import Deferred
from bitwright.kernels.norm import WIDEST
from bitwright.kernels.reference import EPS, KernelRule, Rounding, scale_gradient
from bitwright.kernels.sources import Source, keep_sources, noted, remember
from bitwright.kernels.steady import steady
from bitwright.kernels.twice import runs_twice

__all__ = [
    "EPS",
    "KernelRule",
    "Rounding",
    "fake_quantize",
    "fused_available",
    "keep_sources",
    "reference_only",
    "scale_gradient",
]

FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

logger = logging.getLogger("bitwright")

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


def fused_available(device: torch.device | str = "cpu") -> bool:
    """Whether the fused kernels of a device could be built here (the first call builds them, or says why not)."""
    return _fused_works(torch.device(device))


@functools.cache
def _fused_works(device: torch.device) -> bool:
    if device.type == "cpu":
        from bitwright.kernels.build import library

        return library() is not None
    if os.environ.get("BITWRIGHT_KERNELS", "") == "reference":
        return False
    try:
        from bitwright.kernels import gpu
    except ImportError:
        logger.warning("bitwright: plain torch quantizes on %s, several times slower: triton is not installed", device)
        return False
    return gpu.works(device)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    lo: Tensor,
    hi: Tensor,
    rounding: Rounding,
    axis: int = 0,
    count: int = 0,
) -> Tensor:
    """Move `x` to the nearest of the values (k - zero) * scale, k an integer in [lo, hi].

    Args and result: see `bitwright.kernels.reference.fake_quantize`, whose values every home equals to the last bit
    and whose gradients it equals to rounding.
    """
    rule = getattr(rounding, "kernel_rule", None)
    if rule is not None and fused_home(x, scale) and not is_dense(x) and fused_available(x.device):
        x = x.contiguous()  # one copy is cheaper than the reference's many
    compiled = takes_traced(rule)
    if rule is None or not (compiled or (takes_fused(x, scale, axis) and fused_available(x.device))):
        return reference.fake_quantize(x, scale, zero, lo, hi, rounding, axis, count)
    scale, zeros, constant = scale.contiguous(), None, 0.0
    if isinstance(zero, Tensor):
        zeros = (zero if zero.shape == scale.shape else zero.expand_as(scale)).contiguous()
    else:
        constant = float(zero)
    seed = None if rule.rate is None else reference.draw_seed(x.device)
    tensors = (x, scale, zeros, lo, hi, rule.strength, rule.rate, seed)
    if compiled:
        numbers = (constant, axis, count, rule.name, rule.replaced_only)
        return traced.traced_fake_quantize(*tensors, *numbers)
    numbers = (constant, axis, count, fused.RULES[rule.name], rule.replaced_only)
    fits = (zeros is None or zeros.numel() == 1) and (axis == 0 or scale.numel() == 1)
    fits = fits and not torch._C._len_torch_dispatch_stack()
    form = codes.form_of(lo, hi, constant if zeros is None else zeros, rule.rate) if fits else None
    asked = () if form is None else (form,)
    if isinstance(x, Deferred):
        y = deferred.quantize(x, *tensors[1:], *numbers, *asked)
        if y is not None:
            return y
        asked = ()
    with keep_sources(x):  # x may be quantized itself: the output of one quantizer, the input of another
        y = fused.quantize(*tensors, *numbers, *asked)
    return remember(y, Source(noted(x) or x, steady(scale), *tensors[2:], *numbers))


def takes_traced(rule: KernelRule | None) -> bool:
    """Whether torch.compile is reading this, and not an exporter, which wants torch's own operators."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and rule is not None and rule.name in traced.RULES


def takes_fused(x: Tensor, scale: Tensor, axis: int = 0) -> bool:
    """Whether the fused kernels cover such tensors, here and now."""
    return fused_home(x, scale) and is_dense(x) and (scale.numel() == 1 or in_rows(x, axis % x.ndim))


def fused_home(x: Tensor, scale: Tensor) -> bool:
    """Whether the fused kernels cover tensors of this kind, maybe in another layout."""
    return scale.dtype == torch.float32 and is_fused_kind(x)


def is_fused_kind(x: Tensor) -> bool:
    """Whether the fused kernels cover tensors like `x`, here and now, maybe in another layout."""
    return (
        type(x) in (Tensor, torch.nn.Parameter, Deferred)
        and x.dtype in FUSED_DTYPES.get(x.device.type, ())
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _reference_depth == 0
        and x.numel() > 0
    )


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` lie one after another, in an order that kernels know."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def may_wait(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a function of `x` in training mode may wait for its reader (`bitwright.kernels.deferred`)."""
    return (
        all(p is not None and p.dtype == torch.float32 for p in parameters)
        and x.device.type == "cpu"
        and type(x) is Tensor
        and (x.requires_grad or not torch.is_grad_enabled())
        and is_fused_kind(x)
        and is_dense(x)
        and not torch.is_inference_mode_enabled()
        and not runs_twice()
        and fused_available()
    )


def takes_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a batch norm of `x`, (samples, channels, ...), may wait."""
    return may_wait(x, weight, bias) and x.numel() > x.shape[1] and (x.is_contiguous() or x.shape[1] <= WIDEST)


def in_rows(x: Tensor, axis: int) -> bool:
    """Whether elements that share a scale lie in rows, long enough to be worth a loop."""
    return axis == 0 or (x.is_contiguous() and x.shape[axis + 1 :].numel() >= 8)
