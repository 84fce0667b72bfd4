"""One operator at a time, on any path."""

import numpy as np
from numpy.typing import NDArray

from bitwright.runtime import build
from bitwright.runtime.build import available
from bitwright.runtime.native import NativeOp, bind, buffer
from bitwright.runtime.ops import Op, gives_floats

PATHS = [p for p in available() if p != "reference"]


def run_native(op: Op, *inputs: NDArray, path: str) -> NDArray:
    """The output of a compiled operator; the bytes behind the output must not change."""
    shapes = [x.shape for x in inputs]
    buffers = []
    for x in inputs:
        held = buffer(x.nbytes)
        held[:] = 255  # what lies behind an input must not matter
        held[: x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        buffers.append(held)
    bound = bind(op, shapes)
    shape, dtype = op.shape(*shapes), np.dtype(np.float32 if gives_floats(op) else np.uint8)
    size = int(np.prod(shape)) * dtype.itemsize
    out, scratch = buffer(size), buffer(bound.scratch)
    out[:], scratch[:] = 77, 255
    native = bound.native(buffers[0].ctypes.data, buffers[-1].ctypes.data, out.ctypes.data, scratch.ctypes.data)
    build.run((NativeOp * 1)(native), path)
    assert (out[size:] == 77).all(), "written behind the end of the output"
    assert (scratch[bound.scratch :] == 255).all(), "written behind the end of the scratch"
    return out[:size].view(dtype).reshape(shape)
