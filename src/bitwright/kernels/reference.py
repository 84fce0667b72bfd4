"""Fake quantization in plain torch: traceable, exportable, twice differentiable, on any device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]

# Added to |scale|: keeps every learned scale positive whatever an optimizer does, without changing any usual float.
EPS = 1e-12

WORD = 0xFFFFFFFF


class KernelRule(NamedTuple):
    """An estimator in the fused kernels' terms: how the gradient g of the codes k = round(c) becomes that of v.

    name: "clipped_ste": g inside the range. "ste": the same for the scale, and x gets g everywhere. "ewgs":
        g + strength |g| e, e = (c - k) / (hi - lo). "scalar": g + strength mean|g| e. "constant": g + strength e /
        (hi - lo). "dsq": g times the slope of DSQ's soft staircase of characteristic `strength`.
    strength: shape (1,), float32; None where the rule has none.
    rate: shape (1,), float32: the share of elements that are rounded at all (`random_mask`); None: every element.
    replaced_only: whether e is 0 for elements that were not rounded.
    """

    name: str
    strength: Tensor | None = None
    rate: Tensor | None = None
    replaced_only: bool = False


def draw_seed(device: torch.device) -> Tensor:
    """A seed of shape (1,), int64, for `random_mask`: one number of torch's global generator of that device."""
    return torch.randint(2**62, (1,), device=device)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (int64 tensor) that spreads every bit over all: T. Mueller's integer hash.

    Its constant has 27 bits, so that no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & WORD
    x = ((x ^ (x >> 16)) * 0x045D9F3B) & WORD
    return x ^ (x >> 16)


def random_mask(like: Tensor, rate: Tensor, seed: Tensor) -> Tensor:
    """Bernoulli(rate) per element of `like`, bool: u < rate for u = (h >> 8) / 2^24, h = mix(mix(i + low) ^ high).

    i counts the elements as they lie in memory (of a dense tensor; otherwise in logical order), low and high are the
    halves of `seed` (`draw_seed`). A mask is thus made again from eight bytes, in any order and by every home.
    """
    i = torch.arange(like.numel(), device=like.device)
    dense = like.is_contiguous() or (like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last))
    i = i.as_strided(like.shape, like.stride()) if dense else i.view(like.shape)
    h = mix(mix((i + (seed & WORD)) & WORD) ^ (seed >> 32))
    return (h >> 8).float() * 2.0**-24 < rate


def scale_gradient(scale: Tensor, factor: Tensor) -> Tensor:
    """The same values to the last bit, with the gradient multiplied by `factor`."""
    frozen = scale.detach()
    return (scale - frozen) * factor + frozen


def along(t: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector of shape (channels,) viewed so that it lies along `axis` of `x`; one of shape (1,) as it is."""
    if t.numel() == 1:
        return t
    view = [1] * x.ndim
    view[axis] = -1
    return t.view(view)


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

    Args:
        x: any shape, floating point.
        scale: (1,) or (x.shape[axis],): distance between neighbouring values, positive.
        zero: the (possibly fractional) code of the value 0, shaped as `scale`; a plain 0.0 costs nothing.
        lo, hi: shape (1,): smallest and largest code.
        rounding: an estimator: `(v, lo, hi) -> k` with `v = x / scale + zero`; its gradient is the estimator's.
        axis: along which several scales lie.
        count: 0: `scale` is used as it is. Otherwise it is a learned parameter of LSQ that `count` elements share:
            |scale| + EPS is used, and the parameter's gradient is multiplied by 1 / sqrt(count * hi).

    Returns:
        The shape of `x`. With the clipped straight-through estimator the gradients are LSQ's (Esser 2020, eq. 3):
        dx = 1 inside and 0 outside; dscale = k - v inside and k - zero outside.
    """
    if count:
        scale = scale.abs() + EPS
        if scale.requires_grad:
            scale = scale_gradient(scale, (count * hi).rsqrt())
    scale = along(scale, x, axis)
    v = x / scale
    has_zero = isinstance(zero, Tensor) or zero != 0.0
    if has_zero:
        zero = along(zero, x, axis) if isinstance(zero, Tensor) else zero
        v = v + zero
    k = rounding(v, lo, hi)
    y = (k - zero) * scale if has_zero else k * scale
    if getattr(rounding, "through_clip", False):
        # The gradient of x passes the clip as well, while the scale keeps the gradient of the clipped form:
        # letting it through v = x / scale would push the scale away from the values that it clips.
        outside = ((v < lo) | (v > hi)).to(x.dtype)
        largest = torch.finfo(x.dtype).max  # an infinite x minus itself would be NaN
        finite = x.clamp(-largest, largest)
        y = y + (finite - finite.detach()) * outside
    # Under autocast the scale is float32 and `x` may be bfloat16: the next layer would narrow `y` anyway.
    return y if y.dtype == x.dtype else y.to(x.dtype)
