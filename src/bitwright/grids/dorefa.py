"""DoReFa-Net's quantizers (Zhou et al., 2016)."""

import torch
from torch import Tensor, nn

from bitwright.grids.base import EPS, Affine, CodeRange, Grid, Stats, make_affine
from bitwright.kernels import fake_quantize


def dorefa_transform(w: Tensor) -> Tensor:
    """tanh(w) / max|tanh(w)|, in [-1, 1]; the maximum is over the whole tensor and takes part in the gradient."""
    t = torch.tanh(w)
    return t / (t.abs().amax() + EPS)


def full_range(codes: CodeRange) -> CodeRange:
    """Codes 0 ... 2^b - 1, whose middle (2^b - 1)/2 is the value 0: DoReFa's weights have no code for zero."""
    hi = codes.hi - codes.lo
    return codes._replace(lo=codes.lo - codes.lo, hi=hi)


class DoReFa(Grid):
    """Weights: 2 q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1. Inputs: q(clip(x, 0, 1)), or clip(x, -1, 1) if signed.

    q(u) = round((2^b - 1) u) / (2^b - 1). Nothing is learned; weights are scaled per tensor whatever was asked
    for, because the published transform normalises by the maximum of the whole tensor.
    """

    def transform(self, x: Tensor, codes: CodeRange) -> Tensor:
        return dorefa_transform(x) if self.shape.role == "weight" else x

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
