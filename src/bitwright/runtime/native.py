"""Operators bound to buffers, as the compiled kernels take them."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.runtime import packing
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
    Shape,
    Table,
    Window,
)

KINDS = ("quantize", "table", "add", "max_pool", "mean", "conv", "winograd", "depthwise", "dequantize", "add_float")
SLACK = 64  # bytes behind a buffer that kernels may read
TALL = 14  # pixels of a register tile
CACHE = 256 * 1024  # bytes of transformed input that stay in the second-level cache beside the weights


class NativeOp(ctypes.Structure):
    """One operator with its buffers: `Op` in native/runtime.c, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "x2", "y", "scratch")),
        *((name, c_void_p) for name in ("weight", "init", "multiplier", "bias", "segments", "table")),
        *((name, c_int64) for name in ("n", "h", "w", "c", "oh", "ow", "oc")),
        *((name, c_int64) for name in ("kh", "kw", "sy", "sx", "dy", "dx", "top", "left", "ph", "pw")),
        *((name, c_int64) for name in ("groups", "runs", "k4", "block")),
        *((name, c_int32) for name in ("kind", "zx", "zx2", "zy", "lo", "hi", "to_float", "wide", "relu", "planar")),
        *((name, c_float) for name in ("scale", "scale2")),
    )


def buffer(size: int) -> NDArray[np.uint8]:
    """`size` bytes and the slack, on a cache line."""
    raw = np.zeros(size + SLACK + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :]


def images(shape: Shape) -> dict[str, int]:
    """A shape as n, h, w, c: a tensor of other ranks is a row of pixels."""
    n, h, w, c = shape if len(shape) == 4 else (1, 1, int(np.prod(shape[:-1])), shape[-1])
    return {"n": n, "h": h, "w": w, "c": c}


def bounds(codes: Codes) -> dict[str, int]:
    """Zero point and bounds of what comes out."""
    return {"zy": codes.zero, "lo": codes.lo, "hi": codes.hi}


def moves(window: Window, h: int, w: int) -> dict[str, int]:
    """A window's numbers."""
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.strides, window.dilations
    ph, pw = window.padded(h, w)
    numbers = {"kh": kh, "kw": kw, "sy": sy, "sx": sx, "dy": dy, "dx": dx, "ph": ph, "pw": pw}
    return numbers | {"top": window.pads[0], "left": window.pads[1]}


class Bound:
    """An operator at given shapes: `fields` of its `NativeOp`, bytes of scratch, and the arrays that it points to."""

    def __init__(self, fields: dict[str, Any], scratch: int = 0, **arrays: NDArray):
        self.fields, self.scratch = fields, scratch
        self.arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}

    def native(self, x: int, x2: int, y: int, scratch: int) -> NativeOp:
        """With addresses."""
        pointers = {name: array.ctypes.data for name, array in self.arrays.items()}
        return NativeOp(x=x, x2=x2, y=y, scratch=scratch, **pointers, **self.fields)


def bind(op: Op, shapes: Sequence[Shape]) -> Bound:
    """An operator whose inputs have `shapes`."""
    if isinstance(op, Conv):
        return bind_conv(op, shapes[0])
    fields: dict[str, Any] = images(shapes[0])
    if isinstance(op, Quantize):
        if op.planar:
            n, c, h, w = shapes[0]
            fields = {"n": n, "h": h, "w": w, "c": c}
        return Bound({**fields, "kind": 0, "planar": op.planar, "scale": op.codes.scale, **bounds(op.codes)})
    if isinstance(op, Table):
        return Bound({**fields, "kind": 1}, table=op.table)
    if isinstance(op, Add):
        ra, rb = op.ratios
        zeros = {"zx": op.a.zero, "zx2": op.b.zero, "scale": float(ra), "scale2": float(rb)}
        return Bound({**fields, "kind": 2, **zeros, **bounds(op.codes)})
    if isinstance(op, MaxPool):
        _, oh, ow, _ = op.shape(shapes[0])
        window = moves(op.window, fields["h"], fields["w"])
        return Bound({**fields, **window, "oh": oh, "ow": ow, "kind": 3, "to_float": op.floats})
    if isinstance(op, Mean):
        if op.codes is None:
            return Bound({**fields, "kind": 4, "to_float": 1})
        return Bound({**fields, "kind": 4, "zx": op.codes.zero, "scale": op.codes.scale})
    if isinstance(op, Dequantize):
        return Bound({**fields, "kind": 8, "zx": op.codes.zero, "scale": op.codes.scale})
    assert isinstance(op, AddFloat)
    return Bound({**fields, "kind": 9, "relu": op.relu})


