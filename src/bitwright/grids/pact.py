"""PACT: parameterized clipping activation (Choi et al., 2018), original and calibrated (SAT) gradient."""

import torch
from torch import Tensor, nn

from bitwright.grids.base import Affine, CodeRange, Grid, Shape, Stats, make_affine, positive
from bitwright.grids.lsq import mse_scale
from bitwright.kernels import EPS, fake_quantize
from bitwright.kernels.reference import along


def symmetric(codes: CodeRange) -> CodeRange:
    """The codes that reach as far down as up: [-Qp, Qp] when signed (2^b - 1 values), unchanged otherwise."""
    if codes.signed and codes.zero == 0.0:
        return codes._replace(lo=-codes.hi)
    return codes


class PACT(Grid):
    """value = alpha / Qp * round(Qp * clip(x, 0, alpha) / alpha); signed tensors clip at -alpha too.

    Args:
        calibrated: False: dy/dalpha = 1 where x >= alpha (and -1 where x <= -alpha), else 0 (the PACT paper).
            True: inside the range the rounding error q(x/alpha) - x/alpha is added (SAT, Jin 2020).

    PACT regularises alpha with the weights' L2 decay; the trainer gives quantizer parameters no decay by
    default, so pass `quantizer_weight_decay` to follow the paper.
    """

    def __init__(self, shape: Shape, calibrated: bool = False):
        super().__init__(shape)
        self.calibrated = calibrated
        self.alpha = nn.Parameter(torch.ones(shape.channels))

    def step(self, alpha: Tensor, codes: CodeRange) -> Tensor:
        """Distance between neighbouring values, shape (channels,)."""
        return alpha / (codes.hi - codes.zero)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        codes = symmetric(codes)
        alpha, axis = self.alpha.abs() + EPS, self.shape.axis
        if self.calibrated or not alpha.requires_grad:
            return fake_quantize(x, self.step(alpha, codes), codes.zero, codes.lo, codes.hi, estimator, axis)
        frozen = alpha.detach()
        y = fake_quantize(x, self.step(frozen, codes), codes.zero, codes.lo, codes.hi, estimator, axis)
        alpha, frozen = along(alpha, x, axis), along(frozen, x, axis)
        clipped = (x >= frozen).to(x.dtype)
        if codes.signed:
            clipped = clipped - (x <= -frozen).to(x.dtype)
        return y + (alpha - frozen) * clipped

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        codes = symmetric(codes)
        return make_affine(self.step(self.alpha.abs() + EPS, codes), codes.zero, codes)

    @torch.no_grad()
    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        # The paper starts alpha at a constant that suits its nets; the least squared error suits the data.
        codes = symmetric(codes)
        self.alpha.copy_(positive(mse_scale(stats.sample, codes) * (codes.hi - codes.zero).to(stats.sample)))
