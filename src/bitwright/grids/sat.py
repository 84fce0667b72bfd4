"""SAT: scale-adjusted training (Jin, Yang, Liao, 2019/2020): DoReFa weights rescaled, PACT calibrated."""

import math

import torch
from torch import Tensor, nn

from bitwright.grids.base import EPS, Affine, CodeRange, Shape, make_affine
from bitwright.grids.dorefa import DoReFa, dorefa_transform
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
        """1 / (sqrt(n_out) std(W_q)), a scalar without gradient."""
        positions = math.prod(quantized.shape[2:])
        n_out = quantized.shape[0] * positions
        return 1.0 / (math.sqrt(n_out) * quantized.detach().std() + EPS)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        quantized = super().forward(x, codes, estimator)
        return quantized * self.constant(quantized) if self.rescaled else quantized

    @torch.no_grad()
    def constant_of(self, x: Tensor, codes: CodeRange) -> Tensor | float:
        """The factor by which the weight `x` is rescaled now."""
        if not self.rescaled:
            return 1.0
        scale, zero, codes = self.numbers(codes)
        k = (dorefa_transform(x) / scale + zero).round().clamp(codes.lo, codes.hi)
        return self.constant((k - zero) * scale)

    def transform(self, x: Tensor, codes: CodeRange) -> Tensor:
        return dorefa_transform(x) * self.constant_of(x, codes)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        assert x is not None, "the scale of a SAT weight depends on the weight"
        scale, zero, wide = self.numbers(codes)
        return make_affine(scale * self.constant_of(x, codes), zero, wide)


def sat_input(shape: Shape) -> PACT:
    """SAT's activation quantizer: PACT with the calibrated gradient of alpha."""
    return PACT(shape, calibrated=True)
