"""LSQ+: LSQ with a learned offset for inputs (Bhalgat et al., CVPR-W 2020)."""

import torch
from torch import Tensor, nn

from bitwright.grids.base import (
    Affine,
    CodeRange,
    Grid,
    Shape,
    Stats,
    make_affine,
    positive,
)
from bitwright.grids.dorefa import full_range
from bitwright.grids.lsq import shared_by
from bitwright.kernels import EPS, fake_quantize, scale_gradient


class LSQPlus(Grid):
    """Inputs: value = scale * k + offset, k in [0, 2^b - 1], scale and offset learned. Weights: symmetric LSQ.

    Weights start at scale = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1); inputs at the least squared error
    over calibration values (the paper's fit, by a search over fractions of the range).
    """

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.scale = nn.Parameter(torch.ones(shape.channels))
        if shape.role == "input":
            self.offset = nn.Parameter(torch.zeros(shape.channels))
        else:
            self.register_parameter("offset", None)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        codes = self.own_codes(codes)
        count, axis = shared_by(x, self.shape), self.shape.axis
        if self.offset is None:
            return fake_quantize(x, self.scale, codes.zero, codes.lo, codes.hi, estimator, axis, count)
        factor = (count * codes.hi).rsqrt()
        scale, offset = self.scale.abs() + EPS, self.offset
        if scale.requires_grad or offset.requires_grad:
            scale, offset = scale_gradient(scale, factor), scale_gradient(offset, factor)
        # The offset enters as a zero point: its gradient then does not depend on what passes the clip for x,
        # and the values are those of `affine` to the last bit.
        return fake_quantize(x, scale, -offset / scale, codes.lo, codes.hi, estimator, axis)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        codes, scale = self.own_codes(codes), self.scale.abs() + EPS
        return make_affine(scale, codes.zero if self.offset is None else -self.offset / scale, codes)

    def own_codes(self, codes: CodeRange) -> CodeRange:
        """0 ... 2^b - 1 for inputs: with an offset, codes have no sign whatever the data's is."""
        return codes if self.offset is None else full_range(codes)

    @torch.no_grad()
    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        if self.offset is None:
            reach = torch.maximum((stats.mean - 3 * stats.std).abs(), (stats.mean + 3 * stats.std).abs())
            self.scale.copy_(positive(reach) / (codes.hi - codes.lo + 1).to(reach) * 2)
            return
        lo, hi = self.own_codes(codes)[:2]
        best = torch.full_like(stats.minimum, torch.inf)
        middle = (stats.maximum + stats.minimum) / 2
        for i in range(10, 101, 2):
            low = middle + (stats.minimum - middle) * (i / 100)
            scale = positive((stats.maximum - stats.minimum) * (i / 100)) / hi.to(low)
            # Zero padding and ReLU put much mass at 0, so the lower end also stays at the minimum.
            for offset in (low, stats.minimum):
                k = ((stats.sample - offset[:, None]) / scale[:, None]).round().clamp(lo.to(low), hi.to(low))
                error = (k * scale[:, None] + offset[:, None] - stats.sample).square().mean(1)
                better = error < best
                best = torch.where(better, error, best)
                self.scale.copy_(torch.where(better, scale, self.scale))
                self.offset.copy_(torch.where(better, offset, self.offset))

    @torch.no_grad()
    def rescale(self, old: CodeRange, new: CodeRange) -> None:
        # The upper clipping bound stays; with an offset the lower one does too.
        old, new = self.own_codes(old), self.own_codes(new)
        self.scale.mul_((old.hi - old.zero) / (new.hi - new.zero))
