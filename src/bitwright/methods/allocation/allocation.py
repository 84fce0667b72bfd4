"""Bit-widths from an integer program over measured sensitivities, set once, early in training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitwright.costs import CostTable, LayerCost, parse_budget
from bitwright.costs.assignment import kinds, make_rows, solve, total
from bitwright.errors import BitwrightError
from bitwright.methods.adjustable import ROLES, adjustable_layers, bit_means
from bitwright.methods.allocation.sensitivity import sensitivities
from bitwright.methods.base import Method
from bitwright.methods.budget import check_limits
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.spec import MAX_BITS


class Allocation(Method):
    """Gives every layer the bits that a budget allows where they matter most; then training goes on with them.

    After step `steps` the outputs' divergence from the float network is measured with one layer's weights, or one
    layer's inputs, at each candidate width and everything else in float, on the batches of these steps; the sum of
    what was measured is minimised under the budget (`bitwright.costs.assignment.solve`). Measuring is forward passes
    without gradient: layers x 2 x candidates a batch.

    Args:
        model: prepared and calibrated, better at 8 bits than at few: scales follow from there.
        costs: `bitwright.costs.cost_table(model, example)` or a `LayerCost` per layer.
        budget: {"bitops": number, "size": bytes, "latency": milliseconds}, one or several, over the whole network;
            numbers or "0.51G", "120KB", "5ms". A latency needs `cost_table(..., latencies=...)`.
        candidates: bits to choose from. Default 2, 3, 4, 5, 6 and 8.
        steps: batches to measure on, one per optimizer step. Default 4.
        fixed: patterns (as in rules) of layers whose bits are left alone. Default first and last.

    `summary()` holds widths, cost, budget and the sensitivities; metrics after an epoch: `allocation/weight_bits`,
    `allocation/input_bits` (means).

    Raises:
        BitwrightError: a value is not accepted, nothing is left to allocate, or the budget cannot be met.
    """

    name = "allocation"
    sets_bits = True

    def __init__(
        self,
        model: nn.Module,
        costs: CostTable | Sequence[LayerCost],
        budget: dict[str, float | int | str],
        candidates: Sequence[int] = (2, 3, 4, 5, 6, 8),
        steps: int = 4,
        fixed: Sequence[str] = ("first", "last"),
    ):
        self.candidates = sorted(set(candidates))
        if not self.candidates or not all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in self.candidates):
            raise BitwrightError(f"allocation: candidates={list(candidates)} is not accepted; use bits 1 to {MAX_BITS}")
        if steps < 1:
            raise BitwrightError(f"allocation: steps={steps} is not accepted; use a whole number >= 1")
        self.budget = parse_budget(budget, "allocation")
        if not self.budget:
            raise BitwrightError("allocation: give a budget, bitops, size or latency")
        self.model, self.needed = unwrap(model), steps
        self.layers = adjustable_layers(self.model, fixed, "allocation")
        index = {name: i for i, name in enumerate(self.layers)}
        self.rows = make_rows(costs, self.model, index, "allocation")
        least = [(self.candidates[0], self.candidates[0])] * len(self.layers)
        check_limits(self.budget, self.rows, least, f"all layers at {self.candidates[0]} bits", "allocation")
        self.steps = 0
        shape = (len(self.layers), len(ROLES), len(self.candidates))
        self.measured = torch.zeros(shape, dtype=torch.float64)

    def after_step(self, step: Any) -> None:
        if self.steps == self.needed:
            return
        self.steps += 1
        inputs = step.batch.inputs
        places = [layer[role] for layer in self.layers.values() for role in ROLES]
        with step.autocast(inputs.device):
            found = sensitivities(self.model, inputs, places, self.candidates)
        self.measured += mean_over_ranks(found).cpu().view_as(self.measured) / self.needed
        if self.steps == self.needed:
            self._apply(self._solved())

    def _solved(self) -> list[tuple[int, int]]:
        """(weight bits, input bits) per layer; a role without quantizers costs and gains nothing."""
        pairs = [(w, a) for w in self.candidates for a in self.candidates]
        losses = [
            [float(weight[self.candidates.index(w)] + given[self.candidates.index(a)]) for w, a in pairs]
            for weight, given in self.measured
        ]
        chosen = solve(self.rows, [pairs] * len(self.layers), losses, self.budget)
        if chosen is None:
            raise BitwrightError("allocation: no assignment of the candidate bits lies inside the budget")
        return chosen

    def _apply(self, chosen: list[tuple[int, int]]) -> None:
        for layer, pair in zip(self.layers.values(), chosen, strict=True):
            for role, bits in zip(ROLES, pair, strict=True):
                for quantizer in layer[role]:
                    quantizer.set_bits(bits)

    def widths(self) -> dict[str, dict[str, int]]:
        """{layer: {role: bits}} now."""
        return {n: {r: int(q[0].bits.item()) for r, q in layer.items() if q} for n, layer in self.layers.items()}

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics.update(bit_means(self.name, self.widths()))

    def summary(self) -> dict[str, Any]:
        widths = self.widths()
        pairs = [(each.get("weight", 0), each.get("input", 0)) for each in widths.values()]
        return {
            "widths": widths,
            "cost": {kind: total(self.rows, kind, pairs) for kind in kinds(self.rows)},
            "budget": dict(self.budget),
            "candidates": self.candidates,
            "sensitivities": dict(zip(self.layers, self.measured.tolist(), strict=True)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "measured": self.measured.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["measured"].shape != self.measured.shape:
            raise BitwrightError("allocation: the checkpoint was measured for other layers or candidates")
        self.steps, self.measured = int(state["steps"]), state["measured"].clone()
