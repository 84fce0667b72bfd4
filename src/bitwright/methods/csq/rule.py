"""CSQ's numbers: temperature, which planes are kept, how a budget pulls, which planes it drops."""

from collections.abc import Sequence

from bitwright.costs.assignment import Row, solve, total
from bitwright.errors import BitwrightError

Pairs = list[tuple[int, int]]


def temperature_at(progress: float, last: float) -> float:
    """T = last^progress: 1 at `progress` 0, `last` at 1."""
    return last ** min(max(progress, 0.0), 1.0)


def kept_planes(logits: Sequence[float]) -> list[int]:
    """The planes whose mask is at least one half, ascending; where there is none, the one nearest to it."""
    kept = [b for b, logit in enumerate(logits) if logit >= 0]
    return kept or [max(range(len(logits)), key=lambda b: logits[b])]


def in_pairs(widths: Sequence[int]) -> Pairs:
    """Weight bits as (weight, input) per layer; the rows have the input bits themselves."""
    return [(bits, 0) for bits in widths]


class Pull:
    """The factor of every layer's masks in the loss: (r - target) * share for the limit that is passed by most.

    r is the cost of the planes that are kept as a fraction of that of all planes, `target` what the limit is of that;
    share is what a plane of the layer costs, 1 in the mean. With layers of equal cost this is the paper's
    (r - target / planes) for every layer: negative below the target, so that planes grow back.

    Args:
        rows: every layer's cost. limits: {kind: number}. start: bits of every learned layer at the start.
    """

    def __init__(self, rows: Sequence[Row], limits: dict[str, float], start: Sequence[int]):
        self.rows, self.limits = rows, limits
        signs = [1] * len(start)
        self.spans, self.shares = {}, {}
        for kind in limits:
            cost = total(rows, kind, in_pairs(signs))
            self.spans[kind] = total(rows, kind, in_pairs(start)) - cost
            more = [total(rows, kind, in_pairs([*signs[:i], 2, *signs[i + 1 :]])) - cost for i in range(len(start))]
            self.shares[kind] = [m * len(more) / sum(more) for m in more]

    def at(self, widths: Sequence[int]) -> list[float]:
        """One factor per layer at the present `widths`."""
        slacks = {k: (total(self.rows, k, in_pairs(widths)) - v) / self.spans[k] for k, v in self.limits.items()}
        tightest = max(slacks, key=lambda k: slacks[k])
        return [slacks[tightest] * share for share in self.shares[tightest]]


def windows(kept: Sequence[int], logits: Sequence[float]) -> dict[int, tuple[float, tuple[int, int]]]:
    """{bits: (what is lost, (lowest, highest plane))}: per width the neighbouring planes whose loss is least.

    What is lost is the sum of the logits of the kept planes outside. Only widths that kept planes really span.
    """
    found: dict[int, tuple[float, tuple[int, int]]] = {}
    for i, low in enumerate(kept):
        for high in kept[i:]:
            lost = sum(max(logits[b], 0.0) for b in kept if not low <= b <= high)
            bits = high - low + 2
            # Of equal losses the higher planes.
            if bits not in found or lost <= found[bits][0]:
                found[bits] = (lost, (low, high))
    return found


def drop_planes(
    rows: Sequence[Row], limits: dict[str, float], kept: Sequence[Sequence[int]], logits: Sequence[Sequence[float]]
) -> list[tuple[int, int]]:
    """The window of planes of every layer that meets the limits and loses the least; planes are never added.

    Raises:
        BitwrightError: even one plane each is above a limit.
    """
    choices = [windows(k, m) for k, m in zip(kept, logits, strict=True)]
    options = [in_pairs(list(each)) for each in choices]
    chosen = solve(rows, options, [[lost for lost, _ in each.values()] for each in choices], limits)
    if chosen is None:
        raise BitwrightError("csq: no choice of the planes that are left lies inside the budget")
    return [each[bits][1] for each, (bits, _) in zip(choices, chosen, strict=True)]
