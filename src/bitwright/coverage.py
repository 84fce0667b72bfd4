"""Coverage: which quantizers really ran, and which layers stayed float."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitwright.calibrate import batch_inputs, evaluating
from bitwright.errors import BitwrightError
from bitwright.layers import Add, is_quantized, quantizable
from bitwright.prepare import quantizers


@dataclass(frozen=True)
class Coverage:
    """What one forward pass in evaluation mode did.

    ran, missed: names of quantizers. float_layers: layers that could be quantized and were not.
    """

    ran: tuple[str, ...]
    missed: tuple[str, ...]
    float_layers: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every quantizer ran."""
        return not self.missed


def coverage(model: nn.Module, batch: Any) -> Coverage:
    """Run `model` once in evaluation mode and see which quantizers were called.

    A fused path of a library can skip swapped layers without a word; the accuracy then is the float model's.

    Args:
        model: prepared and calibrated.
        batch: an input tensor or an (input, target) pair.
    """
    found = quantizers(model)
    called: set[str] = set()
    hooks = [q.register_forward_hook(lambda *_, n=n: called.add(n)) for n, q in found.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(batch_inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
    left = tuple(
        n for n, m in model.named_modules() if quantizable(m) and not is_quantized(m) and not isinstance(m, Add)
    )
    ran = tuple(n for n in found if n in called)
    return Coverage(ran, tuple(n for n in found if n not in called), left)


def require_complete(result: Coverage) -> None:
    """Raise BitwrightError naming the quantizers that did not run, if any."""
    if result.missed:
        shown = ", ".join(result.missed[:5]) + (" ..." if len(result.missed) > 5 else "")
        raise BitwrightError(
            f"coverage: {len(result.missed)} of {len(result.missed) + len(result.ran)} quantizers did not run "
            f"in evaluation: {shown}; the measured accuracy would not be the quantized network's"
        )
