"""The meta network: a learned map from weights to nearly binary ones."""

from typing import Any

import torch
from torch import Tensor

STEEPEST = 8.0  # of the hidden units at the start; the flattest has 1 / 2


class MetaNetwork:
    """phi(u) = tanh(a u + sum_j v_j tanh(c_j u)), element by element, a, v_j and c_j > 0.

    One value is lifted to `width` hidden ones, compressed to one and squashed into (-1, 1). Positive factors and no
    biases make phi odd and rising, so that sign(phi(u)) = sign(u): what is deployed, the sign, is that of the weight
    itself, and phi can be thrown away.

    Args:
        width: hidden units. device: where the weights are.

    Attributes:
        log_a (1,), log_v (width,), log_c (width,): float32 leaves. They start at a = 1, v = 1 / width and c spread
            evenly in the logarithm from 1/2 to 8.
    """

    def __init__(self, width: int, device: torch.device):
        low, high = torch.tensor([0.5, STEEPEST]).log().tolist()
        self.log_a = torch.zeros(1, device=device).requires_grad_()
        self.log_v = torch.full((width,), 1.0 / width, device=device).log().requires_grad_()
        self.log_c = torch.linspace(low, high, width, device=device).requires_grad_()

    def __call__(self, u: Tensor) -> Tensor:
        """phi(u), the shape and dtype of `u`."""
        inner = self.log_a.exp().to(u.dtype) * u
        # Unit by unit, so that a large weight is not held `width` times over in one tensor.
        for v, c in zip(self.log_v.exp().to(u.dtype), self.log_c.exp().to(u.dtype), strict=True):
            inner = inner + v * torch.tanh(c * u)
        return torch.tanh(inner)

    def leaves(self) -> list[Tensor]:
        """What is learned."""
        return [self.log_a, self.log_v, self.log_c]

    def state_dict(self) -> dict[str, Any]:
        """Values, and gradients that no step was taken on yet."""
        return {
            "leaves": [t.detach().clone() for t in self.leaves()],
            "pending": [None if t.grad is None else t.grad.clone() for t in self.leaves()],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for leaf, value, pending in zip(self.leaves(), state["leaves"], state["pending"], strict=True):
            leaf.copy_(value)
            leaf.grad = None if pending is None else pending.to(leaf)
