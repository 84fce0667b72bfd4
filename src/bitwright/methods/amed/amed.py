"""AMED: every layer's bits are a Markov chain, whose scores are what training with them has cost."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bitwright.costs import CostTable, LayerCost, parse_budget
from bitwright.costs.assignment import kinds, make_rows, solve, total
from bitwright.errors import BitwrightError
from bitwright.methods.adjustable import ROLES, adjustable_layers, bit_means
from bitwright.methods.amed.chain import metropolis, score
from bitwright.methods.base import Method
from bitwright.methods.budget import check_limits
from bitwright.methods.options import require
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.spec import MAX_BITS

MEMORY = 0.8  # of the running mean of losses, to which a window's loss is compared


class AMED(Method):
    """Samples one width per layer, for its weights and its inputs, while the network trains.

    A window of `every` steps trains with one choice. Its score, `chain.score` of the mean task loss (relative to that
    of the windows before) and of the cost (relative to that at the start), then enters the scores of the widths that
    were used, and each layer makes one Metropolis-Hastings step towards softmax(scores / temperature). At `freeze_at`
    every layer takes its best width, or, under a budget, all take the assignment with the largest sum of scores.

    Args:
        model: prepared and calibrated; each layer's weights and inputs at one of the candidates, the chain's start.
        total_steps: optimizer steps of the whole training.
        costs: `bitwright.costs.cost_table(model, example)` or a `LayerCost` per layer: the table.
        budget: None, or {"bitops": number, "size": bytes, "latency": milliseconds}, one or several, which the final
            assignment meets. A latency needs `cost_table(..., latencies=...)`.
        cost: what the score counts, "bitops" (default), "size" or "latency".
        candidates: bits. Default 2, 3, 4 and 8.
        alpha, beta: weights of loss and cost in the score, both 1 by default.
        rate: share of a new score in the running one. Default 0.3 (the authors' example: 0.01, over many epochs).
        temperature: of the chain. Default 0.05: a loss or a cost that is a tenth lower is worth 0.02.
        every: steps in a window. Default: a hundredth of training.
        freeze_at: fraction of training at which widths stay. Default 0.7.
        fixed: patterns (as in rules) of layers whose bits are left alone. Default first and last.
        seed: of the chain, the same on every rank.

    Metrics after an epoch: `amed/weight_bits`, `amed/input_bits` (means), `amed/COST`. `summary()` holds widths, cost,
    scores and the choices' number.

    Raises:
        BitwrightError: a value is not accepted, a layer starts elsewhere, or the budget cannot be met.
    """

    name = "amed"
    sets_bits = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        costs: CostTable | Sequence[LayerCost],
        budget: dict[str, float | int | str] | None = None,
        cost: str = "bitops",
        candidates: Sequence[int] = (2, 3, 4, 8),
        alpha: float = 1.0,
        beta: float = 1.0,
        rate: float = 0.3,
        temperature: float = 0.05,
        every: int | None = None,
        freeze_at: float = 0.7,
        fixed: Sequence[str] = ("first", "last"),
        seed: int = 0,
    ):
        need = partial(require, self.name)
        self.candidates = sorted(set(candidates))
        whole = all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in self.candidates)
        need(len(self.candidates) > 1 and whole, "candidates", list(candidates), f"several bits, 1 to {MAX_BITS}")
        need(alpha >= 0, "alpha", alpha, "a number >= 0")
        need(beta >= 0 and alpha + beta > 0, "beta", beta, "a number >= 0 (> 0 without alpha)")
        need(0 < rate <= 1, "rate", rate, "0 < rate <= 1")
        need(temperature > 0, "temperature", temperature, "a number > 0")
        need(0 < freeze_at <= 1, "freeze_at", freeze_at, "0 < fraction <= 1")
        self.every = max(total_steps // 100, 1) if every is None else every
        need(self.every >= 1, "every", every, "a whole number >= 1")
        self.deadline = max(1, round(freeze_at * total_steps))
        self.kind, self.alpha, self.beta, self.rate, self.temperature = cost, alpha, beta, rate, temperature
        model = unwrap(model)
        self.layers = adjustable_layers(model, fixed, self.name)
        self.rows = make_rows(costs, model, {name: i for i, name in enumerate(self.layers)}, self.name)
        self.budget = parse_budget(budget, self.name)
        least = [(self.candidates[0], self.candidates[0])] * len(self.layers)
        check_limits(self.budget, self.rows, least, f"all learned layers at {self.candidates[0]} bits", self.name)
        need(cost in kinds(self.rows), "cost", cost, " or ".join(kinds(self.rows)))
        self.present = self._start()
        self.scores = torch.zeros(len(self.layers), len(self.candidates), dtype=torch.float64)
        self.at_start = self.cost(cost, self.bits())
        self.generator = torch.Generator().manual_seed(seed)
        self.reference: float | None = None
        self.loss, self.count = torch.zeros((), dtype=torch.float64), 0
        self.steps, self.choices, self.done = 0, 0, False

    def _start(self) -> torch.Tensor:
        """The candidate that every layer has now."""
        found = []
        for name, layer in self.layers.items():
            bits = {int(q.bits.item()) for role in ROLES for q in layer[role]}
            if len(bits) > 1 or not bits <= set(self.candidates):
                raise BitwrightError(
                    f"amed: {name} starts at {sorted(bits)} bits; weights and inputs start together at one of "
                    f"{self.candidates}"
                )
            found.append(self.candidates.index(bits.pop()))
        return torch.tensor(found)

    def bits(self) -> list[int]:
        """Of every layer, now."""
        return [self.candidates[i] for i in self.present.tolist()]

    def cost(self, kind: str, bits: Sequence[int]) -> float:
        """ "bitops" or "size" (bytes) of the whole network with `bits` per layer."""
        return total(self.rows, kind, [(b, b) for b in bits])

    def after_step(self, step: Any) -> None:
        self.steps += 1
        if self.done:
            return
        self.loss = self.loss.to(step.result.loss.device) + step.result.losses["task"].double()
        self.count += 1
        if self.steps >= self.deadline:
            self._apply(self._best())
            self.done = True
        elif self.count == self.every:
            self._observe(float(mean_over_ranks(self.loss)) / self.count)  # so that all make the same move
            self._apply(metropolis(self.scores, self.present, self.temperature, self.generator))

    def _observe(self, loss: float) -> None:
        """Take in the mean task loss of the window that ends."""
        self.loss, self.count = torch.zeros_like(self.loss), 0
        if not (math.isfinite(loss) and loss > 0):
            return
        relative = loss / (self.reference or loss)
        self.reference = loss if self.reference is None else MEMORY * self.reference + (1 - MEMORY) * loss
        new = score(relative, self.cost(self.kind, self.bits()) / self.at_start, self.alpha, self.beta)
        used = torch.arange(len(self.layers)), self.present
        self.scores[used] += self.rate * (new - self.scores[used])

    def _best(self) -> torch.Tensor:
        """The candidate of every layer with the best score; under a budget, the best sum inside it."""
        if not self.budget:
            return self.scores.argmax(1)
        pairs = [(b, b) for b in self.candidates]
        chosen = solve(self.rows, [pairs] * len(self.layers), (-self.scores).tolist(), self.budget)
        if chosen is None:
            raise BitwrightError("amed: no assignment of the candidate bits lies inside the budget")
        return torch.tensor([self.candidates.index(b) for b, _ in chosen])

    def _apply(self, wanted: torch.Tensor) -> None:
        for layer, old, new in zip(self.layers.values(), self.present.tolist(), wanted.tolist(), strict=True):
            if new != old:
                for quantizer in (q for role in ROLES for q in layer[role]):
                    quantizer.set_bits(self.candidates[new])
        self.choices += int(not torch.equal(wanted, self.present))
        self.present = wanted

    def widths(self) -> dict[str, dict[str, int]]:
        """{layer: {role: bits}} now."""
        return {
            name: {role: bits for role in ROLES if layer[role]}
            for (name, layer), bits in zip(self.layers.items(), self.bits(), strict=True)
        }

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics.update(bit_means(self.name, self.widths()))
        metrics[f"amed/{self.kind}"] = self.cost(self.kind, self.bits())

    def summary(self) -> dict[str, Any]:
        return {
            "widths": self.widths(),
            "cost": {kind: self.cost(kind, self.bits()) for kind in kinds(self.rows)},
            "budget": dict(self.budget),
            "candidates": self.candidates,
            "scores": dict(zip(self.layers, self.scores.tolist(), strict=True)),
            "choices": self.choices,
            "frozen": self.done,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "counters": [self.steps, self.count, self.choices, self.done],
            "loss": self.loss.cpu().clone(),
            "reference": self.reference,
            "at_start": self.at_start,
            "present": self.present.clone(),
            "scores": self.scores.clone(),
            "random": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["scores"].shape != self.scores.shape:
            raise BitwrightError("amed: the checkpoint was made for other layers or candidates")
        self.steps, self.count, self.choices, self.done = state["counters"]
        self.loss, self.reference, self.at_start = state["loss"].clone(), state["reference"], float(state["at_start"])
        self.present, self.scores = state["present"].clone(), state["scores"].clone()
        self.generator.set_state(state["random"])
