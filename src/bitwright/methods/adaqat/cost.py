"""The assignment that meets budgets, near the one that was learned."""

from collections.abc import Sequence

from bitwright.costs.assignment import Row, solve
from bitwright.errors import BitwrightError
from bitwright.spec import MAX_BITS


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
    between `closeness` times the budget and the budget. Solved exactly, as an integer linear
    program (`bitwright.costs.assignment`).

    Args:
        rows: every layer. present: learned (weight, input) bits per group. curvature: a of both, per group; None
            where there is no such learned width, which then keeps its bits.
        budget: {"bitops": ..., "size": ...} as by `parse_budget`. floor: fewest bits.

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
    raise BitwrightError(f"adaqat: no assignment of {floor} to {MAX_BITS} bits lies inside the budget ({least})")


def near(pair: tuple[int, int], a: tuple[float | None, float | None], reach: int, floor: int) -> list[tuple[int, int]]:
    """The pairs at most `reach` bits from `pair` in each learned width."""
    spans = [
        range(max(floor, b - reach), min(MAX_BITS, b + reach) + 1) if slope is not None else (b,)
        for b, slope in zip(pair, a, strict=True)
    ]
    return [(w, x) for w in spans[0] for x in spans[1]]
