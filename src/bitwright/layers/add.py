"""The residual sum as a module, so that rules can reach it."""

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids import Shape
from bitwright.layers.base import QuantLayer, apply
from bitwright.quantizer import Quantizer


class Add(nn.Module):
    """a + b."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class QuantAdd(QuantLayer, Add):
    """a + b on quantized operands: `input_quantizer` for `a`, `other_quantizer` for `b`, each with its own scale."""

    weight_slots = ()
    input_slots = ("input_quantizer", "other_quantizer")
    other_quantizer: Quantizer | None

    def input_shape(self, per_channel: bool) -> Shape:
        if per_channel:
            raise BitwrightError("a residual add has no channel axis of its own; use per_channel: false")
        return Shape("input")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return apply(self.input_quantizer, a) + apply(self.other_quantizer, b)
