"""LSQ in front of Hardswish and Hardsigmoid: the scale goes a whole number of times into 3, where these bend."""

import torch
from torch import Tensor, nn

from bitwright.grids.base import Affine, CodeRange, make_affine
from bitwright.grids.lsq import LSQ, shared_by
from bitwright.kernels import fake_quantize, scale_gradient

BEND = 3.0
# The code of -3 lies this far below that of 0 at most: it is then a zero point that a byte holds.
MOST_PARTS = 128


def parts_of_bend(scale: Tensor) -> Tensor:
    """n of the scale 3 / n that `scale` (1,) stands for: a whole number from 1 to 128, without gradient."""
    return (BEND / scale.detach().abs()).round().clamp(1, MOST_PARTS)


class HardLSQ(LSQ):
    """value = 3 / n * round(clip(x * n / 3, -Qn, Qp)), n = round(3 / |scale|), the scale learned as LSQ's.

    hardsigmoid(x) = clip(x + 3, 0, 6) / 6 of such a value has the same codes, clipped to those from -n to n, with the
    scale 1 / (2 n) and the zero point -n: no rounding, so a runtime computes it, and Hardswish's product, on integers
    (`bitwright.deploy.hard`). With the range that a norm puts out, n is 30 to 90, and the scale moves by a percent or
    two; rounding passes its gradient on.

    Args:
        init: as in `LSQ`, which this grid is for weights.
    """

    def effective_scale(self) -> Tensor:
        """3 / n, shape (channels,); the gradient is that of the scale itself."""
        parts = parts_of_bend(self.scale)
        hard = torch.full_like(parts, BEND) / parts  # a number / a tensor is a product with its rounded reciprocal
        size = self.scale.abs()
        return hard + (size - size.detach())

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        scale = self.effective_scale()
        if scale.requires_grad:
            scale = scale_gradient(scale, (shared_by(x, self.shape) * codes.hi).rsqrt())
        return fake_quantize(x, scale, codes.zero, codes.lo, codes.hi, estimator, self.shape.axis)

    @torch.no_grad()
    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        return make_affine(self.effective_scale(), codes.zero, codes)
