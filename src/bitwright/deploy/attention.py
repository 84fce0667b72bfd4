"""Attention deployed: linear layers as everywhere, both products on integers."""

import math
from typing import Any

from torch import Tensor, nn

from bitwright.deploy.elementary import SOFTMAX
from bitwright.deploy.integer import KEEP, InputCodes, IntLinear, operand, symbol, times
from bitwright.kernels.reproducible import scaled, softmax
from bitwright.layers.attention import PRODUCT_SLOTS, merge_masks


class IntProducts(nn.Module):
    """softmax(q k^T / sqrt(d)) v with exact products; slots as in `bitwright.layers.attention`.

    reproducible: as there. placeholder: softmax and the second product leave a node each in an exported graph.
    """

    def __init__(self, slots: dict[str, InputCodes | None], reproducible: bool = False):
        super().__init__()
        self.reproducible, self.placeholder = reproducible, False
        for slot in PRODUCT_SLOTS:
            self.register_module(slot, slots[slot])

    def product(self, left: InputCodes | None, a: Tensor, right: InputCodes | None, b: Tensor, turn: bool) -> Tensor:
        """The product of quantized `a` and quantized `b` (transposed where `turn`), the dtype of `a`."""
        (x, x_factor), (y, y_factor) = operand(left, a), operand(right, b)
        if any(codes is not None and not codes.placeholder for codes in (left, right)):
            x, y = x.double(), y.double()
        y = y.transpose(-2, -1) if turn else y
        scales = [codes.scale for codes in (left, right) if codes is not None and codes.integer]
        if self.reproducible and len(scales) == 2 and not self.placeholder:
            return scaled(x @ y, *scales)
        return times(x @ y, x_factor * y_factor).to(a.dtype)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaled: bool = True
    ) -> tuple[Tensor, Tensor]:
        """q, k, v: (..., tokens, d); without `scaled`, q carries its factor already.

        Returns the output and the probabilities before quantization.
        """
        query, key, value, attention = (getattr(self, slot) for slot in PRODUCT_SLOTS)
        scores = self.product(query, q * (1.0 / math.sqrt(q.shape[-1])) if scaled else q, key, k, True)
        scores = scores if mask is None else scores + mask
        if not self.reproducible:
            probabilities = scores.softmax(-1)
        elif self.placeholder:
            probabilities = symbol(SOFTMAX, scores, scores.shape, scores.dtype, {})
        else:
            probabilities = softmax(scores)
        out = self.product(attention, probabilities, value, v, False)
        if self.reproducible and self.placeholder:
            out = symbol(KEEP, out, out.shape, out.dtype, {})
        return out, probabilities


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
        self.qkv, self.proj, self.gate = source.qkv, source.proj, source.gate
        self.q_norm, self.k_norm, self.norm = source.q_norm, source.k_norm, source.norm

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


def window_attend(layer: Any, products: IntProducts, x: Tensor, mask: Tensor) -> Tensor:
    """`attend` of torchvision's window attention with exact products; the rest of its forward stays as it is."""
    q, k, v = layer.heads(layer.qkv(x))
    out, _ = products(q, k, v, mask, layer.scaled)
    return layer.proj(out.transpose(1, 2).flatten(2))
