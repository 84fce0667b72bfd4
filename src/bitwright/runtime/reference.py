"""What every operator means, in numpy: the arbiter of the compiled kernels, and their substitute without a compiler.

Sums are exact: products of codes are added as float64, which holds every integer below 2^53, and kept as int64.
Scaling is float32, one rounding per operation, as written in `ops`.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bitwright.runtime.ops import (
    Add,
    AddFloat,
    Codes,
    Conv,
    Dequantize,
    MaxPool,
    Mean,
    Op,
    Quantize,
    Table,
    View,
    Window,
)


def rounded(v: NDArray, codes: Codes) -> NDArray[np.uint8]:
    """clip(round_half_even(v) + zero, lo, hi); NaN gives lo."""
    low, high = codes.lo - codes.zero, codes.hi - codes.zero
    inside = np.clip(np.where(np.isnan(v), np.float32(low), v), low, high)
    return (np.rint(inside) + codes.zero).astype(np.uint8)


def windows(x: NDArray, window: Window, fill: float) -> NDArray:
    """(N, rows, columns, C, kernel rows, kernel columns) views of an NHWC tensor padded with `fill`."""
    top, left, bottom, right = window.pads
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    (kh, kw), (dy, dx), (sy, sx) = window.kernel, window.dilations, window.strides
    views = sliding_window_view(x, (dy * (kh - 1) + 1, dx * (kw - 1) + 1), (1, 2))
    return views[:, ::sy, ::sx, :, ::dy, ::dx]


def conv_sums(op: Conv, x: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Exact sums, (N, rows, columns, out)."""
    views = windows(x.astype(np.float64) - op.x.zero, op.window, 0.0)
    n, rows, columns, _, kh, kw = views.shape
    out, per_group = op.weight.shape[:2]
    split = views.reshape(n, rows, columns, op.groups, per_group * kh * kw)
    weight = op.weight.astype(np.float64).reshape(op.groups, out // op.groups, -1)
    sums = np.einsum("nyxgk,gok->nyxgo", split, weight, optimize=True).reshape(n, rows, columns, out)
    return sums.astype(np.int64) + op.bias


def conv(op: Conv, x: NDArray[np.uint8]) -> NDArray:
    """Codes or floats, as `op.codes` says."""
    shape = op.shape(x.shape)
    v = conv_sums(op, x if x.ndim == 4 else x.reshape(-1, 1, 1, x.shape[-1])).astype(np.float32) * op.multiplier
    v = v.reshape(shape)
    if op.codes is not None:
        return rounded(v, op.codes)
    v = v if op.late_bias is None else v + op.late_bias
    return np.maximum(v, np.float32(0)) if op.relu else v


def add(op: Add, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of the sum."""
    ra, rb = op.ratios
    return rounded(
        (a.astype(np.float32) - np.float32(op.a.zero)) * ra + (b.astype(np.float32) - np.float32(op.b.zero)) * rb,
        op.codes,
    )


def mean(op: Mean, x: NDArray) -> NDArray[np.float32]:
    """(N, 1, 1, C) averages."""
    pixels = np.float32(x.shape[1] * x.shape[2])
    if op.codes is None:
        total = np.cumsum(x.reshape(x.shape[0], -1, x.shape[3]), 1, dtype=np.float32)[:, -1]
        return (total / pixels)[:, None, None]
    sums = (x.astype(np.int64) - op.codes.zero).sum((1, 2), keepdims=True)
    return sums.astype(np.float32) * np.float32(op.codes.scale) / pixels


def run(op: Op, x: NDArray, other: NDArray | None = None) -> NDArray:
    """The output of one operator."""
    if isinstance(op, Conv):
        return conv(op, x)
    if isinstance(op, Quantize):
        x = np.moveaxis(x, 1, 3) if op.planar else x
        with np.errstate(over="ignore"):
            return rounded(x / np.float32(op.codes.scale), op.codes)
    if isinstance(op, Dequantize):
        return (x.astype(np.float32) - np.float32(op.codes.zero)) * np.float32(op.codes.scale)
    if isinstance(op, View):
        return x.reshape(op.shape(x.shape))
    if isinstance(op, Table):
        return op.table[x]
    if isinstance(op, MaxPool):
        return windows(x, op.window, -np.inf if op.floats else 0).max((4, 5))
    if isinstance(op, Mean):
        return mean(op, x)
    assert other is not None
    if isinstance(op, Add):
        return add(op, x, other)
    assert isinstance(op, AddFloat)
    total = x + other
    return np.maximum(total, np.float32(0)) if op.relu else total
