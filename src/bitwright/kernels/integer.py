"""Products of layers on integers, in training: the codes of input and weight are multiplied, sums are scaled once.

Their sums are exact, as a deployed network's are; float products of quantized values differ from them by rounding. On
processors that multiply bytes it takes a fraction of the time. Gradients are those of the float product.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitwright.kernels import halves, product
from bitwright.kernels.build import library
from bitwright.kernels.codes import PendingCodes, held
from bitwright.kernels.layout import channels_first, channels_last
from bitwright.kernels.sources import integers, keep_sources, noted
from bitwright.kernels.twice import runs_twice

SMALLEST = 1 << 25  # multiplications; below, what comes before and behind them takes longer than is saved
FEWEST = 300  # multiplications with each weight; below, packing the weights does
# Multiplications an element read or written, below which contiguous tensors, which oneDNN wants channels last, are
# turned round for longer than is saved.
DENSEST = 20

logger = logging.getLogger("bitwright")

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
        multiplications >= max(SMALLEST, FEWEST * weight.numel())
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
    """Whether oneDNN is trusted with the integer convolution of `x`, (N, C, H, W) unsigned, without groups.

    Its version 3.12 writes beyond its memory, or leaves some of it as it was, for kernels larger than the image, even
    or dilated ones, strides beyond 2, padding by more than half of a kernel, a single row or column of output, and
    inputs with a zero point. Within these limits `benchmarks/speed/geometries.py` found none, and every geometry is
    compared once more with float sums where it is met first (`judged_convolution`).
    """
    return all(
        d == 1 and k % 2 == 1 and s <= 2 and 2 * p < k <= n and n + 2 * p >= k + s
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )


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
    """Whether torch takes `x`, (N, C, H, W), for channels last: by its strides, and not where these say both."""
    strides, both = (x.stride(1), x.stride(3)), x.shape[1:].numel() == 1
    return strides == (1, x.shape[1]) and not both and x.is_contiguous(memory_format=torch.channels_last)


def gives_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether torch lets a convolution's output lie so."""
    return lies_last(x) or lies_last(weight)


def integer_convolution(p: Operands, bias: Tensor | None, *geometry: Any) -> Tensor:
    """oneDNN's convolution of what `p` holds, channels last; geometry: stride, padding, dilation, groups."""
    numbers, step = p.x.numbers, p.step()
    packing = (step, 1.0, p.x.offset, *geometry, numbers.shape)
    packed = torch.ops.onednn.qconv_prepack.default(p.weight.numbers, *packing)
    if not lies_last(numbers):
        numbers = channels_last(numbers)
    return torch.ops.onednn.qconv_pointwise.default(numbers, *scaling(p, packed, step, bias), *geometry, *AS_FLOAT)


def float_convolution(p: Operands, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The same by torch's float convolution of the integers."""
    sums = F.conv2d(p.x.numbers.float() - p.x.offset, p.weight.numbers.float(), None, *geometry)
    y = sums * p.step().view(-1, 1, 1)
    return y if bias is None else y + bias.view(-1, 1, 1)


# Whether oneDNN computes a convolution rightly, by what decides how it does.
_judgements: dict[tuple[Any, ...], bool] = {}


def judged_convolution(p: Operands, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The first of these two; from where it is met first and is wrong, which the log says, the second."""
    x, weight = p.x.numbers, p.weight.numbers
    key = (x.shape, x.stride(), weight.shape, geometry, torch.get_num_threads())
    if not _judgements.get(key, True):
        return float_convolution(p, bias, *geometry)
    y = integer_convolution(p, bias, *geometry)
    if key in _judgements or not bool(p.step().isfinite().all()):
        return y
    wanted = float_convolution(p, bias, *geometry)
    _judgements[key] = bool(((y - wanted).abs() <= 1e-5 * wanted.abs().max()).all())
    if _judgements[key]:
        return y
    logger.warning(
        "bitwright: oneDNN's integer convolution is wrong for inputs %s, weights %s, stride %s, padding %s; "
        "it is computed in float, which takes longer",
        *(tuple(x.shape), tuple(weight.shape), *geometry[:2]),
    )
    return wanted


class Convolution(torch.autograd.Function):
    """`torch.nn.functional.conv2d` of tensors that are `held`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        y = judged_convolution(Operands.of(x, weight), bias, *geometry)
        if gives_channels_last(x, weight):
            return y.contiguous(memory_format=torch.channels_last)
        return channels_first(y) if lies_last(y) else y.contiguous()

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
            dx, *others = product.linear_gradients(g, inputs, weight, ctx.needs_input_grad)
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
