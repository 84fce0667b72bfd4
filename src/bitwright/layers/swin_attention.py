"""torchvision's window attention with quantized products; imported only where torchvision is in use.

Its forward there reads the weights of `qkv` and `proj` instead of calling them, so their quantizers would never run.
"""

import math

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from bitwright.layers.attention import QuantAttentionBase, scaled_dot_product


def regions(size: tuple[int, int], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """(H, W): a number per position, equal where positions were neighbours before the cyclic shift."""
    numbers = like.new_zeros(size)
    for axis, (extent, width, step) in enumerate(zip(size, window, shift, strict=True)):
        line = like.new_zeros(extent)
        line[extent - width :] = 1
        line[extent - step :] = 2
        numbers = numbers + (3 * line[:, None] if axis == 0 else line)
    return numbers


def to_windows(x: Tensor, window: list[int]) -> Tensor:
    """(B, H, W, C) to (B * windows, positions of a window, C)."""
    tiles = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, window: list[int], size: tuple[int, int]) -> Tensor:
    """The inverse of `to_windows` for maps of (H, W) = `size`."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    tiles = x.unflatten(1, (window[0], window[1])).unflatten(0, (-1, rows, columns))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class QuantShiftedWindowAttention(QuantAttentionBase, ShiftedWindowAttention):
    """`torchvision.models.swin_transformer.ShiftedWindowAttention`; `qkv` and `proj` are layers of their own."""

    reads = ("qkv", "proj")
    scaled = True

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention within windows: (B * windows, positions, C) to the same; `mask` is added to the scores."""
        q, k, v = self.heads(self.qkv(x))
        dropout = self.attention_dropout if self.training else 0.0
        out, _ = scaled_dot_product(
            q, k, v, self.product_quantizers(), mask, dropout, self.scaled, self.reproducible and not self.training
        )
        return self.proj(out.transpose(1, 2).flatten(2))

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The packed projection as three tensors (B * windows, heads, positions, d)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        window = self.window_size
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        size = (x.shape[1], x.shape[2])
        # A window that covers the map needs no shift.
        shift = [0 if w >= s else step for w, s, step in zip(window, size, self.shift_size, strict=True)]
        bias = self.get_relative_position_bias()
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            number = to_windows(regions(size, window, shift, x)[None, ..., None], window)[..., 0]
            apart = (number[:, None, :] != number[:, :, None]).to(x.dtype) * -100.0
            bias = (bias + apart[:, None]).repeat(batch, 1, 1, 1)
        x = from_windows(self.attend(to_windows(x, window), bias), window, size)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        x = F.dropout(x, self.dropout, self.training)
        return x[:, :height, :width].contiguous()


class QuantShiftedWindowAttentionV2(QuantShiftedWindowAttention, ShiftedWindowAttentionV2):
    """The second version: cosine attention with a learned temperature, which multiplies the queries here."""

    scaled = False

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(qkv)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        if self.qkv.bias is not None:  # keys have no bias, whatever the packed vector holds
            k = k - self.qkv.bias.chunk(3)[1].unflatten(0, (self.num_heads, 1, -1))
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v
