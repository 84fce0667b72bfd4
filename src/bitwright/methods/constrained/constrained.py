"""PD-QAT: the full-precision network trains, and stays where its low-precision form is near."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitwright.batches import class_axis, logits_of
from bitwright.constraints import Constraint
from bitwright.errors import BitwrightError
from bitwright.grids.base import as_float
from bitwright.methods.base import Batch, Method
from bitwright.methods.constrained.views import Views
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks

OUTPUT = "output"
SLACK_AT = {1: 0.9, 2: 0.7, 3: 0.3, 4: 0.1}  # of the outputs, by the fewest bits of a weight; the paper's but at 3


def soft_cross_entropy(low: Tensor, full: Tensor) -> Tensor:
    """-sum softmax(full) log softmax(low) over the classes (`class_axis`), mean over the rest; gradient to both."""
    axis = class_axis(full)
    return -(F.softmax(as_float(full), axis) * F.log_softmax(as_float(low), axis)).sum(axis).mean()


class Constrained(Method):
    """Trains the weights at full precision, under constraints on how far the low-precision network is from it.

    min CE(full(x), y) so that CEsoft(low(x), full(x)) <= eps_output and, for each convolution and linear layer,
    mean |W x_q - Q(W) x_q|^2 <= eps_layer on the quantized input that it has. Weights get gradients from the
    full-precision side of these terms alone: none crosses their rounding. After each epoch a dual variable per
    constraint moves by `rate` times its mean slack, and is at least 0: the largest belong to the layers that suffer
    most.

    Scales, and norms and biases (which both views share), also learn from the low-precision network's own loss; its
    batch statistics are the ones that norms keep. Evaluation, export and every other method's losses are of the
    low-precision network. Three forward passes and two backward passes a step, about.

    Args:
        model: prepared; weights on a grid that lies where the weight is, with a plain straight-through estimator.
        loss_fn: the task loss, (outputs, y) -> scalar.
        eps_output: bound of CEsoft, whose least value is the entropy of the full-precision outputs. Default, by the
            fewest bits of a weight: 0.9 at 1, 0.7 at 2, 0.3 at 3, 0.1 at 4, else 1/255.
        eps_layer: bound of a layer's mean squared difference. Default 1/255.
        rate: of the dual steps. Default 0.01.

    Metrics after an epoch: `constrained/output` (mean CEsoft), `constrained/dual/NAME` of the outputs ("output")
    and of every layer. `summary()` holds duals and mean slacks.

    Raises:
        BitwrightError: a value is not accepted, or the model's quantizers are not of that kind.
    """

    name = "constrained"
    moves_weights = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        eps_output: float | None = None,
        eps_layer: float = 1 / 255,
        rate: float = 0.01,
    ):
        model = unwrap(model)
        self.views = Views(model, self.name)
        if eps_output is None:
            fewest = min(int(q.bits.min().item()) for q in self.views.every if q.shape.role == "weight")
            eps_output = SLACK_AT.get(fewest, 1 / 255)
        if not (eps_output > 0 and eps_layer > 0 and rate > 0):
            raise BitwrightError(
                f"constrained: eps_output={eps_output}, eps_layer={eps_layer}, rate={rate} is not accepted; "
                "use numbers > 0"
            )
        self.loss_fn = loss_fn
        bounds = {OUTPUT: eps_output, **dict.fromkeys(self.views.layers, eps_layer)}
        # In units of its bound a slack is 1 / eps times as large, a dual eps times: products and steps are the paper's.
        self.constraints = {
            name: Constraint(eps, "dual", weight=eps if name == OUTPUT else 0.0, rate=rate * eps * eps)
            for name, eps in bounds.items()
        }
        device = next(model.parameters()).device
        self.sums, self.count = torch.zeros(len(bounds), dtype=torch.float64, device=device), 0
        self.slacks: dict[str, float] = {}
        self.outputs: Tensor | None = None

    def duals(self) -> dict[str, float]:
        """The dual variable of every constraint: loss per unit of slack."""
        return {name: c.multiplier / c.target for name, c in self.constraints.items()}

    def losses(self, batch: Batch, outputs: Tensor) -> dict[str, Tensor]:
        self.outputs = logits_of(outputs, "constrained")
        return {}

    def backward(self, step: Any) -> None:
        with self.views.low():
            total = step.forward_loss(step.batch)
            # Behind all other methods' losses, some of which look at what the network's modules put out last.
            kept = [b.clone() for b in self.views.statistics]
            run = step.model.module if isinstance(step.model, DistributedDataParallel) else step.model
            with step.autocast(step.batch.inputs.device):
                own = self._terms(run, step.batch)
        total = total + own["constrained_task"] + own["constrained"]
        step.result.loss = total.detach()
        step.result.losses.update({name: value.detach() for name, value in own.items()})
        (total / step.accumulate).backward()
        # Norms keep the low-precision pass's statistics; written only now that nothing waits for a backward pass.
        with torch.no_grad():
            for buffer, before in zip(self.views.statistics, kept, strict=True):
                buffer.copy_(before)
        self.outputs = None

    def _terms(self, run: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The full-precision task loss, and what the constraints add to it; scalars in float32 at least."""
        with self.views.full():
            full = batch.inputs.call(run)
        assert self.outputs is not None
        values = {OUTPUT: soft_cross_entropy(self.outputs, logits_of(full, "constrained"))}
        for name in self.views.layers:
            mine, low = self.views.local(name)
            values[name] = (as_float(mine) - as_float(low)).square().mean()
        self.sums += torch.stack([v.detach() for v in values.values()])
        self.count += 1
        terms = [c.penalty(values[name]) for name, c in self.constraints.items()]
        return {"constrained_task": as_float(self.loss_fn(full, batch.y)), "constrained": torch.stack(terms).sum()}

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        if self.count:
            means = mean_over_ranks(self.sums / self.count).tolist()
            for (name, constraint), value in zip(self.constraints.items(), means, strict=True):
                constraint.update(value)
                self.slacks[name] = value - constraint.target
            metrics["constrained/output"] = means[0]
            self.sums, self.count = torch.zeros_like(self.sums), 0
        metrics.update({f"constrained/dual/{name}": value for name, value in self.duals().items()})

    def summary(self) -> dict[str, Any]:
        return {"duals": self.duals(), "slacks": dict(self.slacks)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "constraints": {name: c.state_dict() for name, c in self.constraints.items()},
            "sums": self.sums.clone(),
            "count": self.count,
            "slacks": dict(self.slacks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["constraints"].keys() != self.constraints.keys():
            raise BitwrightError("constrained: the checkpoint holds the duals of other layers than this run's")
        for name, constraint in self.constraints.items():
            constraint.load_state_dict(state["constraints"][name])
        self.sums, self.count = state["sums"].to(self.sums), int(state["count"])
        self.slacks = dict(state["slacks"])
