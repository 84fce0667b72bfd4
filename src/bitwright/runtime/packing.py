"""Weights as the compiled kernels read them, and where integer Winograd is exact."""

import numpy as np
from numpy.typing import NDArray

from bitwright.runtime.ops import Codes, Conv

PANEL = 16  # output channels side by side in a vector
# Twice the usual transform of F(2x2, 3x3) (Lavin & Gray 2016), so that it is integer: 2 G.
G2 = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])


def panels(weight: NDArray) -> NDArray[np.int8]:
    """(out, runs, length) to [out / 16][runs][length / 4][16][4], zeros where the sizes are no multiples."""
    out, runs, length = weight.shape
    full = np.zeros((-(-out // PANEL) * PANEL, runs, -(-length // 4) * 4), np.int8)
    full[:out, :, :length] = weight
    return np.ascontiguousarray(full.reshape(-1, PANEL, runs, full.shape[2] // 4, 4).transpose(0, 2, 3, 1, 4))


def spread(values: NDArray, groups: int) -> NDArray:
    """(out,) to one padded run of panels per group, flat."""
    grouped = values.reshape(groups, -1)
    full = np.zeros((groups, -(-grouped.shape[1] // PANEL) * PANEL), values.dtype)
    full[:, : grouped.shape[1]] = grouped
    return full.reshape(-1)


def transformed_weight(weight: NDArray) -> NDArray[np.int64]:
    """(out, in, 3, 3) to (out, in, 4, 4): 4 G g G^T."""
    return np.einsum("ik,ockl,jl->ocij", G2, weight.astype(np.int64), G2)


def transformed_span(x: Codes) -> tuple[int, int]:
    """Least and greatest of B^T d B, whose entries are sums or differences of differences of at most four codes."""
    low, high = x.span
    return min(4 * low, 2 * (low - high)), max(4 * high, 2 * (high - low))


def fits_winograd(conv: Conv) -> bool:
    """Whether F(2x2, 3x3) is exact in 8-bit operands and 32-bit sums: 4-bit weights with inputs up to 5 bits always.

    Decided on the layer's own numbers: transformed inputs span at most 255 and transformed weights are int8.
    """
    window = conv.window
    plain = window.kernel == (3, 3) and window.strides == window.dilations == (1, 1) and conv.groups == 1
    if not plain or conv.largest_sum >= 2**29:
        return False
    low, high = transformed_span(conv.x)
    weight = transformed_weight(conv.weight)
    return high - low <= 255 and int(weight.min()) >= -128 and int(weight.max()) <= 127


def kernel(conv: Conv) -> str:
    """Which kernel runs it: "winograd", "depthwise" or "direct"."""
    if conv.depthwise:
        return "depthwise"
    # With few channels the transforms cost more than the products that they save.
    worth = conv.winograd and min(conv.weight.shape[:2]) >= 16
    return "winograd" if worth and fits_winograd(conv) else "direct"


def pairs_overflow(largest_input: int, weight: NDArray) -> bool:
    """Whether the sum of two products of an unsigned input and a weight may leave 16 bits."""
    return 2 * largest_input * int(np.abs(weight.astype(np.int64)).max()) > 32767
