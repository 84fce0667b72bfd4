"""SAT: scale-adjusted training (Jin, Yang, Liao, 2019/2020): DoReFa weights rescaled, PACT calibrated."""

import math

import torch
from torch import Tensor, nn

from bitwright.estimators.ste import ClippedSTE
from bitwright.grids.base import Affine, CodeRange, Shape, make_affine
from bitwright.grids.dorefa import DoReFa
from bitwright.grids.pact import PACT


class SATWeight(DoReFa):
    """DoReFa weights times the constant 1 / (sqrt(n_out) std(W_q)), the standard deviation detached.

    n_out is the number of output channels (times the kernel's positions for a convolution).

    Args:
        rescale: None (default): rescale linear layers only; convolutions followed by a BatchNorm need none
            (section 3.3 of the paper). True and False decide for every layer.
    """

    def __init__(self, shape: Shape, rescale: bool | None = None):
        super().__init__(shape)
        self.rescaled = shape.linear if rescale is None else rescale

    def constant(self, quantized: Tensor) -> Tensor:
        """1 / (sqrt(n_out) std(W_q)), a scalar without gradient; 1 where all weights have the same value."""
        n_out = quantized.shape[self.shape.axis] * math.prod(quantized.shape[2:])
        std = quantized.detach().std(correction=min(1, quantized.numel() - 1))
        return torch.where(std > 0, 1.0 / (math.sqrt(n_out) * std), 1.0)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        quantized = super().forward(x, codes, estimator)
        return quantized * self.constant(quantized) if self.rescaled else quantized

    @torch.no_grad()
    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        assert x is not None, "the scale of a SAT weight depends on the weight"
        scale, zero, wide = self.numbers(codes)
        if self.rescaled:
            scale = scale * self.constant(super().forward(x, codes, ClippedSTE()))
        return make_affine(scale, zero, wide)


def sat_input(shape: Shape) -> PACT:
    """SAT's activation quantizer: PACT with the calibrated gradient of alpha."""
    return PACT(shape, calibrated=True)
