"""HGQ: bit-widths follow the gradient of the loss and of what they cost."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.costs import CostTable, LayerCost
from bitwright.costs.assignment import make_rows, total
from bitwright.costs.bitops import FLOAT_BITS
from bitwright.errors import BitwrightError
from bitwright.methods.adjustable import ROLES, adjustable_layers, bit_means
from bitwright.methods.base import Method
from bitwright.methods.budget import BUDGET_RULES, Budget, meet_budget, smooth_budget
from bitwright.methods.hgq.gradient import BitSlot, expected_gain
from bitwright.methods.options import require
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.spec import MAX_BITS

MEMORY = 0.99  # of the running mean of a width's gradient, from which the final assignment is made


class HGQ(Method):
    """Learns the bits of every layer's weights and inputs with the gradients of ordinary training.

    A real-valued width is rounded for every quantized operation; its gradient is -ln 2 (x_q - x) times the gradient
    of x_q (`with_bit_gradient`), plus the multiplier times the slope of the cost, divided by the root of the values
    that share the width. Adam, of its own, makes the step. Widths start at the rules' bits: 8, or a little above what
    the budget allows.

    Args:
        model: prepared and calibrated, on grids `lsq` or `tqt`.
        total_steps: optimizer steps of the whole training.
        costs: `bitwright.costs.cost_table(model, example)`, or a `LayerCost` (or plain triple) per layer.
        budget: {"bitops": number, "size": bytes}, one or both, over the whole network; numbers or "0.51G", "120KB".
            Met from below, within 1 % where an assignment of whole bits exists. None: then `beta`.
        beta: without a budget, the weight of BitOPs / (BitOPs at the start) in the loss: a number, or [first, last],
            between which it goes in the logarithm while widths move.
        eta: Adam's rate in bits a step. Default: twice what the way from the start to `floor` needs.
        floor: fewest bits, 1 to 7. Default 2.
        warmup_steps: steps before widths move. Default 5 % of training.
        freeze_at: fraction of training at which widths become integers for good (and a budget is met). Default 0.7.
        fixed: patterns (as in rules) of layers whose bits are left alone. Default first and last.
        rule: how a budget drives its multiplier, "pid" (default) or "dual" (`bitwright.constraints`), along a path
            that is log-linear over the first 60 % of the time in which widths move.

    Load a checkpoint's model state before the method's own state.

    Metrics after an epoch: `hgq/weight_bits`, `hgq/input_bits` (means), `hgq/bitops`, `hgq/size`, `hgq/lambda_...` or
    `hgq/beta`. `summary()` holds widths, their path, cost and budget.

    Raises:
        BitwrightError: a value is not accepted, a grid is another one, nothing is left to learn, or the budget cannot
            be met.
    """

    name = "hgq"
    sets_bits = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        costs: CostTable | Sequence[LayerCost],
        budget: dict[str, float | int | str] | None = None,
        beta: float | Sequence[float] | None = None,
        eta: float | None = None,
        floor: int = 2,
        warmup_steps: int | None = None,
        freeze_at: float = 0.7,
        fixed: Sequence[str] = ("first", "last"),
        rule: str = "pid",
    ):
        need = partial(require, self.name)
        need(total_steps >= 1, "total_steps", total_steps, "a whole number >= 1")
        need(isinstance(floor, int) and 1 <= floor < MAX_BITS, "floor", floor, "1 to 7")
        need(eta is None or eta >= 0, "eta", eta, "a number >= 0")
        need(0 < freeze_at <= 1, "freeze_at", freeze_at, "0 < fraction <= 1")
        need(rule in BUDGET_RULES, "rule", rule, " or ".join(BUDGET_RULES))
        need((budget is None) != (beta is None), "beta", beta, "either a budget or beta")
        ends = [beta] if isinstance(beta, int | float) else list(beta or [1.0])
        need(len(ends) in (1, 2) and min(ends) > 0, "beta", beta, "a number > 0 or [first, last]")
        warmup = round(0.05 * total_steps) if warmup_steps is None else warmup_steps
        self.deadline = max(1, round(freeze_at * total_steps))
        need(0 <= warmup < self.deadline, "warmup_steps", warmup, f"less than the freeze at step {self.deadline}")
        self.warmup, self.floor, self.betas = warmup, floor, (float(ends[0]), float(ends[-1]))
        model = unwrap(model)
        layers = adjustable_layers(model, fixed, self.name)
        self.rows = make_rows(costs, model, {name: i for i, name in enumerate(layers)}, self.name)
        self.budget = Budget(smooth_budget(budget, self.name), self.rows, rule, 0.1, self.name)
        self.groups = [
            {role: BitSlot(name, role, layer[role], self.name) for role in ROLES if layer[role]}
            for name, layer in layers.items()
        ]
        self.slots = [slot for group in self.groups for slot in group.values()]
        self.budget.check(list(layers), self.in_pairs([floor] * len(self.slots), FLOAT_BITS), floor)
        first = max(slot.bits for slot in self.slots)
        self.eta = 2.0 * (first - floor) / (self.deadline - warmup) if eta is None else eta
        self.optimizer = torch.optim.Adam([slot.real for slot in self.slots], lr=self.eta)
        self.means = torch.zeros(len(self.slots), dtype=torch.float64)
        self.at_start = self.cost("bitops")
        self.steps, self.done = 0, False
        self.path = [(0, slot.layer, slot.role, slot.bits) for slot in self.slots]

    def in_pairs(self, values: Sequence[Any], missing: Any) -> list[tuple[Any, Any]]:
        """One value per slot as (weight, input) per layer, `missing` for a role without quantizers."""
        given = iter(values)
        return [
            (next(given) if "weight" in g else missing, next(given) if "input" in g else missing) for g in self.groups
        ]

    def pairs(self) -> list[tuple[int, int]]:
        """(weight bits, input bits) of every layer now, 32 where float."""
        return self.in_pairs([slot.bits for slot in self.slots], FLOAT_BITS)

    def cost(self, kind: str) -> float:
        """ "bitops" or "size" (bytes) of the whole network at the present bits."""
        return total(self.rows, kind, self.pairs())

    def after_step(self, step: Any) -> None:
        self.steps += 1
        if self.done:
            return
        found = torch.cat([torch.zeros_like(s.real) if s.real.grad is None else s.real.grad for s in self.slots])
        self.optimizer.zero_grad()
        if self.steps >= self.deadline:
            self._finish()
        elif self.steps > self.warmup:
            self._move(mean_over_ranks(found).double().cpu())  # so that all make the same move

    def _move(self, gradients: Tensor) -> None:
        """One step of Adam on all widths; quantizers follow."""
        if not bool(torch.isfinite(gradients).all()):
            return
        self.means.lerp_(gradients, 1 - MEMORY)
        progress = (self.steps - self.warmup) / (self.deadline - self.warmup)
        self.budget.drive(self.pairs(), progress / 0.6)  # over 60 %: then the controller does not wind up
        slopes = gradients + self._price(progress)
        for slot, slope in zip(self.slots, slopes.to(self.slots[0].real), strict=True):
            slot.real.grad = slope.reshape(1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for slot in self.slots:
                slot.real.clamp_(self.floor, MAX_BITS)
            wanted = torch.cat([slot.real for slot in self.slots]).tolist()
        for slot, real in zip(self.slots, wanted, strict=True):
            self._set(slot, math.floor(real + 0.5))

    def _set(self, slot: BitSlot, bits: int) -> None:
        if slot.set_bits(bits):
            self.path.append((self.steps, slot.layer, slot.role, bits))

    def beta_at(self, progress: float) -> float:
        """The weight of the cost without a budget, `progress` from 0 to 1."""
        first, last = self.betas
        return first * (last / first) ** progress

    def _price(self, progress: float) -> Tensor:
        """Slope of the weighted costs in every width, over the root of the values that share it; float64."""
        bits = [torch.tensor(float(s.bits), dtype=torch.float64, requires_grad=True) for s in self.slots]
        pairs = self.in_pairs(bits, FLOAT_BITS)
        limits = self.budget.constraints
        weights = {k: (c.multiplier, c.target) for k, c in limits.items()}
        weights = weights or {"bitops": (self.beta_at(progress), self.at_start)}
        terms = (m * total(self.rows, kind, pairs) / unit for kind, (m, unit) in weights.items())
        slopes = torch.autograd.grad(sum(terms, 0.0 * bits[0]), bits, materialize_grads=True)
        shared = torch.tensor([s.values for s in self.slots], dtype=torch.float64)
        return torch.stack(slopes) / shared.sqrt()

    def _finish(self) -> None:
        """Widths become integers for good; with a budget, the nearest assignment that meets it."""
        pairs = self.pairs()
        if self.budget:
            gains = [expected_gain(m, s.bits) for m, s in zip(self.means.tolist(), self.slots, strict=True)]
            least = 1e-3 * sum(gains) / len(gains) or 1.0
            found = self.in_pairs([max(gain, least) for gain in gains], None)
            pairs = meet_budget(self.rows, pairs, found, self.budget.limits, self.floor, self.name)
        for group, pair in zip(self.groups, pairs, strict=True):
            for role, slot in group.items():
                self._set(slot, pair[ROLES.index(role)])
        self._stop()

    def _stop(self) -> None:
        for slot in self.slots:
            slot.real.data.fill_(float(slot.bits))
            slot.detach()
        self.done = True

    def widths(self) -> dict[str, dict[str, int]]:
        """{layer: {role: bits}} now."""
        return {next(iter(g.values())).layer: {role: slot.bits for role, slot in g.items()} for g in self.groups}

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics.update(bit_means(self.name, self.widths()))
        metrics.update({f"hgq/{kind}": self.cost(kind) for kind in ("bitops", "size")})
        metrics.update({f"hgq/lambda_{k}": c.multiplier for k, c in self.budget.constraints.items()})
        if not self.budget:
            progress = (self.steps - self.warmup) / (self.deadline - self.warmup)
            metrics["hgq/beta"] = self.beta_at(min(max(progress, 0.0), 1.0))

    def summary(self) -> dict[str, Any]:
        return {
            "widths": self.widths(),
            "path": [list(p) for p in self.path],
            "cost": {kind: self.cost(kind) for kind in ("bitops", "size")},
            "budget": dict(self.budget.limits),
            "frozen": self.done,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "done": self.done,
            "real": [s.real.detach().clone() for s in self.slots],
            "pending": [None if s.real.grad is None else s.real.grad.clone() for s in self.slots],
            "adam": self.optimizer.state_dict(),
            "means": self.means.clone(),
            "at_start": self.at_start,
            **self.budget.state_dict(),
            "path": [list(p) for p in self.path],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["real"]) != len(self.slots):
            raise BitwrightError(
                f"hgq: the checkpoint holds {len(state['real'])} widths, this run learns {len(self.slots)}"
            )
        for slot, real, pending in zip(self.slots, state["real"], state["pending"], strict=True):
            wanted = math.floor(float(real) + 0.5)
            slot.bits = int(slot.quantizers[0].bits.item())
            if slot.bits != wanted:
                raise BitwrightError(
                    f"hgq: {slot.quantizers[0].name} has {slot.bits} bits where the checkpoint says {wanted}; "
                    "load the model's state before the method's"
                )
            slot.real.data.copy_(real)
            slot.real.grad = None if pending is None else pending.to(slot.real)
        self.optimizer.load_state_dict(state["adam"])
        self.means, self.at_start = state["means"].clone(), float(state["at_start"])
        self.budget.load_state_dict(state)
        self.path = [(s, n, r, b) for s, n, r, b in state["path"]]
        self.steps = int(state["steps"])
        if state["done"]:
            self._stop()
