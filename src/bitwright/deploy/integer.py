"""Deployed layers: integer codes in, exact integer sums, one scaling at the end.

Sums are taken in float64, which holds every integer below 2^53 and so is exact whatever the order. With
`placeholder` set, a layer computes nothing and leaves one named node in an exported graph, which `lower` replaces.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.deploy.fold import Weight, along_first
from bitwright.grids import Affine
from bitwright.layers.attention import PRODUCT_SLOTS, merge_masks
from bitwright.layers.conv import same_padding

DOMAIN = "bitwright"


def symbol(kind: str, x: Tensor, shape: Any, dtype: torch.dtype, attributes: dict[str, Any]) -> Tensor:
    """One node of our own domain in the exported graph, standing for a tensor of `shape` and `dtype`."""
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), attributes, dtype=dtype, shape=shape, version=1)


class InputCodes(nn.Module):
    """The integer form of an input quantizer: `forward` gives code - zero, float64, the shape of `x`.

    Attributes:
        name: of the quantizer in the training form. scale: (channels,) or (1,), float32, positive.
        zero: (1,) or (channels,), float32. whole: every zero point is one of the codes. lo, hi: bounds of the code. bits: bit-width.
        axis: channel axis, counted from the end.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, name: str, affine: Affine, axis: int, bits: int):
        super().__init__()
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


class IntLayer(nn.Module):
    """What deployed weight layers share.

    Attributes:
        name: of the layer in the training form. input_quantizer: None for a float input.
        bits: width of the stored weight; 32 for a float one.
        weight_codes: int8 or int16, weight_scale: float32; or weight_float alone, where the weight is not quantized.
        bias: float32 (channels,), or None; with bias_codes (int64 on the grid input scale * weight_scale) it is
            their value, and the codes are what is added.
    """

    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_float: Tensor | None
    bias: Tensor | None
    bias_codes: Tensor | None

    def __init__(
        self,
        name: str,
        weight: Weight | Tensor,
        bias: Tensor | None,
        bias_codes: Tensor | None = None,
        input_quantizer: InputCodes | None = None,
    ):
        super().__init__()
        self.name, self.input_quantizer, self.placeholder = name, input_quantizer, False
        self.packed = weight if isinstance(weight, Weight) else None
        self.bits = self.packed.bits if self.packed else 32
        self.register_buffer("weight_codes", self.packed.numbers if self.packed else None)
        self.register_buffer("weight_scale", self.packed.scale if self.packed else None)
        self.register_buffer("weight_float", weight.detach().float() if isinstance(weight, Tensor) else None)
        self.register_buffer("bias", None if bias is None else bias.float())
        self.register_buffer("bias_codes", bias_codes)

    @property
    def numbers(self) -> Tensor:
        """The weight without its scale, float64."""
        weight = self.weight_codes if self.weight_codes is not None else self.weight_float
        assert weight is not None
        return weight.double()

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
        if self.weight_scale is not None:
            factor = factor * view(self.weight_scale)
        y = sums * factor
        if self.bias is not None and self.bias_codes is None:
            y = y + view(self.bias)
        return y.to(dtype)

    def symbol(self, x: Tensor, shape: Any, dtype: torch.dtype, **attributes: Any) -> Tensor:
        """The node that stands for this layer in an exported graph."""
        return symbol("Layer", x, shape, dtype, {"name": self.name, **attributes})


