"""Float32 matrices times small integers, on processors that multiply bfloat16 matrices (AMX).

bfloat16 holds integers up to 256 as they are, so that only the float matrix has to be split, into two of these:
products are exact but for 2^-17 of the float number (float32 multiplication: 2^-24), and sums are float32's. By MKL's
`cblas_gemm_bf16bf16f32`, which torch's library brings; two of them take half the time of one product in float32.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.build import library

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112


@functools.cache
def gemm() -> Any:
    """MKL's function; None where torch has none or this processor would emulate it."""
    if not (torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported()):
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, factor, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    found.argtypes = [*[size] * 6, factor, pointer, size, pointer, size, factor, pointer, size]
    found.restype = None
    return found


def available() -> bool:
    """Whether matrices can be multiplied so, here."""
    return gemm() is not None and library() is not None


def split(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """x * step as the sum of two bfloat16 matrices.

    x: (rows, columns) float32, contiguous. step: float32, (1,) or (columns,).
    """
    high, low = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
    addresses = (t.data_ptr() for t in (x, step, high, low))
    kernel()(*addresses, *x.shape, len(step), torch.get_num_threads())
    return high, low


@functools.cache
def kernel() -> Any:
    """`split_f32` of products.c."""
    function = library().split_f32  # pyright: ignore[reportOptionalMemberAccess]
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4]
    return function


def multiply(halves: tuple[Tensor, Tensor], integers: Tensor, transposed: bool = False) -> Tensor:
    """(high + low) @ integers, or of the transposed (high + low).T; float32.

    Args:
        halves: see `split`. integers: bfloat16, contiguous, as many rows as the left factor has columns.
    """
    (rows, inner), columns = halves[0].shape, integers.shape[1]
    if transposed:
        rows, inner = inner, rows
    y = torch.empty(rows, columns, dtype=torch.float32, device=integers.device)
    for factor, half in zip((0.0, 1.0), halves, strict=True):
        gemm()(
            *(ROW_MAJOR, TRANSPOSED if transposed else PLAIN, PLAIN, rows, columns, inner, 1.0),
            *(half.data_ptr(), half.shape[1], integers.data_ptr(), columns, factor, y.data_ptr(), columns),
        )
    return y


def linear_gradients(
    g: Tensor, x: Tensor, weight: Tensor, steps: tuple[Tensor, Tensor], wants: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a linear layer in input, weight and bias, those that are wanted.

    Args:
        g: (rows, out) float32. x, weight: integers, bfloat16, (rows, in) and (out, in). steps: what makes them values,
            float32: (1,), and (1,) or (out,).
    """
    x_step, weight_step = steps
    parts = split(g.contiguous(), weight_step)
    dx = multiply(parts, weight) if wants[0] else None
    dweight = None
    if wants[1]:
        dweight = multiply(parts, x, transposed=True).mul_((x_step / weight_step)[:, None])
    return dx, dweight, g.sum(0) if wants[2] else None
