"""DoReFa-Net's quantizers (Zhou et al., 2016)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bitwright.grids.base import Affine, CodeRange, Grid, Shape, Stats, make_affine
from bitwright.kernels import fake_quantize


def dorefa_transform(w: Tensor) -> Tensor:
    """tanh(w) / max|tanh(w)|, in [-1, 1]; the maximum is over the whole tensor and takes part in the gradient.

    A tensor of zeros stays one, and its gradient finite.
    """
    t = torch.tanh(w)
    largest = t.abs().amax()
    return t / torch.where(largest == 0, 1.0, largest)


def full_range(codes: CodeRange) -> CodeRange:
    """The codes counted from 0: 0 ... 2^b - 1, for grids that place their zero point themselves."""
    return codes._replace(lo=codes.lo - codes.lo, hi=codes.hi - codes.lo, zero=0.0)


class DoReFa(Grid):
    """Weights: 2 q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1. Inputs: q(clip(x, 0, 1)), or clip(x, -1, 1) if signed.

    q(u) = round((2^b - 1) u) / (2^b - 1): the middle of the codes is the value 0, so signed tensors have no code for
    zero. Nothing is learned; there is one scale whatever was asked for, because the published transform normalises
    by the maximum of the whole tensor.
    """

    def __init__(self, shape: Shape):
        super().__init__(replace(shape, channels=1))

    def numbers(self, codes: CodeRange) -> tuple[Tensor, Tensor | float, CodeRange]:
        """(scale, zero, codes) of this grid, scale of shape (1,)."""
        if self.shape.role == "weight" or codes.signed:
            codes = full_range(codes)
            return 2.0 / codes.hi, codes.hi / 2.0, codes
        return 1.0 / codes.hi, 0.0, codes

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        scale, zero, codes = self.numbers(codes)
        if self.shape.role == "weight":
            x = dorefa_transform(x)
        return fake_quantize(x, scale, zero, codes.lo, codes.hi, estimator)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        return make_affine(*self.numbers(codes))

    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        """Nothing to set: the range is fixed."""
