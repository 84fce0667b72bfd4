"""EWGS: element-wise gradient scaling (Lee, Kim, Ham, CVPR 2021)."""

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.estimators.ste import round_clipped
from bitwright.kernels import KernelRule


def ewgs_gradient(g: Tensor, error: Tensor, delta: Tensor) -> Tensor:
    """g * (1 + delta * sign(g) * (x_n - x_q)) (eq. 3), `error` = x_n - x_q on the range normalised to [0, 1]."""
    return g + delta * g.abs() * error


class EWGS(nn.Module):
    """Gradients grow where they push a value further from its code, and shrink where they pull it closer.

    Args:
        delta: the scaling factor. The paper re-estimates it from the Hessian trace during training:
            `bitwright.methods.ewgs.EWGSDelta` does so and starts from 0; without it, delta stays as given
            (default 1e-3, the paper's fixed variant).
    """

    delta: Tensor

    def __init__(self, delta: float = 1e-3):
        super().__init__()
        if not delta >= 0:
            raise BitwrightError(f"estimator_options.delta of 'ewgs': {delta} is not accepted; use a number >= 0")
        self.register_buffer("delta", torch.full((1,), float(delta)))

    @property
    def kernel_rule(self) -> KernelRule:
        """This estimator in the fused kernels' terms."""
        return KernelRule("ewgs", self.delta)

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        k, c = round_clipped(v, lo, hi)
        if k.requires_grad:
            error = ((c - k) / (hi - lo)).detach()
            delta = self.delta
            k.register_hook(lambda g: ewgs_gradient(g, error, delta))
        return k
