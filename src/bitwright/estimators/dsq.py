"""DSQ: differentiable soft quantization (Gong et al., ICCV 2019)."""

import math

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.estimators.ste import round_clipped
from bitwright.kernels import KernelRule


def dsq_slope(v: Tensor, alpha: float) -> Tensor:
    """Derivative of the soft staircase at `v` (units of codes): 0.5 * s * k * sech^2(k (v - m)).

    The staircase is i + (s tanh(k (v - m)) + 1) / 2 on [i, i + 1], m = i + 1/2, with k = ln(2 / alpha - 1) and
    s = 1 / (1 - alpha) (eqs. 4 to 7 with Delta = 1), so it meets the hard staircase at both ends of the interval.
    """
    k = math.log(2.0 / alpha - 1.0)
    s = 1.0 / (1.0 - alpha)
    d = v - torch.floor(v) - 0.5
    return 0.5 * s * k * (1.0 - torch.tanh(k * d) ** 2)


class DSQ(nn.Module):
    """Hard rounding forward, the slope of a soft staircase backward.

    Args:
        alpha: characteristic of the staircase, in (0, 1): the smaller, the closer to the hard staircase.
            Default 0.2, where public code starts it; it is a constant here, not learned.
    """

    characteristic: Tensor

    def __init__(self, alpha: float = 0.2):
        super().__init__()
        if not 0.0 < alpha < 1.0:
            raise BitwrightError(f"estimator_options.alpha of 'dsq': {alpha} is not accepted; use 0 < alpha < 1")
        self.alpha = alpha
        self.register_buffer("characteristic", torch.full((1,), float(alpha)), persistent=False)

    @property
    def kernel_rule(self) -> KernelRule:
        """This estimator in the fused kernels' terms."""
        return KernelRule("dsq", self.characteristic)

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        k, c = round_clipped(v, lo, hi)
        if k.requires_grad:
            slope = dsq_slope(c.detach(), self.alpha)
            k.register_hook(lambda g: g * slope)
        return k
