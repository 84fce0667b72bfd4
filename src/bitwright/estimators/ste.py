"""The straight-through estimators (Bengio 2013; clipped form: Hubara 2016)."""

from torch import Tensor, nn

from bitwright.kernels import KernelRule


def round_clipped(v: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """`(k, c)`: the codes with a straight-through gradient inside [lo, hi], and the clipped values.

    c + (round(c) - c) is exact in floating point (round(c) = 0 or within a factor two of c: Sterbenz), so the
    codes are integers to the last bit.
    """
    c = v.clamp(lo, hi)
    return c + (c.round() - c).detach(), c


class ClippedSTE(nn.Module):
    """dk/dv = 1 for lo <= v <= hi, 0 outside: the estimator of LSQ, PACT and DoReFa."""

    kernel_rule = KernelRule("clipped_ste")

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return round_clipped(v, lo, hi)[0]


class STE(nn.Module):
    """dx_q/dx = 1 everywhere, also where the value is clipped (Bengio 2013).

    The scale keeps the gradient of the clipped form. With weights this keeps clipped elements trainable.
    """

    through_clip = True
    kernel_rule = KernelRule("ste")

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return round_clipped(v, lo, hi)[0]
