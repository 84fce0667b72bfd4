"""Budgets: how they drive the bits, and the assignment that meets them, near the one that was learned."""

import math
from collections.abc import Sequence
from typing import Any

from bitwright.constraints import Constraint
from bitwright.costs import parse_budget
from bitwright.costs.assignment import Row, kinds, solve, total
from bitwright.errors import BitwrightError
from bitwright.spec import MAX_BITS

BUDGET_RULES = ("pid", "dual")

Pairs = Sequence[tuple[int, int]]


class Budget:
    """Limits on the cost of the whole network, and one multiplier each.

    Args:
        limits: {"bitops": number, "size": bytes}, as by `parse_budget`; may be empty.
        rows: every layer. rule, lam: of the multipliers, see `bitwright.constraints.Constraint`.
        owner: the method that asks, for messages.

    Wherever `pairs` is asked for, it is one (weight bits, input bits) per group.
    """

    def __init__(self, limits: dict[str, float], rows: Sequence[Row], rule: str, lam: float, owner: str):
        self.limits, self.rows, self.owner = limits, rows, owner
        self.constraints = {k: Constraint(v, rule, weight=lam, rate=lam) for k, v in limits.items()}
        self.from_costs: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.limits)

    def check(self, names: Sequence[str], least: Pairs, floor: int) -> None:
        """Raise BitwrightError where a group (of `names`) has no row, or `least` (all at `floor`) is above a limit."""
        charged = {row.group for row in self.rows}
        for i, name in enumerate(names):
            if self and i not in charged:
                raise BitwrightError(f"{self.owner}: costs has no record of {name!r}")
        check_limits(self.limits, self.rows, least, f"all learned layers at {floor} bits", self.owner)

    def price(self, pairs: Pairs, less: Pairs) -> float:
        """What `pairs` cost more than `less`: the sum over the limits of multiplier * share of the limit."""
        gaps = {k: total(self.rows, k, pairs) - total(self.rows, k, less) for k in self.limits}
        return sum(c.multiplier * gaps[k] / c.target for k, c in self.constraints.items())

    def drive(self, pairs: Pairs, progress: float) -> None:
        """Move the multipliers; each limit is approached log-linearly as `progress` goes from 0 to 1."""
        for kind, constraint in self.constraints.items():
            cost = total(self.rows, kind, pairs)
            first = self.from_costs.setdefault(kind, cost)
            way = max(math.log(first / constraint.target), 0.0) * max(1.0 - progress, 0.0)
            constraint.update(cost, constraint.target * math.exp(way))

    def state_dict(self) -> dict[str, Any]:
        states = {k: c.state_dict() for k, c in self.constraints.items()}
        return {"constraints": states, "from_costs": dict(self.from_costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, constraint in self.constraints.items():
            constraint.load_state_dict(state["constraints"][key])
        self.from_costs = dict(state["from_costs"])


def smooth_budget(budget: dict[str, float | int | str] | None, owner: str) -> dict[str, float]:
    """`parse_budget` for methods that follow slopes. Raises BitwrightError for a latency as well, which has none."""
    limits = parse_budget(budget, owner)
    if "latency" in limits:
        raise BitwrightError(
            f"{owner}: budget.latency is not accepted: one bit less seldom changes a kernel, so that there is no slope "
            "to follow; use bitops and size, or the methods allocation and amed"
        )
    return limits


def check_limits(limits: dict[str, float], rows: Sequence[Row], least: Pairs, what: str, owner: str) -> None:
    """Raise BitwrightError for a limit that the cheapest assignment `least` is above, or that nothing is known of.

    what: `least` in words.
    """
    if "latency" in limits and "latency" not in kinds(rows):
        raise BitwrightError(f"{owner}: budget.latency needs latencies, the table that `bitwright cost` measures")
    for kind, limit in limits.items():
        if (cost := total(rows, kind, least)) > limit:
            raise BitwrightError(f"{owner}: budget.{kind}={limit:g} cannot be met: with {what} it is {cost:g}")


def meet_budget(
    rows: Sequence[Row],
    present: Sequence[tuple[int, int]],
    curvature: Sequence[tuple[float | None, float | None]],
    budget: dict[str, float],
    floor: int,
    owner: str,
    closeness: float = 0.99,
) -> list[tuple[int, int]]:
    """The assignment near `present` with the least estimated loss sum a 4^-b that meets every budget (ours).

    Widths may leave their learned values by one bit, and by further ones only if no assignment so near lies
    between `closeness` times the budget and the budget. Solved exactly, as an integer linear
    program (`bitwright.costs.assignment`).

    Args:
        rows: every layer. present: learned (weight, input) bits per group. curvature: a of both, per group; None
            where there is no such learned width, which then keeps its bits.
        budget: {"bitops": ..., "size": ...} as by `parse_budget`. floor: fewest bits.
        owner: the method that asks, for messages.

    Raises:
        BitwrightError: no assignment is inside the budget.
    """
    for reach, low in [(r, closeness) for r in range(1, MAX_BITS)] + [(MAX_BITS, 0.0)]:
        options = [near(pair, a, reach, floor) for pair, a in zip(present, curvature, strict=True)]
        losses = [
            [sum((a or 0.0) * 4.0**-b for b, a in zip(pair, curvature[g], strict=True)) for pair in pairs]
            for g, pairs in enumerate(options)
        ]
        chosen = solve(rows, options, losses, budget, low)
        if chosen is not None:
            return chosen
    least = ", ".join(f"{kind} {limit:g}" for kind, limit in budget.items())
    raise BitwrightError(f"{owner}: no assignment of {floor} to {MAX_BITS} bits lies inside the budget ({least})")


def near(pair: tuple[int, int], a: tuple[float | None, float | None], reach: int, floor: int) -> list[tuple[int, int]]:
    """The pairs at most `reach` bits from `pair` in each learned width."""
    spans = [
        range(max(floor, b - reach), min(MAX_BITS, b + reach) + 1) if slope is not None else (b,)
        for b, slope in zip(pair, a, strict=True)
    ]
    return [(w, x) for w in spans[0] for x in spans[1]]
