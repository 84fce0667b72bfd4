"""The frozen partner of BWRF, and whether it can be cut where it is asked to be."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.methods.bwrf.blocks import Tap
from bitwright.methods.lean import lean_copy
from bitwright.methods.probe import unwrap


class Partner:
    """A frozen network whose blocks can be fed the outputs of another's.

    Args:
        model: float network; it is put in evaluation mode and its parameters stop requiring gradients.
        blocks: names of its blocks.
    """

    def __init__(self, model: nn.Module, blocks: list[str]):
        self.blocks = blocks
        self.handles: list[Any] = []
        self._attach(model.requires_grad_(False).eval())

    def slim(self, x: Tensor) -> None:
        """From now on run a lean copy of the network (`lean_copy`); `x`: a few rows of input."""

        def outputs(model: nn.Module, x: Tensor) -> list[Any]:
            logits, blocks = Partner(model, self.blocks).plain(x)
            return [logits, *blocks]

        self._attach(lean_copy(self.model, x, outputs))

    def _attach(self, model: nn.Module) -> None:
        """Listen to the blocks of `model`, and to no other."""
        for handle in self.handles:
            handle.remove()
        self.model, inside = model, unwrap(model)
        self.taps = [Tap(always=True) for _ in self.blocks]
        self.handles = [tap.attach(inside.get_submodule(b)) for tap, b in zip(self.taps, self.blocks, strict=True)]
        self._listen(False)

    def _listen(self, alive: bool) -> None:
        """Taps act in our own passes only: the partner may also serve as somebody's teacher."""
        for tap in self.taps:
            tap.alive = alive
            tap.append = tap.output = None

    def plain(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """(logits, the blocks' outputs) of `x`, without gradient."""
        self.model.eval()  # a wrapper's train() may have reached it
        self._listen(True)
        try:
            with torch.no_grad():
                logits = self.model(x)
            return logits, [tap.output for tap in self.taps]
        finally:
            self._listen(False)

    def branches(self, carrier: Tensor, features: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """One forward pass in which `features[k]` join the rows that leave block k: (carrier's logits, {k: logits}).

        Args:
            carrier: rows that run through the whole network, (c, ...).
            features: by index of the block (0-based) whose output they stand for; gradient reaches them.
        """
        self.model.eval()
        self._listen(True)
        for k, rows in features.items():
            self.taps[k].append = rows
        try:
            logits = self.model(carrier)
        finally:
            self._listen(False)
        parts = logits.split([len(carrier), *(len(features[k]) for k in sorted(features))])
        return parts[0], dict(zip(sorted(features), parts[1:], strict=True))


@torch.no_grad()
def check_cut(partner: Partner, x: Tensor, student: list[Any]) -> None:
    """Whether the logits depend on the input through each block's output only, shown on the partner itself.

    The partner's own outputs for a few rows of `x` are fed to its blocks beside *another* input; each branch must
    give the partner's logits, which it does not if anything bypasses the cut or mixes the rows of a batch.

    Args:
        student: the outputs of the low-precision network's blocks, for their shapes.

    Raises:
        BitwrightError: the first block at which the network cannot be cut, and why.
    """
    x = x[:2]
    with torch.autocast(x.device.type, enabled=False):
        _check_cut(partner, x, student)


def _check_cut(partner: Partner, x: Tensor, student: list[Any]) -> None:
    logits, outputs = partner.plain(x)
    if not isinstance(logits, Tensor):
        raise BitwrightError(f"bwrf: the partner gives a {type(logits).__name__}; it must give one tensor of logits")
    other = x[:1].flip(-1)
    if x.is_floating_point():
        other = 1.0 - 0.5 * other
    # Kernels may round differently for another number of rows.
    tolerance = max(1e-3, 8 * torch.finfo(logits.dtype).eps)
    for k, (name, h, low) in enumerate(zip(partner.blocks, outputs, student, strict=True)):
        reason = None
        if not isinstance(h, Tensor) or not isinstance(low, Tensor):
            reason = "its output is not a single tensor"
        elif h.ndim < 2 or len(h) != len(x):
            reason = f"its output of shape {tuple(h.shape)} has no batch axis 0"
        elif h.shape[1:] != low.shape[1:]:
            reason = f"its output has shape {tuple(low.shape[1:])} in the model and {tuple(h.shape[1:])} in the partner"
        elif k < len(outputs) - 1:
            try:
                again = partner.branches(other, {k: h})[1][k]
            except RuntimeError as error:
                reason = f"the partner does not run from there on ({str(error).splitlines()[0]})"
            else:
                if not torch.allclose(again, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max())):
                    reason = "the logits also depend on the input by another path, or the rows of a batch are mixed"
        if reason is not None:
            raise BitwrightError(f"bwrf: the network cannot be cut behind block {name!r}: {reason}")
