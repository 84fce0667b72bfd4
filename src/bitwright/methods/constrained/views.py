"""The low-precision and the full-precision view of one network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids import DoReFa
from bitwright.layers import quantizer_in
from bitwright.layers.conv import QuantConv
from bitwright.layers.linear import QuantProduct
from bitwright.methods.two_pass import NORMS
from bitwright.prepare import quant_layers, quantizers, set_bypass
from bitwright.quantizer import Quantizer

PLAIN = ("ste", "clipped_ste")  # estimators that shape no gradient


class Tap:
    """Remembers what a layer was given and put out, while `alive`; a copy of it is inert."""

    def __init__(self) -> None:
        self.alive = False
        self.input: Any = None
        self.output: Any = None

    def __reduce__(self) -> tuple[type["Tap"], tuple[()]]:
        return Tap, ()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.alive:
            self.input, self.output = args[0].detach(), output.detach()


class Cut:
    """Keeps the gradient of a quantized weight from the weight itself, while `alive`; a copy of it is inert."""

    def __init__(self) -> None:
        self.alive = False

    def __reduce__(self) -> tuple[type["Cut"], tuple[()]]:
        return Cut, ()

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0].detach(),) if self.alive else None


class Views:
    """A prepared network in training, seen at low and at full precision.

    Attributes:
        taps: of every convolution and linear layer whose weight is quantized, by name.

    Raises:
        BitwrightError: no weight is quantized; an estimator or a grid makes no sense without a gradient to the weight.
    """

    def __init__(self, model: nn.Module, owner: str):
        self.every = list(quantizers(model).values())
        self.cuts: list[Cut] = []
        self.layers: dict[str, nn.Module] = {}
        self.taps: dict[str, Tap] = {}
        for name, layer in quant_layers(model).items():
            own = [q for slot in layer.weight_slots if isinstance(q := getattr(layer, slot, None), Quantizer)]
            for quantizer in own:
                self._check(quantizer, owner)
                self.cuts.append(Cut())
                quantizer.register_forward_pre_hook(self.cuts[-1])
            if own and isinstance(layer, QuantConv | QuantProduct):
                self.layers[name], self.taps[name] = layer, Tap()
                layer.register_forward_hook(self.taps[name])
        if not self.cuts:
            raise BitwrightError(f"{owner}: no weight of the model is quantized; give the rules a weight quantizer")
        self.statistics = [b for m in model.modules() if isinstance(m, NORMS) for b in m.buffers()]

    def _check(self, quantizer: Quantizer, owner: str) -> None:
        if quantizer.spec.estimator not in PLAIN:
            raise BitwrightError(
                f"{owner}: the estimator {quantizer.spec.estimator!r} of {quantizer.name} shapes a gradient that "
                "never reaches the weight; use clipped_ste"
            )
        if isinstance(quantizer.grid, DoReFa):
            raise BitwrightError(
                f"{owner}: the grid {quantizer.spec.grid!r} of {quantizer.name} is that of a transformed weight, which "
                "the full-precision network does not have; use lsq, lsq+, pact, tqt or minmax"
            )

    @contextmanager
    def low(self) -> Iterator[None]:
        """Forward passes within record every layer, and give no weight a gradient across its quantizer."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within `low`: forward passes bypass every quantizer and are ordinary ones."""
        before = [q.bypass for q in self.every]
        set_bypass(self.every, True)
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)
            for quantizer, bypass in zip(self.every, before, strict=True):
                quantizer.bypass = bypass

    def _switch(self, alive: bool) -> None:
        for hook in (*self.cuts, *self.taps.values()):
            hook.alive = alive

    def local(self, name: str) -> tuple[Tensor, Tensor]:
        """(output of the full-precision layer on the input that was recorded, quantized; the recorded output).

        The first has a gradient to the layer's weight and bias, and to nothing before it.
        """
        layer, tap = self.layers[name], self.taps[name]
        x = tap.input
        source = quantizer_in(layer, "input_quantizer")  # pyright: ignore[reportArgumentType]
        if source is not None:  # what another quantizer has put out stays as it is
            with torch.no_grad():
                x = source(x)
        with self.full():
            return layer(x), tap.output
