"""SAQ's two passes: the gradient is taken where the loss is worst around the quantized weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.methods.base import Method
from bitwright.methods.probe import unwrap
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def perturbations(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """rho g / |g|, |g| over all tensors together; zeros where every gradient is zero. Shapes as given."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    factor = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    return [g * factor for g in gradients]


@contextmanager
def restored(tensors: list[Tensor]) -> Iterator[None]:
    """Whatever is written to `tensors` within is undone, to the last bit; at least one tensor."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, before)  # pyright: ignore[reportPrivateImportUsage]


class Slot:
    """What is added to the output of one weight quantizer while a step of `SAQ` runs; a leaf with its own gradient."""

    def __init__(self, quantizer: Quantizer, like: Tensor):
        self.value = torch.zeros_like(like, requires_grad=True)
        self.active = False
        quantizer.register_forward_hook(self)

    def __call__(self, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output + self.value if self.active else None


class SAQ(Method):
    """The gradient of L(Q(w) + e), e = rho g / |g| with g the gradient at Q(w): weights in flat valleys.

    Perturbing quantized weights, not latent ones, is the released form: a small e on a latent weight is eaten by
    rounding. Two forward and two backward passes a step. Scales and shifts of the model's norms are perturbed
    along and put back; running statistics follow the first pass alone.

    Args:
        model: prepared.
        rho: length of e, in the units of the weights, over all layers together. Default 0.4 (the authors' code,
            ResNet-20 at 4 bits; 0.3 for ResNet-18 on ImageNet).

    Metric after an epoch: `saq/sharpness`, the mean of L(Q(w) + e) - L(Q(w)) over its batches.

    Raises:
        BitwrightError: rho is negative, or no weight is quantized.
    """

    name = "saq"

    def __init__(self, model: nn.Module, rho: float = 0.4):
        if not rho >= 0:
            raise BitwrightError(f"saq: rho={rho} is not accepted; use a number >= 0")
        self.rho, self.model = rho, unwrap(model)
        self.slots = [
            Slot(quantizer, layer.weight_of(slot))
            for layer in quant_layers(self.model).values()
            for slot in layer.weight_slots
            if isinstance(quantizer := getattr(layer, slot, None), Quantizer)
        ]
        if not self.slots:
            raise BitwrightError("saq: no weight of the model is quantized; give the rules a weight quantizer")
        norms = [m for m in self.model.modules() if isinstance(m, NORMS)]
        self.affine = [p for norm in norms for p in norm.parameters() if p.requires_grad]
        self.statistics = [b for norm in norms for b in norm.buffers()]
        self.sharpness, self.count = 0.0, 0

    def backward(self, step: Any) -> None:
        with self.slots_in_use():
            flat = step.forward_loss(step.batch)
            targets = [*(slot.value for slot in self.slots), *self.affine]
            found = torch.autograd.grad(flat, targets, allow_unused=True)
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)]
            first = step.result
            with restored([*targets, *self.statistics]):
                with torch.no_grad():
                    torch._foreach_add_(targets, perturbations(gradients, self.rho))  # pyright: ignore
                sharp = step.forward_loss(step.batch)
                (sharp / step.accumulate).backward()
            # What is reported is the network's own loss.
            step.result = first
        for slot in self.slots:
            slot.value.grad = None
        self.sharpness, self.count = self.sharpness + (sharp - flat).detach(), self.count + 1

    @contextmanager
    def slots_in_use(self) -> Iterator[None]:
        """Every slot's value is added to its quantized weight."""
        for slot in self.slots:
            slot.active = True
        try:
            yield
        finally:
            for slot in self.slots:
                slot.active = False

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        metrics["saq/sharpness"] = float(self.sharpness) / max(self.count, 1)
        self.sharpness, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sharpness": float(self.sharpness), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sharpness, self.count = float(state["sharpness"]), int(state["count"])
