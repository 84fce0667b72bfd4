"""QuantNet: 1-bit weights come from a network that is trained with the task, instead of a made-up gradient."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids.lsq import LSQ, shared_by
from bitwright.kernels import scale_gradient
from bitwright.kernels.reference import along
from bitwright.layers.base import QuantLayer
from bitwright.methods.base import Batch, Method
from bitwright.methods.options import require
from bitwright.methods.probe import unwrap
from bitwright.methods.quantnet.network import MetaNetwork
from bitwright.methods.ranks import mean_over_ranks
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer

SCHEDULES = ("ramp", "constant")


class QuantNet(Method):
    """Trains 1-bit weights as scale / 2 * phi(w / scale), phi a small network that all layers share.

    Differentiable throughout, in training mode and until `harden_at`; a penalty draws |phi| to 1. Evaluation and
    deployment always use the plain quantizer, whose value is the sign of the same weight, and from `harden_at` on
    training does too: norms and scales settle on what is shipped. Weights of more bits are left as the rules say.

    Args:
        model: prepared and calibrated, with 1-bit weights on the grid `lsq` or `seq` (equal at 1 bit).
        total_steps: optimizer steps of the whole training.
        width: hidden units of phi. Default 16.
        lam: strength of the penalty, lam * mean (1 - |phi|)^2 over all 1-bit weights. Default 1.
        schedule: "ramp": from 0 to `lam` at `harden_at`, linearly (default); "constant".
        lr: Adam's rate for phi. Default 0.01.
        harden_at: fraction of training from which the plain quantizer trains. Default 0.3, the best of five on the
            digits (`benchmarks/accuracy/README.md`); 0 is plain training.

    Loss: `quantnet`. Metric after an epoch: `quantnet/distance`, the mean of 1 - |phi|.

    Raises:
        BitwrightError: a value is not accepted, no weight has 1 bit, or its grid is another one.
    """

    name = "quantnet"
    sets_bits = True  # it holds them at 1: beside a method that moves them phi would end in another grid's values
    makes_weights = True

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        width: int = 16,
        lam: float = 1.0,
        schedule: str = "ramp",
        lr: float = 0.01,
        harden_at: float = 0.3,
    ):
        need = partial(require, self.name)
        need(total_steps >= 1, "total_steps", total_steps, "a whole number >= 1")
        need(width >= 1, "width", width, "a whole number >= 1")
        need(lam >= 0, "lam", lam, "a number >= 0")
        need(schedule in SCHEDULES, "schedule", schedule, " or ".join(SCHEDULES))
        need(lr > 0, "lr", lr, "a number > 0")
        need(0 <= harden_at <= 1, "harden_at", harden_at, "0 <= fraction <= 1")
        self.lam, self.schedule, self.steps = lam, schedule, 0
        self.deadline = round(harden_at * total_steps)
        self.sites = binary_weights(unwrap(model))
        quantizers = [q for _, _, q in self.sites.values()]
        self.network = MetaNetwork(width, quantizers[0].bits.device)
        self.optimizer = torch.optim.Adam(self.network.leaves(), lr=lr)
        self.done = self.steps >= self.deadline
        for quantizer in quantizers:
            quantizer.register_forward_hook(self._replace, prepend=True)

    def _replace(self, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The value in place of the quantizer's output, while training."""
        if self.done or quantizer.bypass or not quantizer.training:
            return None
        weight, grid = inputs[0], quantizer.grid
        scale = grid.effective_scale()
        if scale.requires_grad:
            scale = scale_gradient(scale, (shared_by(weight, grid.shape) * quantizer.code_hi).rsqrt())
        scale = along(scale, weight, grid.shape.axis)
        return (0.5 * scale * self.network(weight / scale)).to(output.dtype)

    def nearly_binary(self) -> dict[str, Tensor]:
        """{layer's weight: phi of it}, each the shape of the weight, with its graph to the weight and phi alone."""
        found = {}
        for name, (layer, slot, quantizer) in self.sites.items():
            weight, grid = layer.weight_of(slot), quantizer.grid
            assert isinstance(grid, LSQ)
            found[name] = self.network(weight / along(grid.effective_scale().detach(), weight, grid.shape.axis))
        return found

    def strength(self) -> float:
        """The penalty's factor at the present step."""
        return self.lam * (min(1.0, self.steps / self.deadline) if self.schedule == "ramp" else 1.0)

    def losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if self.done:
            return {}
        values = list(self.nearly_binary().values())
        missed = torch.stack([(1.0 - v.abs()).square().sum() for v in values]).sum()
        return {"quantnet": self.strength() * missed / sum(v.numel() for v in values)}

    def after_step(self, step: Any) -> None:
        self.steps += 1
        if self.done:
            return
        for leaf in self.network.leaves():
            if leaf.grad is not None:
                leaf.grad = mean_over_ranks(leaf.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done = self.steps >= self.deadline

    @torch.no_grad()
    def after_epoch(self, metrics: dict[str, Any]) -> None:
        values = list(self.nearly_binary().values())
        missed = torch.stack([(1.0 - v.abs()).sum() for v in values]).sum().item()
        metrics["quantnet/distance"] = missed / sum(v.numel() for v in values)

    def summary(self) -> dict[str, Any]:
        return {"weights": list(self.sites), "hardened": self.done}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "network": self.network.state_dict(), "adam": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["network"]["leaves"][1]) != (width := len(self.network.log_v)):
            raise BitwrightError(
                f"quantnet: the checkpoint holds a network of width {len(state['network']['leaves'][1])}, "
                f"this run has {width}"
            )
        self.steps = int(state["steps"])
        self.done = self.steps >= self.deadline
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["adam"])


def binary_weights(model: nn.Module) -> dict[str, tuple[QuantLayer, str, Quantizer]]:
    """{quantizer's name: (layer, slot, quantizer)} of every 1-bit weight.

    Raises:
        BitwrightError: there is none, or its values are no plus and minus half a learned scale.
    """
    found: dict[str, tuple[QuantLayer, str, Quantizer]] = {}
    for name, layer in quant_layers(model).items():
        for slot in layer.weight_slots:
            quantizer = getattr(layer, slot, None)
            if not isinstance(quantizer, Quantizer) or quantizer.most_bits != 1:
                continue
            if not isinstance(quantizer.grid, LSQ) or quantizer.codes.zero != 0.5:
                raise BitwrightError(
                    f"quantnet: the grid {quantizer.spec.grid!r} of {name}.{slot} is not that of plus and minus half a "
                    "learned scale; use lsq"
                )
            found[f"{name}.{slot}" if name else slot] = (layer, slot, quantizer)
    if not found:
        raise BitwrightError("quantnet: no weight of the model has 1 bit, and it binarizes; use bits: w1aN")
    return found
