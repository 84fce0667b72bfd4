"""CSQ: weights are sums of soft bits that harden; which bits a layer keeps is learned under a budget."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.costs import CostTable, LayerCost
from bitwright.costs.assignment import Row, make_rows, total
from bitwright.costs.bitops import FLOAT_BITS
from bitwright.errors import BitwrightError
from bitwright.methods.adjustable import adjustable_layers, bit_means
from bitwright.methods.base import Batch, Method
from bitwright.methods.budget import check_limits, smooth_budget
from bitwright.methods.csq.planes import BitPlanes, follow_masks, plane_grid
from bitwright.methods.csq.rule import Pull, drop_planes, in_pairs, temperature_at
from bitwright.methods.options import require
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.prepare import quant_layers
from bitwright.spec import MAX_BITS

COSTS = ("bitops", "size")
LEAST = 2  # bits: one plane and the sign


class CSQ(Method):
    """Learns the bits of weights, and how many of them a layer keeps, without a gradient that is made up.

    A weight is scale * sum_b 2^b (sigma(T p_b) - sigma(T n_b)) sigma(T m_b); T grows from 1 to `temperature` until
    `freeze_at`, when every sigma becomes 0 or 1. From then on the codes stay, and scales, norms and biases train. The
    network is an ordinary quantized one at any time: layers' weights hold the values, quantizers their widths. Inputs
    keep their bits. Widths start at the rules' bits, 8 for example; planes are pruned, and grow back below a budget,
    until `choose_at`. A width is the distance of the outermost planes that are kept, and the sign.

    Args:
        model: prepared and calibrated, weights on the grid `lsq`, at 2 bits or more.
        total_steps: optimizer steps of the whole training.
        costs: `bitwright.costs.cost_table(model, example)`, or a `LayerCost` (or plain triple) per layer.
        budget: {"bitops": number, "size": bytes}, one or both, over the whole network; numbers or "0.51G", "120KB".
            Met from below: planes too many at `choose_at` are dropped, those that matter least; none is added.
        mean_bits: instead of a budget, the paper's: the mean width of the learned layers, whatever their size, at most.
            A width counts the sign, which the paper's does not: its 2 bits are 3 here.
        lam: weight of the budget in the loss. Default 0.2; the authors' code has 0.01 for 600 epochs of CIFAR-10.
        temperature: T at `freeze_at`. Default 200 (the authors' code).
        lr: Adam's rate for the logits of bits, falling to 0 at `freeze_at`. Default 0.02.
        mask_lr: rate of the logits of planes, which follow their plain gradient and start at 0. Default 1.
        start: logits of bits start at -start or start. Default 0.2.
        choose_at: fraction of training at which the planes that are kept stay so (and a budget is met). Default 0.5.
        freeze_at: fraction of training at which bits harden. Default 0.9.
        fixed: patterns (as in rules) of layers that stay what the rules say. Default first and last.

    Loss: `csq`. Metrics after an epoch: `csq/weight_bits` (mean), `csq/bitops`, `csq/size`, `csq/temperature`.
    `summary()` holds widths, their path, the planes that are kept, cost and budget.

    Raises:
        BitwrightError: a value is not accepted, a grid is another one, a weight is shared, nothing is left to learn, or
            the budget cannot be met.
    """

    name = "csq"
    sets_bits = True
    makes_weights = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        costs: CostTable | Sequence[LayerCost],
        budget: dict[str, float | int | str] | None = None,
        mean_bits: float | None = None,
        lam: float = 0.2,
        temperature: float = 200.0,
        lr: float = 0.02,
        mask_lr: float = 1.0,
        start: float = 0.2,
        choose_at: float = 0.5,
        freeze_at: float = 0.9,
        fixed: Sequence[str] = ("first", "last"),
    ):
        need = partial(require, self.name)
        need(total_steps >= 1, "total_steps", total_steps, "a whole number >= 1")
        need((budget is None) != (mean_bits is None), "mean_bits", mean_bits, "either a budget or mean_bits")
        need(mean_bits is None or LEAST <= mean_bits <= MAX_BITS, "mean_bits", mean_bits, f"{LEAST} to {MAX_BITS}")
        need(lam >= 0, "lam", lam, "a number >= 0")
        need(temperature > 1, "temperature", temperature, "a number > 1")
        for key, value in (("lr", lr), ("mask_lr", mask_lr), ("start", start)):
            need(value > 0, key, value, "a number > 0")
        need(0 < freeze_at <= 1, "freeze_at", freeze_at, "0 < fraction <= 1")
        need(0 < choose_at <= freeze_at, "choose_at", choose_at, "0 < fraction <= freeze_at")
        self.last, self.lr, self.mask_lr, self.lam = temperature, lr, mask_lr, lam
        self.choice, self.deadline = (max(1, round(share * total_steps)) for share in (choose_at, freeze_at))
        model = unwrap(model)
        layers = adjustable_layers(model, fixed, self.name, roles=("weight",))
        weights = own_weights(model, layers)
        index = {name: i for i, name in enumerate(layers)}
        self.rows = make_rows(costs, model, index, self.name, roles=("weight",))
        self.limits, self.charged = smooth_budget(budget, self.name), self.rows
        if mean_bits is not None:  # a layer counts as 8 weights, so that its "size" is its bits
            self.charged = [Row(0, 8, i, None, FLOAT_BITS) for i in range(len(layers))]
            self.limits = {"size": mean_bits * len(layers)}
        self.mean_bits = mean_bits
        check_limits(self.limits, self.charged, in_pairs([LEAST] * len(layers)), "2-bit weights in all layers", "csq")
        self.temperature = torch.ones(1, device=next(iter(weights.values())).device)
        self.planes = [
            BitPlanes(name, roles["weight"][0], weights[name], self.temperature, start)
            for name, roles in layers.items()
        ]
        for each in self.planes:
            each.write()
        self.pull = Pull(self.charged, self.limits, self._bits())
        self.factors = self.pull.at(self._bits())
        self.optimizer: torch.optim.Adam | None = torch.optim.Adam(
            [t for p in self.planes for t in (p.up, p.down)], lr=lr
        )
        self.steps, self.chosen, self.done = 0, False, False
        self.path = [(0, p.layer, p.bits) for p in self.planes]

    def _bits(self) -> list[int]:
        return [p.bits for p in self.planes]

    def cost(self, kind: str) -> float:
        """ "bitops" or "size" (bytes) of the whole network at the present bits."""
        return total(self.rows, kind, in_pairs(self._bits()))

    def losses(self, batch: Batch, outputs: Tensor) -> dict[str, Tensor]:
        if self.chosen:
            return {}
        kept = [torch.sigmoid(self.temperature * p.mask).sum() for p in self.planes]
        return {"csq": self.lam * torch.stack([f * k for f, k in zip(self.factors, kept, strict=True)]).sum()}

    def after_step(self, step: Any) -> None:
        self.steps += 1
        if not self.done:
            self._move()
            if self.steps >= self.choice and not self.chosen:
                self._choose()
            if self.steps >= self.deadline:
                for each in self.planes:
                    each.harden()
                self.done, self.optimizer = True, None  # which holds two numbers for every logit
        for each in self.planes:
            each.write()

    def _move(self) -> None:
        """One step of Adam on all logits; widths, temperature and the budget's pull follow."""
        for leaf in (t for p in self.planes for t in p.leaves()):
            if leaf.grad is not None:
                leaf.grad = mean_over_ranks(leaf.grad)
        progress = self.steps / self.deadline
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1.0 - (self.steps - 1) / self.deadline)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for each in self.planes:
                if each.mask.grad is not None:
                    each.mask.sub_(each.mask.grad, alpha=self.mask_lr)
                    each.mask.grad = None
        if not self.chosen:
            self.path += [(self.steps, p.layer, p.bits) for p in follow_masks(self.planes)]
            self.factors = self.pull.at(self._bits())
        self.temperature.fill_(temperature_at(progress, self.last))

    def _choose(self) -> None:
        """The planes that are kept for good, inside the budget."""
        logits = [p.mask.tolist() for p in self.planes]
        chosen = drop_planes(self.charged, self.limits, [p.kept for p in self.planes], logits)
        for each, window in zip(self.planes, chosen, strict=True):
            before = each.bits
            each.choose(window)
            if each.bits != before:
                self.path.append((self.steps, each.layer, each.bits))
        self.chosen = True

    def widths(self) -> dict[str, dict[str, int]]:
        """{layer: {"weight": bits}} now."""
        return {p.layer: {"weight": p.bits} for p in self.planes}

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics.update(bit_means(self.name, self.widths()))
        metrics.update({f"csq/{kind}": self.cost(kind) for kind in COSTS})
        metrics["csq/temperature"] = self.temperature.item()

    def summary(self) -> dict[str, Any]:
        return {
            "widths": self.widths(),
            "planes": {p.layer: list(p.kept) for p in self.planes},
            "path": [list(p) for p in self.path],
            "cost": {kind: self.cost(kind) for kind in COSTS},
            "budget": {"mean_bits": self.mean_bits} if self.mean_bits is not None else dict(self.limits),
            "frozen": self.done,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "chosen": self.chosen,
            "done": self.done,
            "planes": [p.state_dict() for p in self.planes],
            "adam": None if self.optimizer is None else self.optimizer.state_dict(),
            "path": [list(p) for p in self.path],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["planes"]) != len(self.planes):
            raise BitwrightError(
                f"csq: the checkpoint holds {len(state['planes'])} weights, this run learns {len(self.planes)}"
            )
        for each, saved in zip(self.planes, state["planes"], strict=True):
            each.load_state_dict(saved, bool(state["chosen"]))
        self.steps, self.chosen = int(state["steps"]), bool(state["chosen"])
        self.path = [(s, n, b) for s, n, b in state["path"]]
        self.temperature.fill_(temperature_at(self.steps / self.deadline, self.last))
        self.factors = self.pull.at(self._bits())
        for each in self.planes:
            each.write()
        self.done = bool(state["done"])
        if self.done:
            self.optimizer = None
        elif self.optimizer is not None:
            self.optimizer.load_state_dict(state["adam"])


def own_weights(model: nn.Module, layers: Sequence[str] | dict[str, Any]) -> dict[str, nn.Parameter]:
    """The parameter that each layer's weight quantizer reads.

    Raises:
        BitwrightError: it is no parameter, or another layer's as well, or it has another grid than bits add up to.
    """
    every = quant_layers(model)
    users: dict[int, list[str]] = {}
    for name, layer in every.items():
        for slot in layer.weight_slots:
            users.setdefault(id(layer.weight_of(slot)), []).append(name)
    found: dict[str, nn.Parameter] = {}
    for name in layers:
        plane_grid(every[name].quantizers()["weight_quantizer"])
        weight = every[name].weight_of("weight_quantizer")
        if not isinstance(weight, nn.Parameter):
            raise BitwrightError(f"csq: the weight of {name} is computed from others; fix the layer")
        if len(others := users[id(weight)]) > 1:
            raise BitwrightError(f"csq: {' and '.join(others)} share a weight, which has one set of bits; fix them")
        found[name] = weight
    return found
