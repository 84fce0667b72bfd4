"""Two passes: the gradient is taken where the loss is worst around the quantized weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
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
    """What is added to the output of one weight quantizer while a two-pass step runs; a leaf with its own gradient."""

    def __init__(self, quantizer: Quantizer, like: Tensor):
        self.value = torch.zeros_like(like, requires_grad=True)
        self.active = False
        quantizer.register_forward_hook(self)

    def __call__(self, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output + self.value if self.active else None


class TwoPass:
    """The two passes over one batch, for methods that own the backward pass.

    Attributes:
        slots: one per weight quantizer. affine: scales and shifts of the norms, which are perturbed along
            where they are trained.
    """

    def __init__(self, model: nn.Module, owner: str):
        model = unwrap(model)
        self.slots = [
            Slot(quantizer, layer.weight_of(slot))
            for layer in quant_layers(model).values()
            for slot in layer.weight_slots
            if isinstance(quantizer := getattr(layer, slot, None), Quantizer)
        ]
        if not self.slots:
            raise BitwrightError(f"{owner}: no weight of the model is quantized; give the rules a weight quantizer")
        norms = [m for m in model.modules() if isinstance(m, NORMS)]
        self.affine = [p for norm in norms for p in norm.parameters()]
        self.statistics = [b for norm in norms for b in norm.buffers()]

    def backward(self, step: Any, rho: float, also: Sequence[Tensor] = ()) -> tuple[list[Tensor], Tensor]:
        """Fill the gradients of `step.batch` with those of L(Q(w) + e).

        Returns:
            The first pass's gradients of L(Q(w)) for the tensors of `also` (zeros where there are none), divided by
            `step.accumulate` like the filled ones; and L(Q(w) + e) - L(Q(w)), a detached scalar.
        """
        with self._in_use():
            flat = step.forward_loss(step.batch)
            # Parts of a network may be frozen, or thawed, between two steps.
            targets = [*(slot.value for slot in self.slots), *(p for p in self.affine if p.requires_grad)]
            wanted = [*targets, *also]
            asked = [t for t in wanted if t.requires_grad]
            found = dict(zip(map(id, asked), torch.autograd.grad(flat, asked, allow_unused=True), strict=True))
            gradients = [torch.zeros_like(t) if (g := found.get(id(t))) is None else g for t in wanted]
            first = step.result
            with restored([*targets, *self.statistics]):
                with torch.no_grad():
                    torch._foreach_add_(targets, perturbations(gradients[: len(targets)], rho))  # pyright: ignore
                sharp = step.forward_loss(step.batch)
                (sharp / step.accumulate).backward()
            # What is reported is the network's own loss.
            step.result = first
        for slot in self.slots:
            slot.value.grad = None
        return [g / step.accumulate for g in gradients[len(targets) :]], (sharp - flat).detach()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Every slot's value is added to its quantized weight."""
        for slot in self.slots:
            slot.active = True
        try:
            yield
        finally:
            for slot in self.slots:
                slot.active = False
