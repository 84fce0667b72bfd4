"""Quantized attention: the projections and both products."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids import Shape
from bitwright.kernels import keep_sources
from bitwright.kernels.product import linear
from bitwright.kernels.reproducible import softmax
from bitwright.layers.base import QuantLayer, apply
from bitwright.layers.sums import linear_sums
from bitwright.layers.whole import evaluates, whole_product
from bitwright.quantizer import Quantizer

PRODUCT_SLOTS = ("query_quantizer", "key_quantizer", "value_quantizer", "attention_quantizer")


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    quantizers: dict[str, Quantizer | None],
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scaled: bool = True,
    reproducible: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v with all four operands of the two products quantized.

    Args:
        q, k, v: (..., tokens, d).
        quantizers: one per name of `PRODUCT_SLOTS` (None or missing: float). Probabilities are unsigned.
        mask: additive float mask broadcastable to (..., tokens_q, tokens_k), or None.
        dropout: probability of dropping attention weights (0 outside training).
        scaled: False leaves out the factor 1/sqrt(d), for callers that have scaled q themselves.
        reproducible: as the deployed network computes it (`bitwright.kernels.reproducible`), without gradients.

    Returns:
        The output (..., tokens, d) and the probabilities (..., tokens_q, tokens_k) before quantization.
    """
    # Scaling q before it is quantized leaves the product a plain matmul of two quantized tensors.
    query, key, value, attention = (quantizers.get(slot) for slot in PRODUCT_SLOTS)
    q = apply(query, q * (1.0 / math.sqrt(q.shape[-1])) if scaled else q)
    k = apply(key, k)
    v = apply(value, v)
    reproducible = reproducible and evaluates(q)
    scores = whole_product(q, query, k, key) if reproducible else None
    if scores is None:
        with keep_sources(q, k):
            scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    probabilities = softmax(scores) if reproducible else scores.softmax(-1)
    # Dropout after quantization: its factor 1 / (1 - p) would otherwise reach beyond the calibrated range.
    weights = apply(attention, probabilities)
    if dropout:
        weights = F.dropout(weights, dropout)
    if reproducible:
        out = whole_product(weights, attention, v.transpose(-2, -1), value)
        if out is not None:
            return out, probabilities
    with keep_sources(weights, v):
        return weights @ v, probabilities


class QuantAttentionBase(QuantLayer):
    """Slots of the products' operands, shared by attention layers of any origin."""

    weight_slots: tuple[str, ...] = ()
    input_slots: tuple[str, ...] = PRODUCT_SLOTS

    def input_shape(self, per_channel: bool) -> Shape:
        if per_channel:
            raise BitwrightError("attention products take one scale per tensor; use per_channel: false")
        return Shape("input")

    def product_quantizers(self) -> dict[str, Quantizer | None]:
        """The quantizers of the products by slot."""
        return {slot: getattr(self, slot, None) for slot in PRODUCT_SLOTS}


class QuantMultiheadAttention(QuantAttentionBase, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with quantized in-projection, out-projection and products.

    `weight_quantizer` holds the packed in-projection's quantizer, `input_quantizer` that of query, key and value
    (one for all three, as they are one tensor in self-attention); `out_proj` is a `QuantLinear` of its own.

    Separate key and value widths (`kdim`, `vdim`), `bias_k`/`bias_v`, `add_zero_attn` and nested tensors are refused.
    """

    weight_slots = ("weight_quantizer",)
    input_slots = ("input_quantizer", *PRODUCT_SLOTS)
    reads = ("out_proj",)

    def weight_of(self, slot: str) -> Tensor:
        return self.in_proj_weight

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            return "kdim or vdim differs from embed_dim"
        if module.bias_k is not None or module.add_zero_attn:
            return "bias_k/bias_v or add_zero_attn is set"
        return None

    def projections(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Query, key and value of one quantized input, or of one each."""
        weight = apply(self.weight_quantizer, self.in_proj_weight)
        if len(inputs) == 1:
            with keep_sources(inputs[0], weight):
                return linear(inputs[0], weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True)]

    def whole_projections(self, inputs: list[Tensor]) -> Sequence[Tensor] | None:
        """The same on integers; None where they are not, or where a gradient is wanted."""
        if not evaluates(inputs[0], self.in_proj_weight):
            return None
        weight = (self.in_proj_weight, self.weight_quantizer, self.in_proj_bias)
        made = [linear_sums(x, self.input_quantizer, *weight) for x in inputs]
        parts = [sums.finished().chunk(3, -1) for sums in made if sums is not None]
        return [parts[i % len(parts)][i] for i in range(3)] if parts else None

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
        """As `nn.MultiheadAttention.forward`: `is_causal` is a hint, `attn_mask` decides.

        Raises:
            BitwrightError: `is_causal` without `attn_mask`, which torch refuses too.
        """
        if is_causal and attn_mask is None:
            raise BitwrightError("attention: is_causal=True needs attn_mask as well, as in nn.MultiheadAttention")
        same = query is key and key is value
        if not self.batch_first and query.ndim == 3:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        inputs = [apply(self.input_quantizer, t) for t in ((query,) if same else (query, key, value))]
        reproducible = self.reproducible and not self.training
        packed = self.whole_projections(inputs) if reproducible else None
        if packed is not None:
            q, k, v = packed
        else:
            q, k, v = self.projections(inputs)
        split = lambda t: t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)  # noqa: E731
        mask = merge_masks(attn_mask, key_padding_mask, self.num_heads, q)
        out, probabilities = scaled_dot_product(
            split(q),
            split(k),
            split(v),
            self.product_quantizers(),
            mask,
            self.dropout if self.training else 0.0,
            reproducible=reproducible,
        )
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        if not self.batch_first and out.ndim == 3:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, probabilities.mean(-3) if average_attn_weights else probabilities


def merge_masks(mask: Tensor | None, padding: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """One additive mask (..., heads or 1, tokens_q, tokens_k) from torch's two kinds, boolean or float.

    `like`: the projected queries (..., tokens_q, features), with a batch axis or without.
    """

    def additive(m: Tensor) -> Tensor:
        if m.dtype == torch.bool:
            return torch.zeros_like(m, dtype=like.dtype).masked_fill(m, float("-inf"))
        return m.to(like.dtype)

    merged = None
    if mask is not None:
        merged = additive(mask)
        if merged.ndim == 3 and like.ndim == 3:
            merged = merged.unflatten(0, (-1, heads))
    if padding is not None:
        keys = additive(padding)[..., None, None, :]  # unbatched: (1, 1, tokens_k)
        merged = keys if merged is None else merged + keys
    return merged
