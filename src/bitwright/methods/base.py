"""What a method may do in a training step."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from bitwright.batches import Inputs, inputs_of

if TYPE_CHECKING:
    from bitwright.step import Step


class Batch(NamedTuple):
    """One batch of a step: inputs and targets as the model and the loss take them.

    x: a tensor; a tuple of tensors, for models of several inputs; or a dict of keyword arguments.
    """

    x: Any
    y: Any

    @property
    def inputs(self) -> Inputs:
        """What the model is called with."""
        return inputs_of((self.x, self.y), "step")


class Method:
    """A training method: override the hooks it needs, leave the others.

    `Step` calls them in the order of its list of methods; a method holds no reference to a trainer.
    """

    name: str = ""
    sets_bits: bool = False  # whether it changes the bit-widths of quantizers; a `Step` takes one such method
    makes_weights: bool = False  # whether it computes quantized weights from parameters of its own
    moves_weights: bool = False  # whether it needs quantized weights that the optimizer trains; not beside the former
    frozen: nn.Module | None = None  # a network that it only reads; a `Step` takes none that its optimizer trains

    def losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Further scalar losses, already weighted, by name; `outputs` are the model's for `batch`."""
        return {}

    def backward(self, step: "Step") -> None:
        """Fill the gradients of `step.batch`; at most one method may override this (two-pass methods do)."""
        step.default_backward()

    def after_step(self, step: "Step") -> None:
        """After the optimizer has stepped."""

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        """After an epoch; `metrics` may be read and extended."""

    def summary(self) -> dict[str, Any]:
        """What a reader of the finished run wants to know, as plain values ready for JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the method remembers and a model's buffers do not hold (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
