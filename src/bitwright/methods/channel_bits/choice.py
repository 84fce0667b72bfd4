"""Which channels of a weight get a bit more, and how well a layer then does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import Inputs
from bitwright.channels import ChannelQuantizer
from bitwright.layers import QuantLayer
from bitwright.methods.probe import forward_fast, untouched
from bitwright.prepare import quantizers, set_bypass


@torch.no_grad()
def kurtosis(weight: Tensor, axis: int = 0) -> Tensor:
    """E[(w - mean)^4] / variance^2 of every channel, (channels,) float64; 0 for a channel of equal weights.

    3 for normally distributed weights, more where a few lie far out.
    """
    rows = weight.detach().double().movedim(axis, 0).flatten(1)
    about = rows - rows.mean(1, keepdim=True)
    variance = about.square().mean(1)
    return torch.where(variance > 0, about.pow(4).mean(1) / variance.square(), 0.0)


def spread_bits(order: Sequence[int], bits: int, count: int) -> list[int]:
    """Bits per channel: `bits` + 1 for the first `count` of `order`, `bits` - 1 for its last, `bits` for the others.

    order: indices of channels. The mean is `bits`.
    """
    found = [bits] * len(order)
    for index in range(count):
        found[order[index]] += 1
        found[order[-1 - index]] -= 1
    return found


class Place:
    """A layer and the quantizer of its weight, in `slot`, and what its channels may get.

    bits: of all channels at first. counts: how many channels may get a bit more, and a bit
    less; the first is 0. errors: sums over what was measured of the layer's squared error at each count, float64.
    """

    def __init__(self, layer: QuantLayer, slot: str, quantizer: ChannelQuantizer, bits: int, counts: list[int]):
        self.layer, self.slot, self.quantizer = layer, slot, quantizer
        self.bits, self.counts = bits, counts
        self.errors = torch.zeros(len(counts), dtype=torch.float64)

    def assignment(self, count: int) -> list[int]:
        """Bits per channel with `count` of them moved up, and down; by the kurtosis of the present weight."""
        found = kurtosis(self.layer.weight_of(self.slot), self.quantizer.shape.axis)
        return spread_bits(found.argsort(descending=True, stable=True).tolist(), self.bits, count)

    def measured(self, args: Any, kwargs: Any) -> Tensor:
        """The relative squared error of the layer's output at every count, beside the float layer's; (counts,)."""
        with untouched(self.layer):
            own = list(quantizers(self.layer).values())
            with bypassed(own):
                wanted = first_tensor(self.layer.forward(*args, **kwargs)).double()
            found = torch.zeros(len(self.counts), dtype=torch.float64, device=wanted.device)
            for i, count in enumerate(self.counts):
                with untouched(self.layer):
                    self.quantizer.set_bits(self.assignment(count))
                    error = first_tensor(self.layer.forward(*args, **kwargs)).double() - wanted
                found[i] = error.square().sum() / wanted.square().sum().clamp(min=1e-30)
        return found


@contextmanager
def bypassed(quantizers: Sequence[Any]) -> Iterator[None]:
    """Tensors pass through these quantizers for a while."""
    before = [q.bypass for q in quantizers]
    set_bypass(quantizers, True)
    try:
        yield
    finally:
        for quantizer, bypass in zip(quantizers, before, strict=True):
            quantizer.bypass = bypass


def first_tensor(output: Any) -> Tensor:
    """The output of a layer, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def measure(model: nn.Module, inputs: Inputs, places: Sequence[Place]) -> list[Tensor]:
    """`Place.measured` of every place in one forward pass of `model`, which is as it was afterwards.

    A layer is given what it is given in the quantized network. One that runs several times counts each time.
    """
    found = [torch.zeros_like(place.errors, device=inputs.device) for place in places]
    busy = False

    def hook(index: int) -> Any:
        def seen(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal busy
            if not busy:
                busy = True
                found[index] += places[index].measured(args, kwargs)
                busy = False

        return seen

    handles = [p.layer.register_forward_hook(hook(i), with_kwargs=True) for i, p in enumerate(places)]
    try:
        with untouched(model):
            forward_fast(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
