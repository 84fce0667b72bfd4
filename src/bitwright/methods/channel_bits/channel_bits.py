"""Bits per output channel: a bit more where a few weights lie far out, a bit less where none does."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bitwright.channels import by_channel
from bitwright.errors import BitwrightError
from bitwright.layers import QuantConvTranspose, QuantEmbedding, QuantLayer
from bitwright.methods.base import Method
from bitwright.methods.channel_bits.choice import Place, measure
from bitwright.methods.options import require
from bitwright.methods.probe import unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer
from bitwright.rules import matches, weight_layers
from bitwright.spec import MAX_BITS, MIN_BITS


class ChannelBits(Method):
    """Gives the channels of a weight that have the largest kurtosis a bit more, those of the least a bit less.

    How many, per layer: 0, or one of `shares` of its output channels, whichever has the least error of the layer's
    output beside the float layer's on the batches of the first `steps` steps. The mean bit-width stays exactly what
    the rules say. Chosen once; then training goes on with these bits, scales having followed channel by channel.

    Args:
        model: prepared and calibrated, with a scale per output channel. Make averages of it after the method.
        shares: fractions of the output channels to try, each above 0 and at most 0.5, rounded down to channels. Default
            0.1, as in the source.
        steps: batches to measure on, one per optimizer step. Default 4.
        fixed: patterns (as in rules) of layers whose bits are left alone. Default first and last.

    Embeddings and transposed convolutions are left alone. Metric after an epoch: `channel_bits/moved`, the share of
    channels that do not have their layer's bits. `summary()` holds how many channels have which bits, and the errors.

    Raises:
        BitwrightError: a value is not accepted, a layer's channels share a scale, its bits have none below or above, or
            no layer has channels enough.
    """

    name = "channel_bits"
    sets_bits = True

    def __init__(
        self,
        model: nn.Module,
        shares: Sequence[float] = (0.1,),
        steps: int = 4,
        fixed: Sequence[str] = ("first", "last"),
    ):
        need = partial(require, self.name)
        need(bool(shares) and all(0 < s <= 0.5 for s in shares), "shares", list(shares), "fractions above 0 to 0.5")
        need(isinstance(steps, int) and steps >= 1, "steps", steps, "a whole number >= 1")
        self.model, self.needed, self.steps = unwrap(model), steps, 0
        self.places: dict[str, Place] = {}
        chosen = {}
        for name, (layer, slot, quantizer) in weight_quantizers(self.model, fixed).items():
            counts = check_layer(name, quantizer, layer.weight_of(slot).shape[quantizer.shape.axis], shares)
            if counts:
                chosen[name] = (layer, slot, quantizer, [0, *counts])
        if not chosen:
            raise BitwrightError(f"channel_bits: all layers are fixed, or too narrow for shares={list(shares)}")
        for name, (layer, slot, quantizer, counts) in chosen.items():
            made = by_channel(quantizer)
            self.places[name] = Place(layer, slot, made, round(made.mean_bits), counts)

    def after_step(self, step: Any) -> None:
        if self.steps == self.needed:
            return
        self.steps += 1
        inputs = step.batch.inputs
        with step.autocast(inputs.device):
            found = torch.cat(measure(self.model, inputs, list(self.places.values())))
        sizes = [len(place.counts) for place in self.places.values()]
        for place, errors in zip(self.places.values(), mean_over_ranks(found).cpu().split(sizes), strict=True):
            place.errors += errors / self.needed
        if self.steps == self.needed:
            for place in self.places.values():
                place.quantizer.set_bits(place.assignment(place.counts[int(place.errors.argmin())]))

    def bits_of(self, place: Place) -> dict[int, int]:
        """{bits: channels that have them} of a layer now."""
        found = place.quantizer.bits.int().tolist()
        return {bits: found.count(bits) for bits in sorted(set(found))}

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        bits = [(self.bits_of(place), place.bits) for place in self.places.values()]
        every = sum(sum(found.values()) for found, _ in bits)
        metrics["channel_bits/moved"] = 1.0 - sum(found.get(own, 0) for found, own in bits) / every

    def summary(self) -> dict[str, Any]:
        return {
            "channels": {n: {str(b): c for b, c in self.bits_of(p).items()} for n, p in self.places.items()},
            "errors": {
                n: {str(c): e for c, e in zip(p.counts, p.errors.tolist(), strict=True)} for n, p in self.places.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "errors": {n: p.errors.clone() for n, p in self.places.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        held = {name: len(errors) for name, errors in state["errors"].items()}
        if held != {name: len(place.counts) for name, place in self.places.items()}:
            raise BitwrightError("channel_bits: the checkpoint was measured for other layers or shares")
        self.steps = int(state["steps"])
        for name, place in self.places.items():
            place.errors = state["errors"][name].clone()


def check_layer(name: str, quantizer: Quantizer, channels: int, shares: Sequence[float]) -> list[int]:
    """How many channels the `shares` of a weight's are, each number above 0 once.

    Raises:
        BitwrightError: its bits cannot be one less and one more, or its channels share a scale.
    """
    counts = sorted({int(share * channels + 1e-9) for share in shares} - {0})  # 0.29 * 100 is 28.999...
    if counts and quantizer.shape.channels != channels:
        raise BitwrightError(
            f"channel_bits: the channels of {name} share one scale, and so one bit-width; use per_channel: true and "
            "another grid than dorefa or sat"
        )
    if counts and not MIN_BITS < quantizer.mean_bits < MAX_BITS:
        raise BitwrightError(
            f"channel_bits: {name} has {quantizer.mean_bits} bits, which cannot be one less and one more; use rules "
            f"with {MIN_BITS + 1} to {MAX_BITS - 1}, or name it in fixed"
        )
    return counts


def weight_quantizers(model: nn.Module, fixed: Sequence[str]) -> dict[str, tuple[QuantLayer, str, Quantizer]]:
    """{name: (layer, slot, quantizer)} of every weight of layers that no pattern of `fixed` names.

    Raises:
        BitwrightError: a pattern names no layer.
    """
    ordered = weight_layers(model)
    ends = {"first": ordered[0], "last": ordered[-1]} if ordered else {}
    for pattern in fixed:
        if not any(matches(pattern, n, m, ends) for n, m in model.named_modules()):
            raise BitwrightError(f"channel_bits: fixed: {pattern!r} names no layer of the model")
    found: dict[str, tuple[QuantLayer, str, Quantizer]] = {}
    for name, layer in quant_layers(model).items():
        if isinstance(layer, QuantEmbedding | QuantConvTranspose) or any(matches(p, name, layer, ends) for p in fixed):
            continue
        for slot, quantizer in layer.quantizers().items():
            if slot in layer.weight_slots:
                found[name if slot == "weight_quantizer" else f"{name}.{slot}"] = (layer, slot, quantizer)
    return found
