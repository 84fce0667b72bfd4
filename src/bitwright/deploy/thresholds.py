"""One scale for all channels of a layer that quantizers of 1 bit alone read: its biases say the rest.

Such a layer puts out scale * n + bias, n a sum of integers, and all that is seen of it is whether that is more than
half a step: whether n lies beyond some boundary. With another scale and the bias that belongs to it the boundary is
where it was, and so is every code. A file then holds one bit a channel for the scales, their signs, and biases that are
no wider than the sums.
"""

from dataclasses import dataclass

from torch import Tensor

from bitwright.deploy.freeze import Plan
from bitwright.deploy.integer import InputCodes
from bitwright.layers.fold import Weight, magnitudes
from bitwright.layers.significant import MOST, rounded


def only_step(plan: Plan) -> float | None:
    """The scale of the quantizers of codes 0 and 1 that alone read a layer, behind a norm with gains; else None."""
    steps = {float(c.scale) if c.per_tensor and (c.lo, c.hi, float(c.zero)) == (0, 1, 0) else 0.0 for c in plan.readers}
    step = steps.pop() if plan.alone and len(steps) == 1 and getattr(plan.norm, "weight", None) is not None else 0.0
    return step or None


def has_lattice(codes: InputCodes) -> bool:
    """Whether sums over an input are multiples of a half."""
    return codes.per_tensor and bool((2 * codes.zero == (2 * codes.zero).round()).all())


@dataclass(frozen=True)
class Boundaries:
    """A layer in front of quantizers with the codes 0 and 1.

    weight, bias: after folding, the bias (channels,) float64. codes: of its input. step: scale of the quantizers.
    """

    weight: Weight
    bias: Tensor
    codes: InputCodes
    step: float

    def moved(self, live: Tensor) -> tuple[Tensor, Tensor]:
        """(scales, biases), (channels,) float64, under which `live` channels give every input the code that it had.

        The scales are one number, with the signs that they had, about the median of what they were.
        """
        unit, multiple = self.codes.scale.double(), self.weight.multiple
        sizes = (unit * self.weight.scale.double()).abs()
        # An odd part of a step: between two sums, where the bias is on the grid of sums.
        odd = 2 * max(round((self.step / (multiple * float(sizes[live].median())) - 1) / 2), 0) + 1
        scale = rounded(self.step / (multiple * odd) / unit, MOST)
        # Sums are multiples of this, and no further from 0 than `most`.
        apart = multiple * (1.0 if self.codes.integer else 0.5)
        most = magnitudes(self.weight.numbers).double() * self.codes.reach
        boundary = (self.step / 2 - self.bias) / sizes
        boundary = ((boundary / apart).floor() + 0.5) * apart
        boundary = boundary.clamp(-most - apart / 2, most + apart / 2)
        return scale * self.weight.scale.sign(), self.step / 2 - boundary * scale * unit
