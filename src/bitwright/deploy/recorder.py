"""The codes of every quantizer, of the training form and of the frozen form, while both run on the same input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import Inputs, outputs_of
from bitwright.deploy.integer import InputCodes, IntLayer
from bitwright.prepare import quantizers


class Recorder:
    """Runs training and frozen form on the same input and keeps the codes of every input quantizer.

    Attributes:
        codes: the frozen form's input quantizers by name.
        order: names of layers and input quantizers as the frozen form executes them.
        training, frozen: {quantizer: one int16 code tensor per call}, of the last run.
    """

    def __init__(self, model: nn.Module, frozen: nn.Module):
        self.models = model, frozen
        self.codes = {m.name: m for m in frozen.modules() if isinstance(m, InputCodes)}
        self.order: list[str] = []
        self.training: dict[str, list[Tensor]] = {}
        self.frozen: dict[str, list[Tensor]] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> "Recorder":
        model, frozen = self.models
        for name, quantizer in quantizers(model).items():
            if name in self.codes:
                self.handles.append(quantizer.register_forward_hook(self.training_hook(self.codes[name])))
        for module in frozen.modules():
            if isinstance(module, IntLayer):
                self.handles.append(module.register_forward_pre_hook(lambda *_, n=module.name: self.note(n)))
            elif isinstance(module, InputCodes):
                self.handles.append(module.register_forward_hook(self.frozen_hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, name: str) -> None:
        """Remember the order of first calls."""
        if name not in self.order:
            self.order.append(name)

    def training_hook(self, codes: InputCodes) -> Callable[[nn.Module, Any, Tensor], None]:
        """A hook that reads codes off the values that the training form computes with."""

        def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
            # The values are within rounding of a code, so that float32 tells which.
            k = y / codes.along_axis(codes.scale, y.ndim)
            if codes.shifted:
                k = k + codes.along_axis(codes.zero, y.ndim)
            self.training.setdefault(codes.name, []).append(k.round().to(torch.int16))

        return hook

    def frozen_hook(self, codes: nn.Module, _args: Any, centered: Tensor) -> None:
        """A hook that keeps the codes that the frozen form computes with."""
        assert isinstance(codes, InputCodes)
        self.note(codes.name)
        k = centered
        if codes.shifted:
            k = (k + codes.along_axis(codes.zero, centered.ndim).double()).round()
        self.frozen.setdefault(codes.name, []).append(k.to(torch.int16))

    def run(self, x: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs of the training form and of the frozen form."""
        self.training.clear()
        self.frozen.clear()
        model, frozen = self.models
        return outputs_of(x.run(model), "verify"), outputs_of(x.run(frozen), "verify")