class IntConv(IntLayer):
    """A convolution over one or two axes.

    Args:
        source: the convolution that it deploys (stride, dilation, groups, padding are read from it).
        same: TensorFlow's "same" padding, which depends on the input's size.
    """

    def __init__(self, source: nn.Conv1d | nn.Conv2d, *, same: bool, **fields: Any):
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
            return self.symbol(x, shape, x.dtype, pads=[p[0] for p in ends] + [p[1] for p in ends])
        numbers, factor = operand(self.input_quantizer, x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(numbers.double(), pads, mode=mode) if any(pads) else numbers.double()
        convolve = F.conv1d if axes == 1 else F.conv2d
        sums = convolve(padded, self.numbers, None, self.stride, 0, self.dilation, self.groups)
        return self.scaled(sums, factor, axes, x.dtype)


class IntLinear(IntLayer):
    """A linear layer over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float to (..., out), the dtype of `x`."""
        if self.placeholder:
            return self.symbol(x, (*x.shape[:-1], self.numbers.shape[0]), x.dtype)
        numbers, factor = operand(self.input_quantizer, x)
        return self.scaled(F.linear(numbers.double(), self.numbers), factor, 0, x.dtype)


class IntEmbedding(IntLayer):
    """A table of codes; rows are looked up as integers and scaled afterwards."""

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


class IntProducts(nn.Module):
    """softmax(q k^T / sqrt(d)) v with exact products; slots as in `bitwright.layers.attention`."""

    def __init__(self, slots: dict[str, InputCodes | None]):
        super().__init__()
        for slot in PRODUCT_SLOTS:
            self.register_module(slot, slots[slot])

    def product(self, left: InputCodes | None, a: Tensor, right: InputCodes | None, b: Tensor, turn: bool) -> Tensor:
        """The product of quantized `a` and quantized `b` (transposed where `turn`), the dtype of `a`."""
        (x, x_factor), (y, y_factor) = operand(left, a), operand(right, b)
        if any(codes is not None and not codes.placeholder for codes in (left, right)):
            x, y = x.double(), y.double()
        y = y.transpose(-2, -1) if turn else y
        return times(x @ y, x_factor * y_factor).to(a.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """q, k, v: (..., tokens, d). Returns the output and the probabilities before quantization."""
        slots = (getattr(self, slot) for slot in PRODUCT_SLOTS)
        query, key, value, attention = slots
        scores = self.product(query, q * (1.0 / math.sqrt(q.shape[-1])), key, k, True)
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        return self.product(attention, probabilities, value, v, False), probabilities


class IntMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` deployed; the packed in-projection is one linear layer, `in_proj`.

    The attributes that torch's encoder layers look at are kept.
    """

    def __init__(self, source: nn.MultiheadAttention, in_proj: IntLinear, products: IntProducts, out_proj: nn.Module):
        super().__init__()
        self.in_proj, self.products, self.out_proj = in_proj, products, out_proj
        self.num_heads, self.head_dim, self.batch_first = source.num_heads, source.head_dim, source.batch_first
        self.embed_dim, self._qkv_same_embed_dim = source.embed_dim, True
        self.in_proj_bias = in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        same = query is key and key is value
        if not self.batch_first and query.ndim == 3:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if same:
            q, k, v = self.in_proj(query).chunk(3, -1)
        else:
            q, k, v = (self.in_proj(t).chunk(3, -1)[i] for i, t in enumerate((query, key, value)))
        split = lambda t: t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)  # noqa: E731
        mask = merge_masks(attn_mask, key_padding_mask, self.num_heads, q)
        out, probabilities = self.products(split(q), split(k), split(v), mask)
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        out = out.transpose(0, 1) if not self.batch_first and out.ndim == 3 else out
        if not need_weights:
            return out, None
        return out, probabilities.mean(-3) if average_attn_weights else probabilities


class IntTimmAttention(nn.Module):
    """`timm.layers.Attention` deployed; its linear layers and norms are modules of their own."""

    def __init__(self, source: Any, products: IntProducts):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = source.num_heads, source.head_dim, source.attn_dim
        self.products = products
        for part in ("qkv", "gate", "q_norm", "k_norm", "norm", "proj"):
            self.register_module(part, getattr(source, part))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(N, tokens, C) to the same; in a boolean mask True means "attend"."""
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mask = attn_mask
        if is_causal:
            mask = x.new_full((tokens, tokens), float("-inf")).triu(1)
        elif mask is not None and not mask.is_floating_point():
            mask = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        out, _ = self.products(self.q_norm(q), self.k_norm(k), v, mask)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return self.proj(out if gate is None else out * gate)
