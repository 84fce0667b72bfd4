"""GAQAT's routing: which scales listen to the task's gradient beside that of flatness."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.methods.base import Method
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.methods.two_pass import TwoPass
from bitwright.prepare import quantizers


def disorder(signs: Tensor) -> Tensor:
    """The share of steps, 0 to 1, at which a gradient turned round: (steps >= 2, ...) signs -1, 0, 1 to (...)."""
    return (signs[1:] * signs[:-1] < 0).double().mean(0)


class GAQAT(Method):
    """Two passes as `SAQ`; a scale has two gradients, g_task at Q(w) and g_smooth at Q(w) + e, and may leave one out.

    g_scale = gate * g_task + g_smooth. Every `window` steps the gate of a scale closes where the disorder of its task
    gradient over the window (`disorder`) was below `threshold`: it pushes one way against flatness; and opens again
    where it was not. All other parameters get the gradient at Q(w) + e.

    Args:
        model: prepared with grids that learn scales.
        rho: as in `SAQ`. Default 0.4.
        window: steps between decisions, at least 2. Default 50 (no source gives it).
        threshold: 0 to 1. Default 0.3 (no source gives it); a gradient without direction has a disorder of 0.5.

    Metric after an epoch: `gaqat/frozen`, the share of scales whose gate is closed.

    Raises:
        BitwrightError: a value is not accepted, no weight is quantized, or no grid learns.
    """

    name = "gaqat"

    def __init__(self, model: nn.Module, rho: float = 0.4, window: int = 50, threshold: float = 0.3):
        if not (rho >= 0 and window >= 2 and 0 <= threshold <= 1):
            raise BitwrightError(
                f"gaqat: rho={rho}, window={window}, threshold={threshold} is not accepted; "
                "use rho >= 0, window >= 2, 0 <= threshold <= 1"
            )
        found = {f"{n}.{k}": p for n, q in quantizers(unwrap(model)).items() for k, p in q.grid.named_parameters()}
        self.scales = {name: p for name, p in found.items() if p.requires_grad}
        if not self.scales:
            raise BitwrightError("gaqat: no grid of the model learns a scale; use lsq, lsq+, pact or tqt")
        self.rho, self.window, self.threshold = rho, window, threshold
        self.passes = TwoPass(model, "gaqat")
        self.gates = {name: torch.ones_like(p) for name, p in self.scales.items()}
        self.signs: list[dict[str, Tensor]] = []
        self.present: dict[str, Tensor] = {}

    def backward(self, step: Any) -> None:
        task, _ = self.passes.backward(step, self.rho, list(self.scales.values()))
        for (name, scale), gradient in zip(self.scales.items(), map(mean_over_ranks, task), strict=True):
            routed = self.gates[name] * gradient
            scale.grad = routed if scale.grad is None else scale.grad + routed
            self.present[name] = self.present.get(name, 0.0) + gradient

    def after_step(self, step: Any) -> None:
        self.signs.append({name: gradient.sign() for name, gradient in self.present.items()})
        self.present = {}
        if len(self.signs) < self.window:
            return
        for name in self.gates:
            turned = disorder(torch.stack([each[name] for each in self.signs]))
            self.gates[name] = (turned >= self.threshold).to(self.gates[name])
        self.signs = []

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        closed = sum((gate == 0).sum().item() for gate in self.gates.values())
        metrics["gaqat/frozen"] = closed / sum(gate.numel() for gate in self.gates.values())

    def state_dict(self) -> dict[str, Any]:
        copied = lambda tensors: {n: t.clone() for n, t in tensors.items()}  # noqa: E731
        return {
            "gates": copied(self.gates),
            "signs": [copied(each) for each in self.signs],
            "present": copied(self.present),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["gates"].keys() != self.gates.keys():
            raise BitwrightError("gaqat: the checkpoint holds the gates of other scales than this run's")
        moved = lambda tensors: {n: t.to(self.gates[n].device) for n, t in tensors.items()}  # noqa: E731
        self.gates, self.present = moved(state["gates"]), moved(state["present"])
        self.signs = [moved(each) for each in state["signs"]]
