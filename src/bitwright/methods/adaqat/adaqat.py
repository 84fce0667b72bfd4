"""AdaQAT: bit-widths learned by finite differences of the loss."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.costs import CostTable, LayerCost
from bitwright.costs.assignment import make_rows, total
from bitwright.errors import BitwrightError
from bitwright.methods.adaqat.groups import make_group, pair_of
from bitwright.methods.adaqat.rule import Width, curvatures, relative_update, update
from bitwright.methods.adjustable import ROLES, adjustable_layers, bit_means
from bitwright.methods.base import Method
from bitwright.methods.budget import BUDGET_RULES, Budget, meet_budget, smooth_budget
from bitwright.methods.options import require
from bitwright.methods.probe import forward_fast, untouched, unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.spec import MAX_BITS

GRANULARITIES = ("network", "layer")


class AdaQAT(Method):
    """Learns the bits of weights and inputs while the network trains, outside the optimizer.

    Every `every` steps the task loss of the present batch is taken at the present bits and with one bit less (for the
    weights and for the inputs of one group of layers), without gradient and without a trace in the model; then
    N <- N - eta ([L(b) - L(b - 1)] + lambda * cost of the bit), b = ceil(N). With a budget the second loss is taken at
    the floor, and the bracket is a fit over all of a width's probes (`curvatures`), as one bit's worth drowns in noise.

    Args:
        model: prepared (and calibrated). Quantizers must follow a change of bits, as all of the library's do.
        total_steps: optimizer steps of the whole training.
        costs: `bitwright.costs.cost_table(model, example)`, or a `LayerCost` (or plain triple) per layer; needed for
            a budget, whose totals are then the table's; otherwise it weighs layers by their MACs.
        budget: None, or {"bitops": number, "size": bytes}, one or both, over the whole network; numbers or "0.51G",
            "120KB". Met from below, within 1 % where an assignment of whole bits exists (per layer it nearly
            always does). Needs `costs`.
        lam: lambda; without a budget the fixed weight of b_w * b_a (default 0.02, the follow-up code's value: it
            depends on the task loss's scale), with one the controller's start.
        eta: step in bits. Default without a budget 0.1 (follow-up code); with one, twice what the way from
            `start` to `floor` needs within the exploration, at most 1.
        granularity: "network" (default; the paper: one width for weights, one for inputs) or "layer" (one pair per
            layer; each update takes the next layer in turn).
        every: steps between updates. Default 8; 1 is the paper's.
        probe_fraction: share of the batch in the probes, default 1.
        start: initial N; None keeps the bits of the rules (then give all learned layers of a role the same in
            "network"). Default 8.
        floor: fewest bits, 2 to 7. freeze_after: upward moves to one number of bits that are let pass; the next one
            freezes it there (default 10, follow-up code).
        warmup_steps: steps before the first update. None: 10 % of training.
        freeze_at: fraction of training at which what still moves is frozen (and a budget met). Default 0.7. With a
            budget nothing freezes before, because its lambda still moves.
        fixed: patterns (as in rules) of layers whose bits are left alone. Default first and last.
        rule: how a budget drives lambda, "pid" (default) or "dual" (`bitwright.constraints`). The target is
            approached along a path, log-linear over the first 60 % of the exploration, lest the controller winds up.

    Load a checkpoint's model state before the method's own state, into a method that has not run yet.

    Metrics after an epoch: `adaqat/weight_bits`, `adaqat/input_bits` (means), `adaqat/frozen` (share), with `costs`
    `adaqat/bitops` and `adaqat/size`, with a budget `adaqat/lambda_...`. `summary()` holds widths and their path.

    Raises:
        BitwrightError: a value is not accepted, nothing is left to learn, or the budget cannot be met.
    """

    name = "adaqat"
    sets_bits = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        costs: CostTable | Sequence[LayerCost] | None = None,
        budget: dict[str, float | int | str] | None = None,
        lam: float = 0.02,
        eta: float | None = None,
        granularity: str = "network",
        every: int = 8,
        probe_fraction: float = 1.0,
        start: float | None = 8.0,
        floor: int = 2,
        freeze_after: int = 10,
        warmup_steps: int | None = None,
        freeze_at: float = 0.7,
        fixed: Sequence[str] = ("first", "last"),
        rule: str = "pid",
    ):
        need = partial(require, self.name)
        need(granularity in GRANULARITIES, "granularity", granularity, "network or layer")
        need(rule in BUDGET_RULES, "rule", rule, " or ".join(BUDGET_RULES))
        need(total_steps >= 1 and every >= 1, "total_steps, every", (total_steps, every), "whole numbers >= 1")
        need(isinstance(floor, int) and 2 <= floor < MAX_BITS, "floor", floor, "2 to 7 (probes run one bit below)")
        need(start is None or floor <= start <= MAX_BITS, "start", start, f"None or {floor} to {MAX_BITS}")
        need(lam >= 0 and (lam > 0 or not budget), "lam", lam, "a number >= 0 (> 0 with a budget)")
        need(eta is None or eta >= 0, "eta", eta, "a number >= 0")
        need(0 < probe_fraction <= 1, "probe_fraction", probe_fraction, "0 < fraction <= 1")
        need(0 < freeze_at <= 1, "freeze_at", freeze_at, "0 < fraction <= 1")
        need(freeze_after >= 0, "freeze_after", freeze_after, "a whole number >= 0")
        warmup = round(0.1 * total_steps) if warmup_steps is None else warmup_steps
        self.deadline = max(1, round(freeze_at * total_steps))
        need(0 <= warmup < self.deadline, "warmup_steps", warmup, f"less than the freeze at step {self.deadline}")
        self.model = unwrap(model)
        self.lam, self.every, self.fraction, self.floor = lam, every, probe_fraction, floor
        self.freeze_after, self.warmup = freeze_after, warmup
        limits = smooth_budget(budget, "adaqat")
        need(not limits or costs is not None, "costs", costs, "one record per layer, which a budget needs")
        layers = adjustable_layers(self.model, fixed, "adaqat")
        named = [("network", list(layers))] if granularity == "network" else [(n, [n]) for n in layers]
        self.groups = [make_group(name, [layers[m] for m in members], start, floor) for name, members in named]
        index = {member: i for i, (_, members) in enumerate(named) for member in members}
        self.rows = [] if costs is None else make_rows(costs, self.model, index, "adaqat")
        self.shares = self._shares()
        visits = (self.deadline - warmup) / (every * len(self.groups))
        way = 2.0 * ((start or MAX_BITS) - floor) / max(visits, 1.0)
        self.eta = eta if eta is not None else (min(1.0, way) if limits else 0.1)
        self.budget = Budget(limits, self.rows, rule, lam, self.name)
        least = [pair_of(group, floor) for group in self.groups]
        self.budget.check([next(iter(group.values())).name for group in self.groups], least, floor)
        self.steps, self.turn, self.probes, self.done = 0, 0, 0, False
        self.path: list[tuple[int, str, str, int]] = []
        # A model that was loaded before gets its own back in `load_state_dict`, to the last bit.
        self._loaded = [(q, copy.deepcopy(q.state_dict())) for w in self.widths() for q in w.quantizers]
        for width in self.widths():
            width.apply()
            self.path.append((0, width.name, width.role, width.bits))

    def _shares(self) -> list[float]:
        """Each group's share of the MACs that are learned."""
        macs = [float(sum(r.macs for r in self.rows if r.group == i)) for i in range(len(self.groups))]
        if not all(macs):
            return [1.0 / len(macs)] * len(macs)
        return [m / sum(macs) for m in macs]

    def widths(self) -> list[Width]:
        """Every learned width: by group, weights before inputs."""
        return [w for group in self.groups for w in group.values()]

    def cost(self, kind: str) -> float:
        """ "bitops" or "size" (bytes) of the whole network at the present bits."""
        return total(self.rows, kind, self._pairs())

    def _pairs(self) -> list[tuple[int, int]]:
        """(weight bits, input bits) of every group now."""
        return [pair_of(g) for g in self.groups]

    def after_step(self, step: Any) -> None:
        self._loaded = []
        self.steps += 1
        if self.done:
            return
        if self.steps >= self.deadline or all(w.frozen for w in self.widths()):
            self._finish()
        elif self.steps > self.warmup and (self.steps - self.warmup) % self.every == 0:
            self._update(step)

    def _update(self, step: Any) -> None:
        """Probe the next group that still moves, and move it."""
        while all(w.frozen for w in self.groups[self.turn % len(self.groups)].values()):
            self.turn += 1
        index = self.turn % len(self.groups)
        self.turn += 1
        group = self.groups[index]
        moving = [w for w in group.values() if not w.frozen]
        probed = [w.bits - 1 if not self.budget else min(w.bits - 1, self.floor) for w in moving]
        measured = torch.stack([self._loss(step, None, 0), *map(partial(self._loss, step), moving, probed)])
        losses = mean_over_ranks(measured).tolist()  # so that all make the same move
        # Over 60 % of the exploration: then the controller does not wind up.
        self.budget.drive(self._pairs(), (self.steps - self.warmup) / (0.6 * (self.deadline - self.warmup)))
        if not all(math.isfinite(v) for v in losses):
            return
        pair = pair_of(group)
        slopes = [self._slope(index, w, pair) for w in moving]
        for width, probe, bits in zip(moving, losses[1:], probed, strict=True):
            width.observe(losses[0], probe, bits)
        gains = self._gains(moving)
        for width, probe, slope, gain in zip(moving, losses[1:], slopes, gains, strict=True):
            if self.budget and slope == 0:
                continue  # no budget charges this width
            if self.budget:
                real = relative_update(width.real, gain, slope, self.eta)
            else:
                share = self.shares[index]
                real = update(width.real, losses[0], probe, self.lam * share, slope, self.eta / share)
            self._move(width, real)

    def _gains(self, widths: list[Width]) -> list[float]:
        """L(b - 1) - L(b) of each width as the fit over all observations has it."""
        fitted = self._fitted()
        return [fitted[id(w)] * 3.0 * 4.0**-w.bits for w in widths]

    def _fitted(self) -> dict[int, float]:
        """a of every width, by its id."""
        every = self.widths()
        return dict(zip(map(id, every), curvatures(every, self.floor), strict=True))

    def _slope(self, index: int, width: Width, pair: tuple[int, int]) -> float:
        """What one bit of `width` costs: the other operand's bits, or lambda times the share of the budgets."""
        if not self.budget:
            return float(pair[1] if width.role == "weight" else pair[0])
        now = self._pairs()
        less = list(now)
        less[index] = (pair[0] - 1, pair[1]) if width.role == "weight" else (pair[0], pair[1] - 1)
        return self.budget.price(now, less)

    def _move(self, width: Width, real: float) -> None:
        before = width.bits
        # Under a budget nothing freezes early: while lambda moves, neither an oscillation nor the floor is final.
        width.move(real, self.floor, None if self.budget else self.freeze_after)
        if width.bits != before:
            width.apply()
            self.path.append((self.steps, width.name, width.role, width.bits))

    @torch.no_grad()
    def _loss(self, step: Any, width: Width | None, bits: int) -> Tensor:
        """Task loss of the present batch, with `bits` bits for `width`; the model is as before afterwards."""
        inputs, y = step.batch.inputs, step.batch.y
        rows = inputs.rows
        count = max(min(2, rows), round(self.fraction * rows))
        self.probes += 1
        with untouched(self.model), step.autocast(inputs.device):
            if width is not None:
                for quantizer in width.quantizers:
                    quantizer.set_bits(bits)
            return step.loss_fn(forward_fast(step.model, inputs.by_row(lambda t: t[:count])), y[:count]).float()

    def _finish(self) -> None:
        """Freeze everything; with a budget, at the nearest assignment that meets it."""
        pairs = self._pairs()
        if self.budget:
            pairs = meet_budget(self.rows, pairs, self._curvatures(), self.budget.limits, self.floor, self.name)
        for group, pair in zip(self.groups, pairs, strict=True):
            for width in group.values():
                bits = pair[ROLES.index(width.role)]
                if bits != width.bits:
                    self.path.append((self.steps, width.name, width.role, bits))
                width.freeze(bits)
                width.apply()
        self.done = True

    def _curvatures(self) -> list[tuple[float | None, float | None]]:
        """a of every width for `meet_budget`; None where a role is not learned."""
        fitted = self._fitted()
        pair = lambda group: tuple(fitted[id(group[r])] if r in group else None for r in ROLES)  # noqa: E731
        return [pair(group) for group in self.groups]  # pyright: ignore[reportReturnType]

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        widths = self.widths()
        metrics.update(bit_means(self.name, self._bits()))
        metrics["adaqat/frozen"] = sum(w.frozen for w in widths) / len(widths)
        if self.rows:
            metrics.update({f"adaqat/{kind}": self.cost(kind) for kind in ("bitops", "size")})
        metrics.update({f"adaqat/lambda_{k}": c.multiplier for k, c in self.budget.constraints.items()})

    def _bits(self) -> dict[str, dict[str, int]]:
        """{layer or "network": {role: bits}} now."""
        return {next(iter(g.values())).name: {role: w.bits for role, w in g.items()} for g in self.groups}

    def summary(self) -> dict[str, Any]:
        """Plain values: widths {layer or "network": {role: bits}}, path [[step, name, role, bits]], cost, budget,
        probes (forward passes made for probing) and frozen (whether nothing moves any more)."""
        cost = {kind: self.cost(kind) for kind in ("bitops", "size")} if self.rows else {}
        path = [list(p) for p in self.path]
        frozen = all(w.frozen for w in self.widths())
        return {
            "widths": self._bits(),
            "path": path,
            "cost": cost,
            "budget": dict(self.budget.limits),
            "probes": self.probes,
            "frozen": frozen,
        }

    def state_dict(self) -> dict[str, Any]:
        fields = ("real", "frozen", "arrivals", "fit_xy", "fit_xx")
        return {
            "counters": [self.steps, self.turn, self.probes, self.done],
            "widths": [{f: getattr(w, f) for f in fields} for w in self.widths()],
            **self.budget.state_dict(),
            "path": [list(p) for p in self.path],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["widths"]) != len(self.widths()):
            raise BitwrightError(
                f"adaqat: the checkpoint holds {len(state['widths'])} widths, this run learns {len(self.widths())}"
            )
        self.steps, self.turn, self.probes, self.done = state["counters"]
        for width, saved in zip(self.widths(), state["widths"], strict=True):
            for key, value in saved.items():
                setattr(width, key, dict(value) if key == "arrivals" else value)
        wanted = {id(q): w.bits for w in self.widths() for q in w.quantizers}
        for quantizer, before in self._loaded:
            bits = wanted[id(quantizer)]
            if int(quantizer.bits.item()) != bits and int(before["bits"].item()) == bits:
                quantizer.load_state_dict(before)
            if int(quantizer.bits.item()) != bits:
                raise BitwrightError(
                    f"adaqat: {quantizer.name} has {int(quantizer.bits.item())} bits where the checkpoint says {bits}; "
                    "load the model's state before the method's"
                )
        self._loaded = []
        self.budget.load_state_dict(state)
        self.path = [(s, n, r, b) for s, n, r, b in state["path"]]
