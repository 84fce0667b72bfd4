"""Products of layers on integers, in training: the codes of input and weight are multiplied, sums are scaled once.

Their sums are exact, as a deployed network's are; float products of quantized values differ from them by rounding. On
processors that multiply bytes it takes a fraction of the time. Gradients are those of the float product.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitwright.kernels import halves
from bitwright.kernels import product as products
from bitwright.kernels.build import library
from bitwright.kernels.codes import PendingCodes, held
from bitwright.kernels.halves import Matrices
from bitwright.kernels.layout import channels_first, channels_last
from bitwright.kernels.sources import integers, keep_sources, noted
from bitwright.kernels.twice import runs_twice

SMALLEST = 1 << 20  # multiplications; below, packing the weight takes longer than is saved
# Multiplications an element read or written, below which contiguous tensors, which oneDNN wants channels last, are
# turned round for longer than is saved.
DENSEST = 20

_float_depth = 0


@contextmanager
def float_products() -> Iterator[None]:
    """Multiply float values for a while: what integers save, and how their rounding differs, can be measured so."""
    global _float_depth
    _float_depth += 1
    try:
        yield
    finally:
        _float_depth -= 1


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this processor has instructions for it, and this torch the operators."""
    operators = torch.ops.onednn
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_vnni_supported()  # without, sums of pairs saturate
        and all(hasattr(operators, f"{name}_prepack") for name in ("qconv", "qlinear"))
        and library() is not None
    )


def may_multiply(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Whether a layer in training may quantize these to bytes."""
    return (
        multiplications >= SMALLEST
        and _float_depth == 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_inference_mode_enabled()
        and torch.backends.mkldnn.enabled
        and not runs_twice()
        and multiplies_bytes()
    )


def trusts(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether oneDNN's integer convolution of `x`, (N, C, H, W) unsigned, without groups, is one that computes rightly.

    Its version 3.12 writes beyond its memory, or leaves some of it as it was, for kernels that are larger than the
    image, padding by more than half of a kernel, a single row or column of output, and inputs with a zero point (and
    groups). Within these limits and without dilation it gave the right sums for every one of 60,000 drawn geometries.
    """
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return all(d == 1 and k <= n and 2 * p < k and n + 2 * p >= k + s for n, k, s, p, d in sizes)


class Operands(NamedTuple):
    """What the tensors of a product hold."""

    x: PendingCodes
    weight: PendingCodes

    @staticmethod
    def of(x: Tensor, weight: Tensor) -> "Operands":
        """Those of tensors that are `held`."""
        left, right = held(x), held(weight)
        assert left is not None
        assert right is not None
        return Operands(left, right)

    def step(self) -> Tensor:
        """What the sums of each output channel are multiplied by, (channels,)."""
        return (self.x.step * self.weight.step).expand(len(self.weight.numbers)).contiguous()


def scaling(p: Operands, packed: Tensor, step: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """oneDNN's arguments behind the input: scales and zero points of input and weight, the weight between, the bias."""
    return 1.0, p.x.offset, packed, step, torch.zeros_like(step, dtype=torch.int32), bias


# oneDNN's last arguments: the output's scale, zero point and type, and what is computed with it.
AS_FLOAT = (1.0, 0, torch.float32, "none", [], "")


def lies_last(x: Tensor) -> bool:
    """Whether `x`, (N, C, H, W), is channels last by its strides; with one channel or pixel these alone tell."""
    strides = x.stride(1), x.stride(3)
    return strides == (1, x.shape[1]) and x.is_contiguous(memory_format=torch.channels_last)


def gives_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether torch lets a convolution's output lie so."""
    return lies_last(x) or lies_last(weight)


class Convolution(torch.autograd.Function):
    """`torch.nn.functional.conv2d` of tensors that are `held`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        p = Operands.of(x, weight)
        numbers, step = p.x.numbers, p.step()
        packed = torch.ops.onednn.qconv_prepack.default(
            p.weight.numbers, step, 1.0, p.x.offset, *geometry, numbers.shape
        )
        last = gives_channels_last(x, weight)
        if not lies_last(numbers):
            numbers = channels_last(numbers)
        y = torch.ops.onednn.qconv_pointwise.default(numbers, *scaling(p, packed, step, bias), *geometry, *AS_FLOAT)
        return y if last else channels_first(y.contiguous(memory_format=torch.channels_last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        *geometry, groups = ctx.geometry
        grads = torch.ops.aten.convolution_backward.default(
            g, x, weight, [len(weight)], *geometry, False, [0, 0], groups, ctx.needs_input_grad[:3]
        )
        return (*grads, *[None] * 4)


class Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` of tensors that are `held`, its result as a matrix.

    For the backward pass it may get their `integers`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        p = Operands.of(x, weight)
        ctx.steps = p.x.step, p.weight.step
        rows = p.x.numbers.reshape(-1, x.shape[-1])
        packed = torch.ops.onednn.qlinear_prepack.default(p.weight.numbers, rows.shape)
        y = torch.ops.onednn.qlinear_pointwise.default(rows, *scaling(p, packed, p.step(), bias), *AS_FLOAT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        inputs = x.reshape(-1, x.shape[-1])
        if weight.dtype == torch.bfloat16:
            dx, *others = halves.linear_gradients(g, inputs, weight, ctx.steps, ctx.needs_input_grad)
        else:
            dx, *others = products.linear_gradients(g, inputs, weight, ctx.needs_input_grad)
        return dx if dx is None else dx.view(x.shape), *others


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of tensors that are `held`."""
    may_split = halves.available() and noted(x) and noted(weight)
    with keep_sources(x, weight, give=integers) if may_split else keep_sources(x, weight):
        y: Tensor = Linear.apply(x, weight, bias)  # pyright: ignore[reportAssignmentType]
    # Outside: a view that a Function gives may not be written to.
    return y.view(*x.shape[:-1], -1) if x.ndim != 2 else y


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """`torch.nn.functional.conv2d` of tensors that are `held`; geometry: stride, padding, dilation, groups."""
    with keep_sources(x, weight):
        return Convolution.apply(x, weight, bias, *geometry)  # pyright: ignore[reportReturnType]


class Product(torch.autograd.Function):
    """x @ y.T, or x @ y unless `turned`, of stacks of matrices that are `held` as bfloat16; backward on `integers`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, turned: bool) -> Tensor:
        ctx.save_for_backward(x, y)
        p = Operands.of(x, y)
        ctx.steps, ctx.turned = (p.x.step.item(), p.weight.step.item()), turned
        left, right = Matrices((p.x.numbers,)), Matrices((p.weight.numbers,), turned)
        return halves.multiply(left, right, ctx.steps[0] * ctx.steps[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y = ctx.saved_tensors
        return *halves.product_gradients(g, x, y, ctx.steps, ctx.turned, ctx.needs_input_grad), None


def product(x: Tensor, y: Tensor, turned: bool) -> Tensor:
    """x @ y.T, or x @ y unless `turned`, of quantized stacks of matrices, (..., rows, columns)."""
    if held(x) and held(y) and x.shape[:-2] == y.shape[:-2] and noted(x) and noted(y):
        with keep_sources(x, y, give=integers):
            return Product.apply(x, y, turned)  # pyright: ignore[reportReturnType]
    with keep_sources(x, y):
        return x @ (y.transpose(-2, -1) if turned else y)


def may_multiply_floats(x: Tensor, multiplications: int) -> bool:
    """Whether `product` may be given tensors like `x` as integers."""
    return torch.is_grad_enabled() and may_multiply(x, x, multiplications) and halves.available()
