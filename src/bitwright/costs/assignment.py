"""One pair of bit-widths per group of layers: what it costs, and the choice with the least loss inside a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from bitwright.costs.bitops import FLOAT_BITS, bitops
from bitwright.costs.latency import Entries, entry_for
from bitwright.costs.size import size_bytes
from bitwright.costs.table import CostRow, CostTable, layer_bits
from bitwright.errors import BitwrightError
from bitwright.prepare import quant_layers


class LayerCost(NamedTuple):
    """One layer: dotted name, multiply-accumulates per sample, elements of its weight."""

    name: str
    macs: int
    weights: int


@dataclass(frozen=True)
class Row:
    """A layer (or a product of an attention layer) and where its bits come from: a learned group, or fixed numbers.

    macs; weights: how many are stored. group: index of its group, or None. weight_bits, input_bits: None: the group's.
    product: both operands are activations, so the first has the group's input bits too. entries: latencies, if known.
    """

    macs: int
    weights: int
    group: int | None
    weight_bits: float | None
    input_bits: float | None
    product: bool = False
    entries: Entries | None = None

    def bits(self, assignment: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """(weight bits, input bits) under one (weight, input) pair per group."""
        pair = (0, 0) if self.group is None else assignment[self.group]
        w = pair[1 if self.product else 0] if self.weight_bits is None else self.weight_bits
        return w, pair[1] if self.input_bits is None else self.input_bits

    def cost(self, kind: str, w: Any, a: Any) -> Any:
        """BitOPs, bytes or milliseconds at w and a bits, a float; of tensors a tensor, which passes gradients.

        Latencies are of whole bits only; a layer that was not measured is part of the rest, which has its own row.
        """
        if kind == "latency":
            return entry_for(self.entries, w, a) if self.entries else 0.0
        return bitops(float(self.macs), w, a) if kind == "bitops" else size_bytes(float(self.weights), w)


def make_rows(
    costs: Any, model: nn.Module, groups: dict[str, int], owner: str, roles: Sequence[str] = ("weight", "input")
) -> list[Row]:
    """Rows from a `CostTable`, or from records of layers.

    Args:
        costs: `bitwright.costs.cost_table(model, example)`: then totals are the table's at any bits, with products of
            attention, biases, norms and scales, and with its latencies. Or a sequence of its rows, of `LayerCost` or
            of plain triples.
        groups: {layer: index of the group that its bits belong to}. owner: the method that asks, for messages.
        roles: whose bits the groups have; the others keep their present ones.

    Raises:
        BitwrightError: a `LayerCost` names no module; a learned layer was not measured.
    """
    layers, modules = quant_layers(model), dict(model.named_modules())
    rows = []
    latencies = costs.latencies if isinstance(costs, CostTable) else None
    if latencies and (unknown := [name for name in groups if name not in latencies.layers]):
        raise BitwrightError(f"{owner}: latencies: there is no row for the layer {unknown[0]!r}")
    for record in costs.rows if isinstance(costs, CostTable) else costs:
        record = record if isinstance(record, CostRow) else LayerCost(*record)
        if isinstance(record, CostRow):
            given = (record.weight_bits, record.input_bits)
            stored = round(record.size_bytes * 8 / record.stored_bits)
        elif record.name in modules:
            given, stored = layer_bits(modules[record.name]), int(record.weights)
        else:
            raise BitwrightError(f"{owner}: costs names {record.name!r}, which the model does not have")
        product = record.name not in modules
        layer = record.name.rpartition(".")[0] if product else record.name
        learned = layer in layers and layer in groups
        operands = ("input", "input") if product else ("weight", "input")
        changes = [learned and b != FLOAT_BITS and r in roles for b, r in zip(given, operands, strict=True)]
        own = [None if change else b for b, change in zip(given, changes, strict=True)]
        entries = latencies.layers.get(record.name) if latencies and FLOAT_BITS not in given else None
        group = groups[layer] if learned else None
        rows.append(Row(int(record.macs), stored, group, own[0], own[1], product, entries))
    if isinstance(costs, CostTable):
        rest = {(FLOAT_BITS, FLOAT_BITS): latencies.rest} if latencies else None
        rows.append(Row(0, costs.float_parameters + costs.scales, None, FLOAT_BITS, FLOAT_BITS, entries=rest))
    return rows


def kinds(rows: Sequence[Row]) -> tuple[str, ...]:
    """What `rows` have a cost in: "bitops", "size" and, where it was measured, "latency"."""
    return ("bitops", "size", "latency") if any(row.entries for row in rows) else ("bitops", "size")


def total(rows: Sequence[Row], kind: str, assignment: Sequence[tuple[Any, Any]]) -> Any:
    """Cost of the whole network; float tensors count as 32 bits. A scalar tensor for pairs of tensors, else a float."""
    return sum(row.cost(kind, *row.bits(assignment)) for row in rows)


def solve(
    rows: Sequence[Row],
    options: Sequence[Sequence[tuple[int, int]]],
    losses: Sequence[Sequence[float]],
    budget: dict[str, float],
    low: float = 0.0,
) -> list[tuple[int, int]] | None:
    """The choice of one option per group with the least sum of losses and every cost in [low, 1] * budget, or None.

    An integer linear program with one binary variable per option, as in HAWQ-V3 (arXiv 2011.10680), solved exactly
    up to a ten-thousandth of the loss.

    Args:
        rows: every layer. options: (weight bits, input bits) that each group may take. losses: of each option.
        budget: {"bitops": ..., "size": bytes, "latency": milliseconds}, see `parse_budget`. low: the least share of
            it to use.
    """
    # The solver's tolerance may let a budget be passed by a millionth; only then ask for a little less.
    for high in (1.0, 1.0 - 3e-6):
        chosen = _solve(rows, options, losses, budget, low, high)
        if chosen is None or all(total(rows, kind, chosen) <= limit for kind, limit in budget.items()):
            return chosen
    return None


def _solve(
    rows: Sequence[Row],
    options: Sequence[Sequence[tuple[int, int]]],
    losses: Sequence[Sequence[float]],
    budget: dict[str, float],
    low: float,
    high: float,
) -> list[tuple[int, int]] | None:
    """`solve` with costs in [low, high] * budget, up to the solver's tolerance."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(g, pair) for g, pairs in enumerate(options) for pair in pairs]
    loss = np.array([value for each in losses for value in each])
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
        loss / max(np.abs(loss).max(), 1e-30),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options=settings,
    )
    if found.x is None:
        return None
    return [flat[i][1] for i in np.flatnonzero(found.x > 0.5)]
