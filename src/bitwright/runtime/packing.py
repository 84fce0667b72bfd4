"""Weights as the compiled kernels read them, and where integer Winograd is exact."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bitwright.runtime.ops import Codes, Conv

PANEL = 16  # output channels side by side in a vector
LEAST_CHANNELS = 32  # with fewer, Winograd's transforms cost more than the products that it saves


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


def twice_g(g: NDArray, axis: int) -> NDArray:
    """Three numbers along an axis to four: 2 G, twice the usual transform (Lavin & Gray 2016), which is integer."""
    g0, g1, g2 = np.moveaxis(g, axis, 0)
    return np.stack([2 * g0, g0 + g1 + g2, g0 - g1 + g2, 2 * g2], axis)


def transformed_weight(weight: NDArray) -> NDArray:
    """(..., 3, 3) to (..., 4, 4): 4 G g G^T."""
    return twice_g(twice_g(weight, -2), -1)


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
    weight = transformed_weight(conv.weight.astype(np.int16))
    return high - low <= 255 and int(weight.min()) >= -128 and int(weight.max()) <= 127


def kernel(conv: Conv) -> str:
    """Which kernel runs it: "winograd", "depthwise" or "direct"."""
    if conv.depthwise:
        return "depthwise"
    worth = conv.winograd and min(conv.weight.shape[:2]) >= LEAST_CHANNELS
    return "winograd" if worth and fits_winograd(conv) else "direct"


def pairs_overflow(largest_input: int, weight: NDArray) -> bool:
    """Whether the sum of two products of an unsigned input and a weight may leave 16 bits."""
    return 2 * largest_input * int(np.abs(weight.astype(np.int64)).max()) > 32767


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer's numbers for the compiled kernels, the same for every input shape.

    arrays: by their names in `NativeOp`. shift: what makes Winograd's inputs unsigned. wide: see `pairs_overflow`.
    """

    kernel: str
    arrays: dict[str, NDArray]
    wide: bool = False
    shift: int = 0


def pack(conv: Conv) -> Packed:
    """What `conv` needs, made once; it lives as long as the layer."""
    if conv not in PACKED:
        found = PACKERS[kernel(conv)](conv)
        found.arrays["multiplier"] = tail(found.arrays.get("multiplier", conv.multiplier))
        if conv.late_bias is not None:
            found.arrays["bias"] = tail(conv.late_bias)
        for name, array in found.arrays.items():
            found.arrays[name] = np.ascontiguousarray(array)
        PACKED[conv] = found
    return PACKED[conv]


def tail(values: NDArray) -> NDArray:
    """With a panel of zeros behind, which kernels may read."""
    return np.concatenate([values, np.zeros(PANEL, values.dtype)])


def runs(conv: Conv) -> tuple[int, int]:
    """How many runs of neighbouring bytes lie under the kernel, and their length."""
    _, per_group, kh, kw = conv.weight.shape
    together = conv.window.dilations[1] == 1 and conv.groups == 1
    return (kh, kw * per_group) if together else (kh * kw, per_group)


def pack_direct(conv: Conv) -> Packed:
    """Panels of one run after the other; `init` is the bias without what the zero point adds."""
    out = conv.weight.shape[0]
    grouped = conv.weight.transpose(0, 2, 3, 1).reshape(conv.groups, out // conv.groups, *runs(conv))
    init = conv.bias - conv.x.zero * conv.weight.reshape(out, -1).sum(1, dtype=np.int64)
    arrays = {"weight": np.concatenate([panels(g) for g in grouped])}
    arrays["init"] = spread(init.astype(np.int32), conv.groups)
    return Packed("direct", arrays, pairs_overflow(max(conv.x.hi, conv.x.zero), conv.weight))


def pack_winograd(conv: Conv) -> Packed:
    """Inputs are shifted to be unsigned, which `init` takes back; sums are four times the true ones."""
    out, channels = conv.weight.shape[:2]
    low, high = transformed_span(conv.x)
    weight = transformed_weight(conv.weight.astype(np.int16))
    init = low * weight.sum(1, dtype=np.int64).reshape(out, 16)
    init[:, 5] += 4 * conv.bias.astype(np.int64)  # position (1, 1) reaches all four outputs
    full = np.zeros((-(-out // PANEL) * PANEL, 16), np.int32)
    full[:out] = init
    arrays = {
        "weight": panels(weight.reshape(out, channels, 16).transpose(0, 2, 1)),
        "init": full.reshape(-1, PANEL, 16).transpose(0, 2, 1),
        "multiplier": conv.multiplier / np.float32(4),
        "table": np.full(channels, conv.x.zero, np.uint8),
    }
    return Packed("winograd", arrays, pairs_overflow(high - low, weight), -low)


def pack_depthwise(conv: Conv) -> Packed:
    """One weight per channel and kernel position, int32."""
    channels = conv.weight.shape[0]
    taps = conv.weight.reshape(channels, -1).T.astype(np.int32)
    init = conv.bias - conv.x.zero * taps.sum(0, dtype=np.int64)
    arrays = {"weight": np.pad(taps, ((0, 0), (0, -channels % PANEL))), "init": spread(init.astype(np.int32), 1)}
    return Packed("depthwise", arrays)


PACKERS = {"direct": pack_direct, "winograd": pack_winograd, "depthwise": pack_depthwise}
PACKED: WeakKeyDictionary[Conv, Packed] = WeakKeyDictionary()
