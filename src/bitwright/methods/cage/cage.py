"""CAGE's pull: after every optimizer step the latent weights move towards the grid."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids import DoReFa
from bitwright.methods.base import Method
from bitwright.methods.probe import unwrap
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer

SCHEDULES = ("ramp", "constant")


def strength_at(progress: float, schedule: str = "ramp", silence: float = 0.8) -> float:
    """The share of the full strength, 0 to 1, at `progress` (0 to 1) of the training.

    ramp: 0 up to `silence`, then linearly to 1 at the end. constant: 0 up to `silence`, 1 behind it.
    """
    if progress <= silence:
        return 0.0
    return 1.0 if schedule == "constant" else min(1.0, (progress - silence) / (1.0 - silence))


class _Rounded(nn.Module):
    """An estimator that rounds whatever a quantizer's own estimator does: PEGE mixes while it trains."""

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return v.clamp(lo, hi).round()


def latent_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, Quantizer]]:
    """The parameters that weight quantizers read, by the quantizer's name; a tied weight once.

    Raises:
        BitwrightError: a quantized weight is no parameter, or its grid lies elsewhere than the weight (DoReFa, SAT).
    """
    found: dict[int, tuple[str, nn.Parameter, Quantizer]] = {}
    for name, layer in quant_layers(model).items():
        for slot in layer.weight_slots:
            quantizer = getattr(layer, slot, None)
            if not isinstance(quantizer, Quantizer):
                continue
            weight = layer.weight_of(slot)
            if not isinstance(weight, nn.Parameter):
                raise BitwrightError(f"cage: the weight of {name} is computed from others, so there is none to pull")
            if isinstance(quantizer.grid, DoReFa):
                raise BitwrightError(
                    f"cage: the grid {quantizer.spec.grid!r} of {name} is that of a transformed weight, to which the "
                    "weight itself is not near; use lsq, lsq+, pact, tqt or minmax"
                )
            found.setdefault(id(weight), (f"{name}.{slot}" if name else slot, weight, quantizer))
    return {name: (weight, quantizer) for name, weight, quantizer in found.values()}


class CAGE(Method):
    """w <- w - lr * lam_t * (w - Q(w)) for every quantized weight, after each step of any optimizer.

    The distance to the grid is treated as a second objective beside the loss. The released, decoupled form: like
    decoupled weight decay, but towards the grid. Q is the whole forward value, so weights beyond the clipping bound
    are pulled to it too.

    Args:
        model: prepared; inputs are left alone.
        total_steps: optimizer steps of the whole training.
        lam: strength at the end. Default 10, the published default with AdamW, where lr * lam is about 0.01 at
            most; SGD's larger rates want less.
        silence: the share of training without any pull. Default 0.8, as published.
        schedule: "ramp" (default) or "constant", see `strength_at`.

    lr is the rate of the step just taken. Metric after an epoch: `cage/distance`, the mean of |w - Q(w)|.

    Raises:
        BitwrightError: a value is not accepted, the model has no quantized weights, or `latent_weights` refuses one.
    """

    name = "cage"
    moves_weights = True

    def __init__(
        self, model: nn.Module, total_steps: int, lam: float = 10.0, silence: float = 0.8, schedule: str = "ramp"
    ):
        if not (total_steps >= 1 and lam >= 0 and 0 <= silence < 1):
            raise BitwrightError(
                f"cage: total_steps={total_steps}, lam={lam}, silence={silence} is not accepted; "
                "use total_steps >= 1, lam >= 0, 0 <= silence < 1"
            )
        if schedule not in SCHEDULES:
            raise BitwrightError(f"cage: schedule={schedule!r} is not accepted; use {' or '.join(SCHEDULES)}")
        self.weights = list(latent_weights(unwrap(model)).values())
        if not self.weights:
            raise BitwrightError("cage: no weight of the model is quantized; give the rules a weight quantizer")
        self.total_steps, self.lam, self.silence, self.schedule = total_steps, lam, silence, schedule
        self.steps = 0
        self._rounded = _Rounded()

    def distance(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        """w - Q(w), the shape of `weight`."""
        return weight - quantizer.rounded(weight, self._rounded)

    @torch.no_grad()
    def after_step(self, step: Any) -> None:
        self.steps += 1
        share = strength_at(self.steps / self.total_steps, self.schedule, self.silence)
        if share == 0 or self.lam == 0:
            return
        rates = {id(p): group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
        for weight, quantizer in self.weights:
            if id(weight) in rates:  # a weight that is not trained stays where it is
                weight.sub_(self.distance(weight, quantizer) * (rates[id(weight)] * self.lam * share))

    @torch.no_grad()
    def after_epoch(self, metrics: dict[str, Any]) -> None:
        total = sum(self.distance(w, q).abs().sum().item() for w, q in self.weights)
        metrics["cage/distance"] = total / sum(w.numel() for w, _ in self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
