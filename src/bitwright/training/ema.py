"""An exponential moving average of a model's weights."""

import copy

import torch
from torch import nn


class Ema:
    """`model` holds the averages of parameters and copies of buffers; it is evaluated and exported, never trained.

    decay: weight of the past per optimizer step; smaller at first, min(decay, (1 + n) / (10 + n)) in step n, so that
    the average forgets the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in `model` after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    def state_dict(self) -> dict:
        """The averages and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])
