"""Running sums of an epoch, kept on the device."""

import torch
from torch import Tensor

from bitwright.step import StepResult


class Meter:
    """Means of losses and accuracy over the images of an epoch so far; float64 scalars, read only when asked."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Start a new epoch."""
        self.sums = {}

    def add(self, result: StepResult, y: Tensor) -> None:
        """Take in one batch with labels `y`, shape (N,)."""
        count = len(y)
        self._add("loss", result.loss * count)
        for name, loss in result.losses.items():
            self._add(f"loss_{name}", loss * count)
        self._add("correct", (result.outputs.argmax(1) == y).sum())
        self._add("images", torch.tensor(count))

    def _add(self, key: str, value: Tensor) -> None:
        value = value.to(self.device, torch.float64)
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def means(self) -> dict[str, float]:
        """`loss`, `loss_NAME` of every named loss, `train_accuracy`."""
        sums = self.state_dict()
        losses = {k: v / sums["images"] for k, v in sums.items() if k.startswith("loss")}
        return {**losses, "train_accuracy": sums["correct"] / sums["images"]}

    def state_dict(self) -> dict[str, float]:
        """The sums as plain numbers."""
        return {k: float(v) for k, v in self.sums.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in state.items()}
