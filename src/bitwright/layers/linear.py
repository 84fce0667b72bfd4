"""Quantized linear layers and embeddings."""

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.kernels import integer, keep_sources
from bitwright.kernels.codes import held
from bitwright.kernels.product import linear
from bitwright.layers.base import QuantLayer, apply, quantize_to_bytes
from bitwright.layers.sums import linear_sums
from bitwright.layers.whole import evaluates


class QuantProduct(QuantLayer):
    """What linear layers share, however their weight lies: `weight_of` gives it as (out, in)."""

    bias: Tensor | None

    def input_shape(self, per_channel: bool) -> Shape:
        width = self.weight_of("weight_quantizer").shape[1]
        return Shape("input", channels=width if per_channel else 1, axis=-1)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_of("weight_quantizer")
        rows = input.numel() // max(input.shape[-1], 1)
        if self.training and integer.may_multiply(input, weight, rows * weight.numel()):
            x, w = quantize_to_bytes(self.input_quantizer, input, self.weight_quantizer, weight, 128.0)
            if held(x) and held(w):
                return integer.linear(x, w, self.bias)
            with keep_sources(x, w):
                return linear(x, w, self.bias)
        x = apply(self.input_quantizer, input)
        if self.reproducible and not self.training and evaluates(x, weight):
            sums = linear_sums(x, self.input_quantizer, weight, self.weight_quantizer, self.bias)
            if sums is not None:
                return sums.noted()
        w = apply(self.weight_quantizer, weight)
        with keep_sources(x, w):
            return linear(x, w, self.bias)


class QuantLinear(QuantProduct, nn.Linear):
    """`nn.Linear` on a quantized weight and input; any leading axes."""


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`nn.Embedding` with a quantized table (per channel: one scale per row); indices are not quantized.

    `max_norm` (rows renormalised in place) and `sparse` gradients are refused: both need the float table itself.
    """

    input_slots = ()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        return "max_norm or sparse is set" if module.max_norm is not None or module.sparse else None

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            apply(self.weight_quantizer, self.weight),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
