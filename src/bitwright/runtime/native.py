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

    def __init__(self, kind: str, fields: dict[str, Any], scratch: int = 0, **arrays: NDArray):
        self.fields, self.scratch, self.arrays = {**fields, "kind": KINDS.index(kind)}, scratch, arrays

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
        return Bound("quantize", {**fields, "planar": op.planar, "scale": op.codes.scale, **bounds(op.codes)})
    if isinstance(op, Table):
        return Bound("table", fields, table=op.table)
    if isinstance(op, Add):
        ra, rb = op.ratios
        zeros = {"zx": op.a.zero, "zx2": op.b.zero, "scale": float(ra), "scale2": float(rb)}
        return Bound("add", {**fields, **zeros, **bounds(op.codes)})
    if isinstance(op, MaxPool):
        _, oh, ow, _ = op.shape(shapes[0])
        window = moves(op.window, fields["h"], fields["w"])
        pointers = 8 * window["kh"] * window["kw"]
        return Bound("max_pool", {**fields, **window, "oh": oh, "ow": ow, "to_float": op.floats}, pointers)
    if isinstance(op, Mean):
        if op.codes is None:
            return Bound("mean", {**fields, "to_float": 1})
        return Bound("mean", {**fields, "zx": op.codes.zero, "scale": op.codes.scale})
    if isinstance(op, Dequantize):
        return Bound("dequantize", {**fields, "zx": op.codes.zero, "scale": op.codes.scale})
    assert isinstance(op, AddFloat)
    return Bound("add_float", {**fields, "relu": op.relu})


def bind_conv(op: Conv, x: Shape) -> Bound:
    """A convolution with its packed weights."""
    out, packed = op.shape(x), packing.pack(op)
    fields: dict[str, Any] = images(x)
    fields |= moves(op.window, fields["h"], fields["w"])
    fields |= {"oc": op.weight.shape[0], "oh": 1, "ow": fields["w"], "groups": op.groups, "zx": op.x.zero}
    if len(out) == 4:
        fields |= {"oh": out[1], "ow": out[2]}
    fields |= {"relu": op.relu, "to_float": 1} if op.codes is None else bounds(op.codes)
    fields |= {"wide": packed.wide, "zx2": packed.shift}
    arrays = dict(packed.arrays)
    if packed.kernel == "winograd":
        k4 = -(-op.weight.shape[1] // 4)
        tiles = fields["n"] * -(-fields["oh"] // 2) * -(-fields["ow"] // 2)
        block = min(tiles, max(TALL, CACHE // (64 * k4) // TALL * TALL))
        sums = 4 * 16 * TALL * 2 * packing.PANEL
        scratch = block * (64 * k4 + 16) + sums + 16 * op.weight.shape[1]
        return Bound("winograd", fields | {"k4": k4, "block": block}, scratch, **arrays)
    count, length = packing.runs(op)
    (kh, kw), (dy, dx), row = op.window.kernel, op.window.dilations, fields["pw"] * fields["c"]
    across = range(1 if count == kh and packed.kernel == "direct" else kw)
    segments = [i * dy * row + j * dx * fields["c"] for i in range(kh) for j in across]
    arrays["segments"] = np.array(segments, np.int64)
    fields |= {"runs": count, "k4": -(-length // 4)}
    framed = fields["ph"] * row + SLACK
    if packed.kernel == "depthwise":
        return Bound("depthwise", fields, framed, **arrays)
    padded = any(op.window.pads)
    if not padded and op.window.kernel == op.window.strides == (1, 1):  # one long row of pixels
        pixels = fields["n"] * fields["h"] * fields["w"]
        fields |= {"n": 1, "h": 1, "w": pixels, "oh": 1, "ow": pixels, "ph": 1, "pw": pixels}
    return Bound("conv", fields, framed if padded else 0, **arrays)
