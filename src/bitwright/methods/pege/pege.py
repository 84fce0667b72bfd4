"""PEGE's curriculum: the share of replaced elements (and, if asked, the pull) over training."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.estimators import PEGE
from bitwright.methods.base import Method
from bitwright.prepare import quant_layers, quantizers
from bitwright.quantizer import Quantizer

CURVES = ("log", "linear", "cosine", "constant")


def curriculum(curve: str, progress: float, start: float = 0.0, base: float = 10.0) -> float:
    """A value that rises from `start` to 1 as `progress` goes from 0 to 1, and exactly 1 from there on.

    log: log_B(B^start + (B - B^start) progress): early and fast, then ever slower. linear; cosine: the half wave
    that starts and ends flat; constant: 1 always.

    Args:
        curve: one of `CURVES`. progress: >= 0. start: in [0, 1]. base: B > 1, of the logarithm.
    """
    if curve == "constant" or progress >= 1:
        return 1.0
    if curve == "log":
        low = base**start
        return min(1.0, math.log(low + (base - low) * progress, base))
    share = progress if curve == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (1 - start) * share


class _Error(nn.Module):
    """An estimator that notes the sum of |x - x_q|^2 of what a grid gives it, x clipped and normalised to [0, 1]."""

    total = 0.0

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        c = v.clamp(lo, hi)
        self.total += ((c - c.round()) / (hi - lo)).double().square().sum().item()
        return c


@torch.no_grad()
def discretization_error(model: nn.Module) -> float:
    """Mean of |x - x_q|^2 over all elements of the weights quantized with PEGE; 0.0 where there are none."""
    error, count = _Error(), 0
    for layer in quant_layers(model).values():
        for slot in layer.weight_slots:
            quantizer = getattr(layer, slot, None)
            if isinstance(quantizer, Quantizer) and isinstance(quantizer.estimator, PEGE):
                weight = layer.weight_of(slot).detach()
                quantizer.rounded(weight, error)
                count += weight.numel()
    return error.total / max(count, 1)


class PEGECurriculum(Method):
    """Moves the replacement rate of every `pege` estimator from `start` to 1, then holds it there.

    Args:
        model: prepared with the estimator "pege" for weights, inputs or both; all share one rate.
        total_steps: optimizer steps of the whole training.
        curve: "log" (default, the published shape), or the controls "linear" and "cosine"; "constant" replaces
            everything from the start (u without p).
        base: B of the logarithm, > 1. Default 10, a reconstruction: no source gives it.
        start: rate at the first step. Default 0.
        reach: the fraction of training at which the rate is 1. Default 0.7: norm statistics, and the net, then
            have the last 30 % to settle at what will be deployed.
        strength_curve: "constant" (default): the estimators' own strength throughout; a curve of `CURVES` raises it
            from 0 to that value over the same time.

    Metrics after an epoch: `pege/rate` and `pege/discretization_error` (mean |x - x_q|^2 over weights).

    Raises:
        BitwrightError: a value is not accepted, or no quantizer of the model uses the pege estimator.
    """

    name = "pege"

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        curve: str = "log",
        base: float = 10.0,
        start: float = 0.0,
        reach: float = 0.7,
        strength_curve: str = "constant",
    ):
        for key, value in (("curve", curve), ("strength_curve", strength_curve)):
            if value not in CURVES:
                raise BitwrightError(f"pege: {key}={value!r} is not accepted; use {', '.join(CURVES)}")
        if not (total_steps >= 1 and base > 1 and 0 <= start <= 1 and 0 < reach <= 1):
            raise BitwrightError(
                f"pege: total_steps={total_steps}, base={base}, start={start}, reach={reach} is not accepted; "
                "use total_steps >= 1, base > 1, 0 <= start <= 1, 0 < reach <= 1"
            )
        self.estimators = [q.estimator for q in quantizers(model).values() if isinstance(q.estimator, PEGE)]
        if not self.estimators:
            raise BitwrightError(
                "pege: no quantizer of the model uses the estimator 'pege'; set estimator: pege in the rules"
            )
        self.model = model
        self.curve, self.base, self.start = curve, base, start
        self.strength_curve = strength_curve
        self.duration = reach * total_steps
        self.steps = 0
        self._apply()

    @property
    def rate(self) -> float:
        """The present share of replaced elements."""
        return curriculum(self.curve, self.steps / self.duration, self.start, self.base)

    def _apply(self) -> None:
        """Write rate and strength into the estimators' buffers, in place (compiled code reads them there)."""
        pull = curriculum(self.strength_curve, self.steps / self.duration, 0.0, self.base)
        for estimator in self.estimators:
            estimator.rate.fill_(self.rate)
            estimator.strength.fill_(pull * estimator.full_strength)

    def after_step(self, step: Any) -> None:
        self.steps += 1
        self._apply()

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics["pege/rate"] = self.rate
        metrics["pege/discretization_error"] = discretization_error(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self._apply()
