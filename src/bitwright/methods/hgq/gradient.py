"""How a quantized tensor changes with its bit-width."""

import math
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.grids import LSQ, TQT
from bitwright.kernels.reference import along
from bitwright.quantizer import Quantizer

LN2 = math.log(2.0)


def with_bit_gradient(y: Tensor, x: Tensor, step: Tensor, real: Tensor) -> Tensor:
    """The values of `y`, with the further gradient d y / d real = -ln 2 (y - x).

    One bit more halves the step, and with it the error of rounding. What is clipped has none of this gradient: the
    range is held (see the README). An error above half a step is one of clipping.

    Args:
        y: the quantized form of `x`; both of any shape and dtype. step: distance between neighbouring values, of a
            shape that broadcasts with `x`. real: real-valued bit-width, shape (1,).
    """
    error = (y - x).detach()
    rounding = torch.where(error.abs() <= 0.5 * step.detach(), error, 0.0)
    return y - (LN2 * (real - real.detach())).to(y.dtype) * rounding


class BitSlot:
    """The real-valued bit-width that some quantizers share, a leaf with its own gradient while they train.

    Attributes:
        real: shape (1,), float32. bits: what the quantizers have now, `real` rounded.
    """

    def __init__(self, layer: str, role: str, quantizers: list[Quantizer], owner: str):
        for quantizer in quantizers:
            if not isinstance(quantizer.grid, LSQ | TQT):
                raise BitwrightError(
                    f"{owner}: the grid {quantizer.spec.grid!r} of {quantizer.name} has no step of its own that bits "
                    "could halve; use lsq or tqt"
                )
        bits = {int(q.bits.item()) for q in quantizers}
        if len(bits) > 1:
            raise BitwrightError(f"{owner}: {layer}: {role} bits are {sorted(bits)} by the rules; they must be alike")
        self.layer, self.role, self.quantizers = layer, role, quantizers
        self.bits = bits.pop()
        self.sizes: dict[str, int] = {}
        device = quantizers[0].bits.device
        self.real = torch.full((1,), float(self.bits), device=device, requires_grad=True)
        self.handles = [q.register_forward_hook(self) for q in quantizers]

    def __call__(self, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (quantizer.training and torch.is_grad_enabled()):
            return None
        (x,) = inputs
        shape = quantizer.shape
        self.sizes[quantizer.name] = math.prod(x.shape if shape.role == "weight" else x.shape[1:])
        step = along(quantizer.grid.effective_scale(), x, shape.axis)
        return with_bit_gradient(output, x, step, self.real)

    @property
    def values(self) -> int:
        """How many elements share the width, of one sample for inputs; at least 1, known after a forward pass."""
        return max(sum(self.sizes.values()), 1)

    def set_bits(self, bits: int) -> bool:
        """Give the quantizers `bits`, scales following; whether that changed anything."""
        if bits == self.bits:
            return False
        self.bits = bits
        for quantizer in self.quantizers:
            quantizer.set_bits(bits)
        return True

    def detach(self) -> None:
        """Leave the quantizers alone from now on."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def expected_gain(slope: float, bits: int) -> float:
    """a of loss(b) = const + a 4^-b, whose slope at `bits` is -2 ln 2 a 4^-bits; 0 for a slope that is not negative."""
    return max(-slope, 0.0) * 4.0**bits / (2 * LN2)
