"""Min-max: the range of the data itself, nothing learned (Jacob et al., CVPR 2018)."""

from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids.base import Affine, CodeRange, Grid, Shape, Stats, make_affine
from bitwright.grids.pact import symmetric
from bitwright.kernels import EPS, fake_quantize


class MinMax(Grid):
    """scale = max|x| / Qp; unsigned: max(x) / Qp. Weights use their present extremes, inputs the statistic asked for.

    Args:
        statistic: "running" (default): moving average of the batches' extremes while training, fixed in
            evaluation. "batch": each training batch's own extremes; evaluation uses the moving average.
        momentum: weight of the newest batch in the moving average (default 0.1, as BatchNorm).
        offset: inputs only: True uses min *and* max with an integer zero point (Jacob et al., eq. 13), so that
            0 is represented exactly; the default False is symmetric, or starts at 0 when unsigned.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        shape: Shape,
        statistic: Literal["running", "batch"] = "running",
        momentum: float = 0.1,
        offset: bool = False,
    ):
        super().__init__(shape)
        if statistic not in ("running", "batch"):
            raise BitwrightError(
                f"grid_options.statistic of 'minmax': {statistic!r} is not accepted; use 'running' or 'batch'"
            )
        if not 0.0 < momentum <= 1.0:
            raise BitwrightError(
                f"grid_options.momentum of 'minmax': {momentum!r} is not accepted; use 0 < momentum <= 1"
            )
        self.statistic, self.momentum = statistic, momentum
        self.offset = offset and shape.role == "input"
        self.register_buffer("low", torch.zeros(shape.channels))
        self.register_buffer("high", torch.ones(shape.channels))

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(min, max) of `x` per scale, shape (channels,), without gradient."""
        x = x.detach()
        if self.shape.channels == 1:
            return x.amin().reshape(1), x.amax().reshape(1)
        axes = [a for a in range(x.ndim) if a != self.shape.axis % x.ndim]
        return x.amin(axes), x.amax(axes)

    def range_now(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The extremes that quantize `x` now; while training, inputs also move the running ones."""
        if self.shape.role == "weight" and x is not None:
            return self.extremes(x)
        if x is None or not self.training or x.numel() == 0:
            return self.low, self.high
        low, high = self.extremes(x)
        self.low.lerp_(low.to(self.low), self.momentum)
        self.high.lerp_(high.to(self.high), self.momentum)
        return (low, high) if self.statistic == "batch" else (self.low, self.high)

    def numbers(self, low: Tensor, high: Tensor, codes: CodeRange) -> tuple[Tensor, Tensor | float, CodeRange]:
        """(scale, zero, codes), scale of shape (channels,)."""
        if not self.offset:
            codes = symmetric(codes)
            reach = torch.maximum(-low, high) if codes.signed else high.clamp(min=0.0)
            return reach / (codes.hi - codes.zero) + EPS, codes.zero, codes
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / (codes.hi - codes.lo) + EPS
        return scale, (codes.lo - low / scale).round().clamp(codes.lo, codes.hi), codes

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        low, high = self.range_now(x)
        scale, zero, codes = self.numbers(low, high, codes)
        return fake_quantize(x, scale, zero, codes.lo, codes.hi, estimator, self.shape.axis)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        low, high = (self.low, self.high) if x is None else self.extremes(x)
        return make_affine(*self.numbers(low, high, codes))

    @torch.no_grad()
    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        self.low.copy_(stats.minimum)
        silent = (stats.minimum == 0) & (stats.maximum == 0)
        self.high.copy_(torch.where(silent, torch.ones_like(stats.maximum), stats.maximum))
