"""Budget rules: a value, a target, and a rule that turns the gap between them into a multiplier.

Values are taken relative to their target, g = value / target, so that weights and gains have no unit and serve any
budget. With slack s = g - 1 (positive: over budget):

| rule | penalty in the loss | multiplier d penalty / d g | state |
|---|---|---|---|
| `fixed` | w g | w | none |
| `hinge2` | w max(0, s)^2 | 2 w max(0, s) | none |
| `signed` | sg(w s) g | w s: negative below target, so the value grows back | none |
| `dual` | lambda s | lambda, which moves by rate * s and stays >= 0 | lambda |
| `pid` | lambda g | lambda = w exp(p e + i sum(e) + d (e - e_old)), e = ln g | sum(e), e_old |

`fixed` is what AdaQAT has, `hinge2` the penalty of differentiable quantization (DQ), `signed` CSQ's, `dual` the dual
ascent of constrained learning (PD-QAT), `pid` the controller on the logarithm of the cost of HGQ2.
"""

import math
from typing import Any, overload

from torch import Tensor

from bitwright.errors import BitwrightError

RULES = ("fixed", "hinge2", "signed", "dual", "pid")


class Constraint:
    """value <= target, enforced by a multiplier.

    Args:
        target: the budget, > 0, in any unit (the value has the same).
        rule: one of `RULES`.
        weight: w above, > 0; for `dual` the initial lambda (>= 0).
        rate: step of dual ascent, > 0.
        gains: (p, i, d) of `pid`, >= 0. Default (1.0, 0.02, 0.0).

    Attributes:
        multiplier: the present multiplier, a float; multiply it with the slope of value / target.

    Raises:
        BitwrightError: a value is not accepted.
    """

    def __init__(
        self,
        target: float,
        rule: str = "pid",
        weight: float = 1.0,
        rate: float = 0.01,
        gains: tuple[float, float, float] = (1.0, 0.02, 0.0),
    ):
        if rule not in RULES:
            raise BitwrightError(f"constraint: rule={rule!r} is not accepted; use {', '.join(RULES)}")
        if not (target > 0 and math.isfinite(target)):
            raise BitwrightError(f"constraint: target={target} is not accepted; use a finite number > 0")
        if not (weight >= 0 and (weight > 0 or rule == "dual") and rate > 0):
            raise BitwrightError(f"constraint: weight={weight}, rate={rate} is not accepted; use numbers > 0")
        if len(gains) != 3 or not all(g >= 0 for g in gains):
            raise BitwrightError(f"constraint: gains={gains} is not accepted; use three numbers >= 0 (p, i, d)")
        self.target, self.rule, self.weight, self.rate = float(target), rule, float(weight), float(rate)
        self.gains = (float(gains[0]), float(gains[1]), float(gains[2]))
        self.multiplier = 0.0 if rule in ("hinge2", "signed") else self.weight
        self._sum, self._last = 0.0, 0.0

    @overload
    def penalty(self, value: Tensor) -> Tensor: ...
    @overload
    def penalty(self, value: float) -> float: ...

    def penalty(self, value: Tensor | float) -> Tensor | float:
        """The term to add to a loss; differentiable where `value` is a tensor, and of its shape."""
        g = value / self.target
        if self.rule == "fixed":
            return self.weight * g
        if self.rule == "hinge2":
            over = (g - 1).clamp(min=0) if isinstance(g, Tensor) else max(g - 1, 0.0)
            return self.weight * over * over
        if self.rule == "signed":
            slack = g.detach() - 1 if isinstance(g, Tensor) else g - 1
            return self.weight * slack * g
        return self.multiplier * (g - 1) if self.rule == "dual" else self.multiplier * g

    def update(self, value: float, target: float | None = None) -> float:
        """Observe `value` and move the multiplier, which is returned.

        Args:
            value: the present cost, > 0 for `pid`.
            target: what it should be *now*, where the budget is approached along a path; None: the target.
        """
        g = value / (self.target if target is None else target)
        if self.rule == "hinge2":
            self.multiplier = 2 * self.weight * max(g - 1, 0.0)
        elif self.rule == "signed":
            self.multiplier = self.weight * (g - 1)
        elif self.rule == "dual":
            self.multiplier = max(0.0, self.multiplier + self.rate * (g - 1))
        elif self.rule == "pid":
            error = math.log(g)
            self._sum += error
            p, i, d = self.gains
            power = p * error + i * self._sum + d * (error - self._last)
            self.multiplier = self.weight * math.exp(min(max(power, -50.0), 50.0))
            self._last = error
        return self.multiplier

    def state_dict(self) -> dict[str, Any]:
        """Multiplier and the controller's memory."""
        return {"multiplier": self.multiplier, "sum": self._sum, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.multiplier, self._sum, self._last = (float(state[k]) for k in ("multiplier", "sum", "last"))
