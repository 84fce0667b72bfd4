"""What an assignment of bit-widths costs, and the assignment that meets budgets exactly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from bitwright.costs import CostRow, CostTable, bitops, size_bytes
from bitwright.costs.bitops import FLOAT_BITS
from bitwright.costs.table import layer_bits
from bitwright.errors import BitwrightError
from bitwright.prepare import quant_layers
from bitwright.spec import MAX_BITS

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "kib": 1024.0, "mib": 1024.0**2}


class LayerCost(NamedTuple):
    """One layer: dotted name, multiply-accumulates per sample, elements of its weight."""

    name: str
    macs: int
    weights: int


@dataclass(frozen=True)
class Row:
    """A layer (or a product of an attention layer) and where its bits come from: a learned group, or fixed numbers.

    macs; weights: how many are stored. group: index of its group, or None. weight_bits, input_bits: None: the group's.
    product: both operands are activations, so the first has the group's input bits too.
    """

    macs: int
    weights: int
    group: int | None
    weight_bits: int | None
    input_bits: int | None
    product: bool = False

    def bits(self, assignment: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(weight bits, input bits) under one (weight, input) pair per group."""
        pair = (0, 0) if self.group is None else assignment[self.group]
        w = pair[1 if self.product else 0] if self.weight_bits is None else self.weight_bits
        return w, pair[1] if self.input_bits is None else self.input_bits

    def cost(self, kind: str, w: int, a: int) -> float:
        """BitOPs or bytes at w and a bits."""
        return float(bitops(self.macs, w, a) if kind == "bitops" else size_bytes(self.weights, w))


def make_rows(costs: Any, model: nn.Module, groups: dict[str, int]) -> list[Row]:
    """Rows from a `CostTable`, or from records of layers.

    Args:
        costs: `bitwright.costs.cost_table(model, example)`: then totals are the table's at any bits, with products of
            attention, biases, norms and scales. Or a sequence of its rows, of `LayerCost` or of plain triples.
        groups: {layer: index of the group that learns its bits}.

    Raises:
        BitwrightError: a `LayerCost` names no module.
    """
    layers, modules = quant_layers(model), dict(model.named_modules())
    rows = []
    for record in costs.rows if isinstance(costs, CostTable) else costs:
        record = record if isinstance(record, CostRow) else LayerCost(*record)
        if isinstance(record, CostRow):
            given = (record.weight_bits, record.input_bits)
            stored = round(record.size_bytes * 8 / record.weight_bits)
        elif record.name in modules:
            given, stored = layer_bits(modules[record.name]), int(record.weights)
        else:
            raise BitwrightError(f"adaqat: costs names {record.name!r}, which the model does not have")
        product = record.name not in modules
        owner = record.name.rpartition(".")[0] if product else record.name
        learned = owner in layers and owner in groups
        own = [None if learned and b != FLOAT_BITS else b for b in given]
        rows.append(Row(int(record.macs), stored, groups[owner] if learned else None, own[0], own[1], product))
    if isinstance(costs, CostTable):
        rows.append(Row(0, costs.float_parameters + costs.scales, None, FLOAT_BITS, FLOAT_BITS))
    return rows


def total(rows: Sequence[Row], kind: str, assignment: Sequence[tuple[int, int]]) -> float:
    """Cost of the whole network; float tensors count as 32 bits."""
    return sum(row.cost(kind, *row.bits(assignment)) for row in rows)


def parse_budget(budget: dict[str, float | int | str] | None) -> dict[str, float]:
    """{"bitops": number, "size": bytes} from numbers or strings such as "0.51G" and "120KB" (KB = 1000 bytes).

    Raises:
        BitwrightError: another key, or a value that is no positive amount.
    """
    found: dict[str, float] = {}
    for key, value in (budget or {}).items():
        if key not in ("bitops", "size"):
            raise BitwrightError(f"adaqat: budget.{key} is not accepted; use bitops and size")
        parts = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
        unit = parts[2].removesuffix("b" if key == "size" else "bitops") if parts else ""
        unit = f"{unit}b" if unit in ("ki", "mi") else unit
        try:
            amount = float(parts[1]) * UNITS[unit] if parts and not isinstance(value, bool) else 0.0
        except (KeyError, ValueError):
            amount = 0.0
        if not 0 < amount < float("inf"):
            raise BitwrightError(f"adaqat: budget.{key}={value!r} is not accepted; use a number > 0, '0.5G' or '120KB'")
        found[key] = amount
    return found


