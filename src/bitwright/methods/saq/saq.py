"""SAQ: the gradient is taken where the loss is worst around the quantized weights."""

from typing import Any

from torch import nn

from bitwright.errors import BitwrightError
from bitwright.methods.base import Method
from bitwright.methods.two_pass import TwoPass


class SAQ(Method):
    """The gradient of L(Q(w) + e), e = rho g / |g| with g the gradient at Q(w): weights in flat valleys.

    Perturbing quantized weights, not latent ones, is the released form: a small e on a latent weight is eaten by
    rounding. Two forward and two backward passes a step. Scales and shifts of the model's norms are perturbed
    along and put back; running statistics follow the first pass alone.

    Args:
        model: prepared.
        rho: length of e, in the units of the weights, over all layers together. Default 0.4 (the authors' code,
            ResNet-20 at 4 bits; 0.3 for ResNet-18 on ImageNet).

    Metric after an epoch: `saq/sharpness`, the mean of L(Q(w) + e) - L(Q(w)) over its batches.

    Raises:
        BitwrightError: rho is negative, or no weight is quantized.
    """

    name = "saq"

    def __init__(self, model: nn.Module, rho: float = 0.4):
        if not rho >= 0:
            raise BitwrightError(f"saq: rho={rho} is not accepted; use a number >= 0")
        self.rho, self.passes = rho, TwoPass(model, "saq")
        self.sharpness, self.count = 0.0, 0

    def backward(self, step: Any) -> None:
        _, rise = self.passes.backward(step, self.rho)
        self.sharpness, self.count = self.sharpness + rise, self.count + 1

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics["saq/sharpness"] = float(self.sharpness) / max(self.count, 1)
        self.sharpness, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sharpness": float(self.sharpness), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sharpness, self.count = float(state["sharpness"]), int(state["count"])
