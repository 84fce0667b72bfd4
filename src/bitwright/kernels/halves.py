"""Float32 matrices times small integers, on processors that multiply bfloat16 matrices (AMX).

bfloat16 holds integers up to 256 as they are, so that only a float matrix has to be split, into two of these: products
are exact but for 2^-17 of the float number (float32 multiplication: 2^-24), those of two integer matrices exact, and
sums are float32's. By MKL's `cblas_gemm_bf16bf16f32`, which torch's library brings; two of them take half the time of
one product in float32.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitwright.kernels.build import library

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def gemm() -> int | None:
    """The address of MKL's function; None where torch has none or this processor would emulate it."""
    if not (torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported()):
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, POINTER).value


def available() -> bool:
    """Whether matrices can be multiplied so, here."""
    return gemm() is not None and library() is not None


@functools.cache
def functions() -> tuple[Any, Any]:
    """`split_f32` and `multiply_batch` of products.c."""
    split_f32, batch = library().split_f32, library().multiply_batch  # pyright: ignore[reportOptionalMemberAccess]
    split_f32.argtypes = [*[POINTER] * 4, *[SIZE] * 4]
    batch.argtypes = [POINTER, *[SIZE] * 4, *[POINTER, SIZE] * 2, *[ctypes.c_float] * 2, POINTER]
    return split_f32, batch


class Matrices(NamedTuple):
    """One or more matrices as the sum of `parts`: bfloat16, (..., rows, columns), contiguous, all of one shape.

    turned: whether they are meant with rows and columns exchanged.
    """

    parts: tuple[Tensor, ...]
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many, of which rows and columns."""
        rows, columns = self.parts[0].shape[-2:]
        count = self.parts[0].shape[:-2].numel()
        return (count, columns, rows) if self.turned else (count, rows, columns)


def split(x: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x * step as the sum of two bfloat16 tensors.

    x: float32, contiguous. step: float32, (1,) or one for each index of the last axis; 1 if left out.
    """
    step = torch.ones(1, dtype=torch.float32, device=x.device) if step is None else step
    high, low = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
    columns = x.shape[-1]
    sizes = (x.numel() // max(columns, 1), columns, len(step), torch.get_num_threads())
    functions()[0](*(t.data_ptr() for t in (x, step, high, low)), *sizes)
    return high, low


def multiply(a: Matrices, b: Matrices, factor: float = 1.0) -> Tensor:
    """a @ b * factor, matrix by matrix, float32 (..., rows of a, columns of b); one of both has one part."""
    (count, m, k), (_, _, n) = a.shape, b.shape
    y = torch.empty(*a.parts[0].shape[:-2], m, n, dtype=torch.float32, device=a.parts[0].device)
    for i, (left, right) in enumerate((left, right) for left in a.parts for right in b.parts):
        operands = (left.data_ptr(), a.turned, right.data_ptr(), b.turned)
        functions()[1](gemm(), count, m, n, k, *operands, factor, float(i > 0), y.data_ptr())
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
    dx = multiply(Matrices(parts), Matrices((weight,))) if wants[0] else None
    dweight = None
    if wants[1]:
        dweight = multiply(Matrices(parts, True), Matrices((x,))).mul_((x_step / weight_step)[:, None])
    return dx, dweight, g.sum(0) if wants[2] else None


def product_gradients(
    g: Tensor, a: Tensor, b: Tensor, steps: tuple[float, float], turned: bool, wants: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a @ b, or of a @ b.T where `turned`, in both factors.

    Args:
        g: (..., m, n) float32. a, b: integers, bfloat16, (..., m, k) and (..., k, n), or (..., n, k). steps: what makes
            them values.
    """
    parts = split(g.contiguous())
    da = multiply(Matrices(parts), Matrices((b,), not turned), steps[1]) if wants[0] else None
    db = None
    if wants[1]:
        left, right = (Matrices(parts, True), Matrices((a,))) if turned else (Matrices((a,), True), Matrices(parts))
        db = multiply(left, right, steps[0])
    return da, db
