"""Fake quantization in plain torch: traceable, exportable, twice differentiable."""

from collections.abc import Callable

from torch import Tensor

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | float, lo: Tensor, hi: Tensor, rounding: Rounding) -> Tensor:
    """Move `x` to the nearest of the values (k - zero) * scale, k an integer in [lo, hi].

    Args:
        x: any shape, floating point.
        scale: distance between neighbouring values, positive, broadcastable to `x`.
        zero: the (possibly fractional) code of the value 0; a plain 0.0 costs nothing.
        lo, hi: shape (1,): smallest and largest code.
        rounding: an estimator: `(v, lo, hi) -> k` with `v = x / scale + zero`; its gradient is the estimator's.

    Returns:
        The shape of `x`. With the clipped straight-through estimator the gradients are LSQ's (Esser 2020, eq. 3):
        dx = 1 inside and 0 outside; dscale = k - v inside and k - zero outside.
    """
    v = x / scale
    has_zero = isinstance(zero, Tensor) or zero != 0.0
    if has_zero:
        v = v + zero
    k = rounding(v, lo, hi)
    y = (k - zero) * scale if has_zero else k * scale
    if getattr(rounding, "through_clip", False):
        # The gradient of x passes the clip as well, while the scale keeps the gradient of the clipped form:
        # letting it through v = x / scale would push the scale away from the values that it clips.
        outside = ((v < lo) | (v > hi)).to(x.dtype)
        y = y + (x - x.detach()) * outside
    # Under autocast the scale is float32 and `x` may be bfloat16: the next layer would narrow `y` anyway.
    return y if y.dtype == x.dtype else y.to(x.dtype)
