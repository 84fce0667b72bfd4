"""TQT: trained thresholds on power-of-two scales (Jain et al., MLSys 2020, arXiv 1903.08066).

From memory of the paper, whose text was not at hand: the threshold in the logarithm, and ceil passing its gradient on.
"""

import math

import torch
from torch import Tensor, nn

from bitwright.grids.base import Affine, CodeRange, Grid, Shape, Stats, make_affine
from bitwright.grids.lsq import mse_scale, normal_step
from bitwright.kernels import fake_quantize


def power_of_two(log2_scale: Tensor) -> Tensor:
    """2^ceil(l), exactly, with the gradient ln 2 * 2^ceil(l): ceil passes it on. The shape of `log2_scale`."""
    hard = torch.exp2(log2_scale.detach().ceil())
    return hard * torch.exp2(log2_scale - log2_scale.detach())


class TQT(Grid):
    """value = 2^e * round(clip(x / 2^e, -Qn, Qp)), e = ceil(log2_scale), learned in the logarithm.

    The scale of fixed-point hardware: to go from one grid to another is a shift. The paper learns the logarithm of the
    clipping threshold, 2^(e + b - 1) for signed tensors: the same parameter up to a constant.

    Starts at the power of two with the least squared error, half a power away from the next one up or down. The
    gradient sums over a tensor's elements without a factor: use an optimizer that divides by its size (Adam;
    in a recipe `optimizer.quantizer_lr` sets the rate of scales), or `lsq` under SGD.

    Where the bits change, inputs keep their range and weights follow the best step, as in `LSQ`. Use 2 bits or more: at
    1 bit sums and means of such values often lie exactly between two codes, where the training form's float32
    rounds one way and the integer form the other, and `verify` refuses the file.
    """

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.log2_scale = nn.Parameter(torch.zeros(shape.channels))

    def effective_scale(self) -> Tensor:
        """The scale, a power of two, shape (channels,)."""
        return power_of_two(self.log2_scale)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        return fake_quantize(x, self.effective_scale(), codes.zero, codes.lo, codes.hi, estimator, self.shape.axis)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        return make_affine(self.effective_scale(), codes.zero, codes)

    @torch.no_grad()
    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        low = mse_scale(stats.sample, codes).log2().floor()
        errors = [squared_error(stats.sample, torch.exp2(e), codes) for e in (low, low + 1)]
        self.log2_scale.copy_(torch.where(errors[0] <= errors[1], low, low + 1) - 0.5)

    @torch.no_grad()
    def rescale(self, old: CodeRange, new: CodeRange) -> None:
        if self.shape.role == "weight":
            self.log2_scale.add_((normal_step(new) / normal_step(old)).log2().to(self.log2_scale))
        else:
            self.log2_scale.add_(math.log2(float((old.hi - old.lo + 1) / (new.hi - new.lo + 1))))


def squared_error(sample: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Mean squared error per channel of `sample` (channels, n) on the grid of `scale` (channels,)."""
    k = (sample / scale[:, None] + codes.zero).round().clamp(codes.lo.to(sample), codes.hi.to(sample))
    return ((k - codes.zero) * scale[:, None] - sample).square().mean(1)