def bind_conv(op: Conv, x: Shape) -> Bound:
    """A convolution with packed weights."""
    out = op.shape(x)
    window = op.window
    fields: dict[str, Any] = images(x)
    fields |= moves(window, fields["h"], fields["w"])
    fields |= {"oc": op.weight.shape[0], "oh": 1, "ow": fields["w"], "groups": op.groups, "zx": op.x.zero}
    if len(out) == 4:
        fields |= {"oh": out[1], "ow": out[2]}
    fields |= {"relu": op.relu, "to_float": 1} if op.codes is None else bounds(op.codes)
    arrays = {"multiplier": tail(op.multiplier)}
    if op.late_bias is not None:
        arrays["bias"] = tail(op.late_bias)
    return BINDERS[packing.kernel(op)](op, fields, arrays)


def tail(values: NDArray) -> NDArray:
    """With a panel of zeros behind, which kernels may read."""
    return np.concatenate([values, np.zeros(packing.PANEL, values.dtype)])


def bind_direct(op: Conv, fields: dict[str, Any], arrays: dict[str, NDArray]) -> Bound:
    """Runs of neighbouring bytes under the kernel are read where they lie."""
    out, per_group, kh, kw = op.weight.shape
    weight = op.weight.transpose(0, 2, 3, 1)
    dy, dx = op.window.dilations
    c, row = fields["c"], fields["pw"] * fields["c"]
    if dx == 1 and op.groups == 1:
        runs, length = kh, kw * per_group
        segments = [i * dy * row for i in range(kh)]
    else:
        runs, length = kh * kw, per_group
        segments = [i * dy * row + j * dx * c for i in range(kh) for j in range(kw)]
    grouped = weight.reshape(op.groups, out // op.groups, runs, length)
    arrays["weight"] = np.concatenate([packing.panels(g) for g in grouped])
    sums = op.weight.astype(np.int64).reshape(out, -1).sum(1)
    arrays["init"] = packing.spread((op.bias - op.x.zero * sums).astype(np.int32), op.groups)
    arrays["segments"] = np.array(segments, np.int64)
    fields |= {"kind": 5, "runs": runs, "k4": -(-length // 4)}
    fields["wide"] = packing.pairs_overflow(max(op.x.hi, op.x.zero), op.weight)
    framed = any(op.window.pads)
    if not framed and (kh, kw) == op.window.strides == (1, 1):  # one long row of pixels
        fields |= {"n": 1, "h": 1, "w": fields["n"] * fields["h"] * fields["w"], "oh": 1, "ph": 1}
        fields |= {"ow": fields["w"], "pw": fields["w"]}
    return Bound(fields, fields["ph"] * row + SLACK if framed else 0, **arrays)


def bind_winograd(op: Conv, fields: dict[str, Any], arrays: dict[str, NDArray]) -> Bound:
    """Inputs are shifted to be unsigned, which `init` takes back; sums are four times the true ones."""
    out, channels = op.weight.shape[:2]
    weight = packing.transformed_weight(op.weight)
    low, high = packing.transformed_span(op.x)
    init = low * weight.sum(1).reshape(out, 16)
    init[:, 5] += 4 * op.bias.astype(np.int64)  # position (1, 1) reaches all four outputs
    full = np.zeros((-(-out // packing.PANEL) * packing.PANEL, 16), np.int32)
    full[:out] = init
    arrays["init"] = np.ascontiguousarray(full.reshape(-1, packing.PANEL, 16).transpose(0, 2, 1))
    arrays["weight"] = packing.panels(weight.reshape(out, channels, 16).transpose(0, 2, 1))
    arrays["multiplier"] = arrays["multiplier"] / np.float32(4)
    arrays["table"] = np.full(channels, op.x.zero, np.uint8)
    k4 = -(-channels // 4)
    tiles = fields["n"] * -(-fields["oh"] // 2) * -(-fields["ow"] // 2)
    block = min(tiles, max(TALL, CACHE // (64 * k4) // TALL * TALL))
    fields |= {"kind": 6, "k4": k4, "zx2": -low, "block": block}
    fields["wide"] = packing.pairs_overflow(high - low, weight)
    return Bound(fields, block * (64 * k4 + 16) + 4 * 16 * TALL * 2 * packing.PANEL + 16 * channels, **arrays)


def bind_depthwise(op: Conv, fields: dict[str, Any], arrays: dict[str, NDArray]) -> Bound:
    """One weight per channel and kernel position."""
    channels, _, kh, kw = op.weight.shape
    row = fields["pw"] * channels
    dy, dx = op.window.dilations
    segments = [i * dy * row + j * dx * channels for i in range(kh) for j in range(kw)]
    taps = op.weight.reshape(channels, kh * kw).T.astype(np.int32)
    arrays["weight"] = np.pad(taps, ((0, 0), (0, -channels % packing.PANEL)))
    sums = taps.sum(0, dtype=np.int64)
    arrays["init"] = packing.spread((op.bias - op.x.zero * sums).astype(np.int32), 1)
    arrays["segments"] = np.array(segments, np.int64)
    return Bound(fields | {"kind": 7, "runs": kh * kw}, fields["ph"] * row + SLACK, **arrays)


BINDERS = {"direct": bind_direct, "winograd": bind_winograd, "depthwise": bind_depthwise}
