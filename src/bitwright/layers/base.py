"""What quantized layers share: slots for quantizers and the two lines that use them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bitwright.grids import Shape
from bitwright.kernels.codes import asking, held
from bitwright.layers.fold import Weight
from bitwright.quantizer import Quantizer
from bitwright.spec import QuantizerSpec


class QuantLayer(nn.Module):
    """Mixin of quantized layers. A slot holds a `Quantizer` or None (that tensor stays float).

    `reads` names the children whose weights the float class uses without calling them; the quantized class calls
    them, so `prepare` swaps the layer whenever it swaps such a child. `reproducible`: whether evaluation computes as
    the deployed network does, to the last bit (`bitwright.layers.reproducible`).
    """

    reproducible = False
    reads: tuple[str, ...] = ()
    weight_slots: tuple[str, ...] = ("weight_quantizer",)
    input_slots: tuple[str, ...] = ("input_quantizer",)
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this float `module` cannot become a layer of this class, or None."""
        return None

    def quantizers(self) -> dict[str, Quantizer]:
        """The slots in use, by name."""
        slots = {name: getattr(self, name, None) for name in (*self.weight_slots, *self.input_slots)}
        return {name: q for name, q in slots.items() if isinstance(q, Quantizer)}

    def weight_shape(self, slot: str, per_channel: bool) -> Shape:
        """Shape of the weight behind `slot`; scales lie along axis 0, the output channels."""
        weight = self.weight_of(slot)
        return Shape(
            "weight",
            channels=weight.shape[0] if per_channel else 1,
            axis=0,
            numel=weight.numel(),
            linear=weight.ndim == 2,
        )

    def weight_of(self, slot: str) -> Tensor:
        """The float weight that the quantizer in `slot` quantizes."""
        del slot
        return self.weight  # pyright: ignore[reportReturnType]

    def outputs_first(self, weight: Tensor) -> Tensor:
        """`weight`, in the layer's own layout, with the output channels along axis 0, as deployment has it."""
        return weight

    def output_scales(self, scale: Tensor) -> Tensor:
        """The scales of a weight quantizer, one per output channel or (1,)."""
        return scale

    def arranged(self, weight: Weight) -> Weight:
        """Integers in the layer's own layout as deployment has them."""
        numbers, scale = self.outputs_first(weight.numbers), self.output_scales(weight.scale)
        return replace(weight, numbers=numbers, scale=scale)

    def input_shape(self, per_channel: bool) -> Shape:
        """Shape of the layer's input; `per_channel` needs a layer that knows its channel axis."""
        raise NotImplementedError

    def make_quantizer(self, slot: str, spec: QuantizerSpec) -> Quantizer:
        """A quantizer for `slot`, not yet attached."""
        if slot in self.weight_slots:
            shape = self.weight_shape(slot, spec.per_channel is not False)
        else:
            shape = self.input_shape(spec.per_channel is True)
        return Quantizer(spec, shape)


def apply(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """`quantizer(x)`, or `x` where there is none."""
    return x if quantizer is None else quantizer(x)


def quantize_to_bytes(
    input_quantizer: Quantizer | None,
    x: Tensor,
    weight_quantizer: Quantizer | None,
    weight: Tensor,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Both quantized, and `bitwright.kernels.codes.held` where their codes fit into bytes.

    offset: what may be added to a signed input's codes.
    """
    with asking(torch.int8):
        w = apply(weight_quantizer, weight)
    with asking(torch.uint8 if held(w) else None, offset):
        return apply(input_quantizer, x), w