def meet_budget(
    rows: Sequence[Row],
    present: Sequence[tuple[int, int]],
    curvature: Sequence[tuple[float | None, float | None]],
    budget: dict[str, float],
    floor: int,
    closeness: float = 0.99,
) -> list[tuple[int, int]]:
    """The assignment near `present` with the least estimated loss sum a 4^-b that meets every budget (ours).

    Widths may leave their learned values by one bit, and by further ones only if no assignment so near lies
    between `closeness` times the budget and the budget. Solved exactly, as an integer linear program: one
    choice of (weight bits, input bits) per group.

    Args:
        rows: every layer. present: learned (weight, input) bits per group. curvature: a of both, per group; None
            where there is no such learned width, which then keeps its bits.
        budget: {"bitops": ..., "size": ...} as by `parse_budget`. floor: fewest bits.

    Raises:
        BitwrightError: no assignment is inside the budget.
    """
    for reach, low in [(r, closeness) for r in range(1, MAX_BITS)] + [(MAX_BITS, 0.0)]:
        options = [near(pair, a, reach, floor) for pair, a in zip(present, curvature, strict=True)]
        # The solver's tolerance may let a budget be passed by a millionth; only then ask for a little less.
        for high in (1.0, 1.0 - 3e-6):
            chosen = solve(rows, options, curvature, budget, low, high)
            if chosen is not None and all(total(rows, kind, chosen) <= limit for kind, limit in budget.items()):
                return chosen
    least = ", ".join(f"{kind} {limit:g}" for kind, limit in budget.items())
    raise BitwrightError(f"adaqat: no assignment of {floor} to {MAX_BITS} bits lies inside the budget ({least})")


def near(pair: tuple[int, int], a: tuple[float | None, float | None], reach: int, floor: int) -> list[tuple[int, int]]:
    """The pairs at most `reach` bits from `pair` in each learned width."""
    spans = [
        range(max(floor, b - reach), min(MAX_BITS, b + reach) + 1) if slope is not None else (b,)
        for b, slope in zip(pair, a, strict=True)
    ]
    return [(w, x) for w in spans[0] for x in spans[1]]


def solve(
    rows: Sequence[Row],
    options: list[list[tuple[int, int]]],
    curvature: Sequence[tuple[float | None, float | None]],
    budget: dict[str, float],
    low: float,
    high: float,
) -> list[tuple[int, int]] | None:
    """The choice of one option per group with the least loss and every cost in [low, high] * budget, or None."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(g, pair) for g, pairs in enumerate(options) for pair in pairs]
    loss = np.array([sum((a or 0.0) * 4.0**-b for b, a in zip(pair, curvature[g], strict=True)) for g, pair in flat])
    once = np.array([[float(g == group) for g, _ in flat] for group in range(len(options))])
    constraints = [LinearConstraint(once, 1.0, 1.0)]
    for kind, limit in budget.items():
        fixed = sum(row.cost(kind, *row.bits([])) for row in rows if row.group is None)
        each = np.zeros(len(flat))
        for i, (g, pair) in enumerate(flat):
            given = [(0, 0)] * g + [pair]
            each[i] = sum(row.cost(kind, *row.bits(given)) for row in rows if row.group == g)
        constraints.append(LinearConstraint(each / limit, low - fixed / limit, high - fixed / limit))
    # A limit on nodes, not on time: the answer must not depend on how busy the machine is.
    settings = {"mip_rel_gap": 1e-4, "node_limit": 20_000}
    found = milp(
        loss / max(loss.max(), 1e-30), integrality=1, bounds=Bounds(0, 1), constraints=constraints, options=settings
    )
    if found.x is None:
        return None
    return [flat[i][1] for i in np.flatnonzero(found.x > 0.5)]
