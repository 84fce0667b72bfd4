"""One output of the network, in `verify`'s report."""

from dataclasses import dataclass

from torch import Tensor

# Logits of images whose codes all agree differ by float32 rounding only, relative to the largest logit.
LOGIT_RATE = 1e-4


@dataclass
class OutputRow:
    """One output of the network, training form against file: largest absolute difference, over clean images, and size.

    name: as files call it. class_axis: along which a prediction is the largest value; 0: none was compared yet.
    """

    name: str = "logits"
    class_axis: int = 0
    difference: float = 0.0
    clean_difference: float = 0.0
    largest: float = 0.0

    def add(self, trained: Tensor, file: Tensor, clean: Tensor) -> None:
        """Take in one batch, a row per image."""
        distance = (trained - file).abs().reshape(len(clean), -1).amax(1)
        self.difference = max(self.difference, float(distance.max()))
        self.largest = max(self.largest, float(trained.abs().max()))
        if bool(clean.any()):
            self.clean_difference = max(self.clean_difference, float(distance[clean].max()))

    def off(self) -> str | None:
        """What is beyond tolerance, or None."""
        if self.clean_difference <= LOGIT_RATE * self.largest:
            return None
        return (
            f"output: {self.name} differ by {self.clean_difference:.3g} where all codes agree; "
            f"the largest is {self.largest:.3g}"
        )
