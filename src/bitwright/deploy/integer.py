"""Deployed layers: integer codes in, exact integer sums, one scaling at the end.

Sums are taken in float32 where no partial sum can reach 2^24, else in float64, which holds every integer below 2^53:
they are exact whatever the order. With `placeholder` set, a layer computes nothing and leaves one named node in an
exported graph, which `lower` replaces.
"""

import itertools
import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Affine
from bitwright.kernels.reproducible import scaled
from bitwright.layers.conv import same_padding
from bitwright.layers.fold import Weight, along_first, magnitudes

DOMAIN = "bitwright"
KEEP = "Keep"  # what stands for a product that is rounded to float32 before anything reads it


# Numbers placeholders: the exporter merges equal nodes, and then a module's second call would have no codes of its own.
CALLS = itertools.count()


def symbol(kind: str, x: Tensor, shape: Any, dtype: torch.dtype, attributes: dict[str, Any]) -> Tensor:
    """One node of our own domain in the exported graph, standing for a tensor of `shape` and `dtype`."""
    numbered = {**attributes, "call": next(CALLS)}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), numbered, dtype=dtype, shape=shape, version=1)


# The end of the name of a slot, which the names of tensors in a file leave out.
QUANTIZER = "_quantizer"


class InputCodes(nn.Module):
    """The integer form of an input quantizer: `forward` gives code - zero, float64, the shape of `x`.

    Attributes:
        name: of the quantizer in the training form. label: what its tensors in a file are called by.
        scale: (channels,) or (1,), float32, positive. zero: (1,) or (channels,), float32. whole: every zero
            point is one of the codes.
        lo, hi: bounds of the code. bits: bit-width. axis: channel axis, counted from the end.
        shared: an output quantizer gave the tensor these codes already; taking them again changes nothing.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, name: str, affine: Affine, axis: int, bits: int, shared: bool = False, label: str | None = None):
        super().__init__()
        self.label = name.removesuffix(QUANTIZER) if label is None else label
        self.shared = shared
        self.name, self.lo, self.hi, self.axis, self.bits = name, affine.lo, affine.hi, axis, bits
        self.register_buffer("scale", affine.scale.float())
        self.register_buffer("zero", affine.zero.float())
        # A zero point outside the codes (an LSQ+ offset can be) fits no container either.
        inside = (self.zero == self.zero.round()) & (self.zero >= self.lo) & (self.zero <= self.hi)
        self.whole = bool(inside.all())
        self.shifted = bool((self.zero != 0).any())
        self.placeholder = False

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and zero point serve all channels."""
        return self.scale.numel() == 1 and self.zero.numel() == 1

    @property
    def integer(self) -> bool:
        """Whether sums over this input are integers times one scale."""
        return self.per_tensor and self.whole

    @property
    def reach(self) -> int:
        """The largest |code - zero|, rounded up."""
        return math.ceil(float(torch.maximum(self.zero - self.lo, self.hi - self.zero).max()))

    def along_axis(self, t: Tensor, ndim: int) -> Tensor:
        """A vector over channels viewed so that it meets a tensor of `ndim` axes."""
        return t if t.numel() == 1 else t.view(-1, *[1] * (-self.axis - 1)).expand(*[-1] * -self.axis)

    def codes(self, x: Tensor) -> Tensor:
        """round(x / scale + zero) within bounds: whole numbers in the dtype of `x`, ties as in training."""
        v = x / self.along_axis(self.scale, x.ndim)
        if self.shifted:
            v = v + self.along_axis(self.zero, x.ndim)
        return v.round().clamp(self.lo, self.hi)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x).double() - self.along_axis(self.zero, x.ndim).double()

    def operand(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """(numbers, factor): the quantized `x` is numbers * factor; per-channel scales are in the numbers."""
        if self.placeholder:
            return symbol("Quantize", x, x.shape, x.dtype, {"name": self.name}), 1.0
        if self.per_tensor:
            return self(x), self.scale.double()
        return self(x) * self.along_axis(self.scale, x.ndim).double(), 1.0

    def extra_repr(self) -> str:
        return f"{self.name}, codes {self.lo} to {self.hi}, bits={self.bits}"


def operand(codes: InputCodes | None, x: Tensor) -> tuple[Tensor, Tensor | float]:
    """(numbers, factor) of an operand that may be float."""
    return (x, 1.0) if codes is None else codes.operand(x)


def times(x: Tensor, factor: Tensor | float) -> Tensor:
    """x * factor; a factor that is no tensor is 1 and leaves no node in an exported graph."""
    return x * factor if isinstance(factor, Tensor) else x


class OutputCodes(nn.Module):
    """The integer form of an output quantizer: `forward` gives the values of its codes, the dtype of `x`."""

    def __init__(self, codes: InputCodes):
        super().__init__()
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        return times(*self.codes.operand(x)).to(x.dtype)


class IntLayer(nn.Module):
    """What deployed weight layers share.

    Attributes:
        name: of the layer in the training form. input_quantizer: None for a float input.
        bits: width of the stored weight; 32 for a float one.
        weight_codes: int8 or int16, weight_scale: float32; or weight_float alone, where the weight is not quantized.
        bias: float32 (channels,), or None; with bias_codes (int64 on the grid input scale * weight_scale) it is
            their value, and the codes are what is added.
        reproducible: whether products are scaled as runtimes scale them (`bitwright.layers.reproducible`).
        late_bias: a runtime that merges the layer with the quantizer behind it must not round the bias.
    """

    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_float: Tensor | None
    bias: Tensor | None
    bias_codes: Tensor | None
    input_quantizer: InputCodes | None

    def __init__(
        self,
        name: str,
        weight: Weight | Tensor,
        bias: Tensor | None,
        bias_codes: Tensor | None = None,
        input_quantizer: InputCodes | None = None,
    ):
        super().__init__()
        self.name, self.placeholder = name, False
        if input_quantizer is not None and input_quantizer.shared:
            # No child: it is no quantizer of its own, neither in the file nor for those who compare codes.
            self.__dict__["input_quantizer"] = input_quantizer
        else:
            self.input_quantizer = input_quantizer
        self.late_bias, self.reproducible = False, False
        self.packed = weight if isinstance(weight, Weight) else None
        self.bits = self.packed.bits if self.packed else 32
        self.register_buffer("weight_codes", self.packed.numbers if self.packed else None)
        self.register_buffer("weight_scale", self.packed.scale if self.packed else None)
        self.register_buffer("weight_float", weight.detach().float() if isinstance(weight, Tensor) else None)
        self.register_buffer("bias", None if bias is None else bias.float())
        self.register_buffer("bias_codes", bias_codes)

    @property
    def integer(self) -> bool:
        """Whether the sums are those of 8-bit integers, times one scale per output channel."""
        small = self.weight_codes is not None and self.weight_codes.dtype == torch.int8
        return small and self.input_quantizer is not None and self.input_quantizer.integer

    @property
    def numbers(self) -> Tensor:
        """The weight without its scale, float64."""
        weight = self.weight_codes if self.weight_codes is not None else self.weight_float
        assert weight is not None
        return weight.double()

    @cached_property
    def short_sums(self) -> bool:
        """Whether every partial sum of products is an integer that float32 holds."""
        if not self.integer or self.weight_codes is None or self.input_quantizer is None:
            return False
        largest = int(magnitudes(self.weight_codes).max())
        return largest * self.input_quantizer.reach < 2**24

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """(numbers of the input, numbers of the weight, factor of the input), in a dtype whose sums are exact."""
        numbers, factor = operand(self.input_quantizer, x)
        # A user may allow matrix products in fewer bits.
        exact = self.short_sums and torch.get_float32_matmul_precision() == "highest"
        dtype = torch.float32 if exact else torch.float64
        return numbers.to(dtype), self.numbers.to(dtype), factor

    @property
    def weight(self) -> Tensor:
        """A tensor of no elements, for models that ask a layer's weight where it lives and of what type it is.

        Whoever computed with a weight's numbers would pass the layer by, and with it its quantizers.
        """
        kept = self.weight_float if self.weight_codes is None else self.weight_codes
        assert kept is not None
        return torch.empty(0, device=kept.device)

    @property
    def values(self) -> Tensor:
        """The weight that the layer stands for, float32."""
        if self.weight_codes is None or self.weight_scale is None:
            assert self.weight_float is not None
            return self.weight_float
        return self.weight_codes.float() * along_first(self.weight_scale, self.weight_codes.ndim)

    def scaled(self, sums: Tensor, factor: Tensor | float, trailing: int, dtype: torch.dtype) -> Tensor:
        """Sums of products times the scales, plus the bias; `trailing`: axes behind the channels."""
        view = lambda t: t.double().view(-1, *[1] * trailing)  # noqa: E731
        if self.bias_codes is not None:
            sums = sums + view(self.bias_codes)
        if self.reproducible and self.integer and self.input_quantizer is not None and self.weight_scale is not None:
            bias = None if self.bias is None or self.bias_codes is not None else view(self.bias).float()
            return scaled(sums, self.input_quantizer.scale, view(self.weight_scale).float(), bias)
        if self.weight_scale is not None:
            factor = factor * view(self.weight_scale)
        y = sums * factor
        if self.bias is not None and self.bias_codes is None:
            y = y + view(self.bias)
        return y.to(dtype)

    def symbol(self, x: Tensor, shape: Any, dtype: torch.dtype, **attributes: Any) -> Tensor:
        """The node that stands for this layer in an exported graph."""
        return symbol("Layer", x, shape, dtype, {"name": self.name, **attributes})


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class IntConv(IntLayer):
    """A convolution over one to three axes.

    Args:
        source: the convolution that it deploys (stride, dilation, groups, padding are read from it).
        same: TensorFlow's "same" padding, which depends on the input's size.
    """

    def __init__(self, source: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, same: bool, **fields: Any):
        super().__init__(**fields)
        self.stride, self.dilation, self.groups = source.stride, source.dilation, source.groups
        self.kernel_size, self.padding_mode, self.same = source.kernel_size, source.padding_mode, same
        self.padding = tuple(source._reversed_padding_repeated_twice)

    def pads(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Elements before and after each axis, last axis first, as `F.pad` takes them."""
        if not self.same:
            return self.padding
        numbers = zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple(p for n in reversed([same_padding(*each) for each in numbers]) for p in n)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) float to (N, C_out, ...), the dtype of `x`."""
        axes = len(self.kernel_size)
        sizes = tuple(x.shape[2:])
        pads = self.pads(sizes)
        if self.placeholder:
            ends = [(pads[2 * i], pads[2 * i + 1]) for i in reversed(range(axes))]
            numbers = zip(sizes, ends, self.dilation, self.kernel_size, self.stride, strict=True)
            out = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in numbers]
            shape = (x.shape[0], self.numbers.shape[0], *out)
            around = [p[0] for p in ends] + [p[1] for p in ends]
            return self.symbol(x, shape, x.dtype, pads=around, sizes=list(sizes))
        numbers, weight, factor = self.operands(x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(numbers, pads, mode=mode) if any(pads) else numbers
        sums = CONVOLVE[axes](padded, weight, None, self.stride, 0, self.dilation, self.groups).double()
        return self.scaled(sums, factor, axes, x.dtype)


class IntLinear(IntLayer):
    """A linear layer over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float to (..., out), the dtype of `x`."""
        if self.placeholder:
            return self.symbol(x, (*x.shape[:-1], self.numbers.shape[0]), x.dtype)
        numbers, weight, factor = self.operands(x)
        return self.scaled(F.linear(numbers, weight).double(), factor, 0, x.dtype)


class IntEmbedding(IntLayer):
    """A table of codes; rows are looked up as integers and scaled afterwards."""

    @property
    def num_embeddings(self) -> int:
        """How many rows, for models that ask."""
        return self.numbers.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Features of a row, for models that ask."""
        return self.numbers.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        """Integer indices (...) to float32 (..., features)."""
        if self.placeholder:
            return self.symbol(index, (*index.shape, self.numbers.shape[1]), torch.float32)
        return F.embedding(index, self.values)


class IntAdd(nn.Module):
    """A sum of two quantized operands, each with its own scale."""

    def __init__(self, input_quantizer: InputCodes | None, other_quantizer: InputCodes | None):
        super().__init__()
        self.input_quantizer, self.other_quantizer = input_quantizer, other_quantizer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (x, x_factor), (y, y_factor) = operand(self.input_quantizer, a), operand(self.other_quantizer, b)
        return (times(x, x_factor) + times(y, y_factor)).to(a.dtype)
