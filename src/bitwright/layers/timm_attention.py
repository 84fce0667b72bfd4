"""timm's `Attention` with quantized products; imported only where timm is in use."""

from timm.layers.attention import Attention
from torch import Tensor

from bitwright.layers.attention import QuantAttentionBase, scaled_dot_product


class QuantTimmAttention(QuantAttentionBase, Attention):
    """`timm.layers.Attention`; `qkv`, `proj` and `gate` are linear layers of their own, quantized as such."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        mask = attn_mask
        if is_causal:
            mask = x.new_full((tokens, tokens), float("-inf")).triu(1)
        elif mask is not None and not mask.is_floating_point():
            # Here True means "attend", the opposite of nn.MultiheadAttention.
            mask = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        dropout = self.attn_drop.p if self.training else 0.0
        exact = self.reproducible and not self.training
        out, _ = scaled_dot_product(q, k, v, self.product_quantizers(), mask, dropout, reproducible=exact)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))
