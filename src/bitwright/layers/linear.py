"""Quantized linear layers and embeddings."""

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.kernels import keep_sources
from bitwright.kernels.product import linear
from bitwright.layers.base import QuantLayer, apply
from bitwright.layers.sums import linear_sums
from bitwright.layers.whole import evaluates


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` on a quantized weight and input; any leading axes."""

    def input_shape(self, per_channel: bool) -> Shape:
        return Shape("input", channels=self.in_features if per_channel else 1, axis=-1)

    def forward(self, input: Tensor) -> Tensor:
        x = apply(self.input_quantizer, input)
        if self.reproducible and not self.training and evaluates(x, self.weight):
            sums = linear_sums(x, self.input_quantizer, self.weight, self.weight_quantizer, self.bias)
            if sums is not None:
                return sums.noted()
        w = apply(self.weight_quantizer, self.weight)
        with keep_sources(x, w):
            return linear(x, w, self.bias)


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
