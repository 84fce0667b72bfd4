"""From a float model to a quantized one: `prepare`, and what to ask of a prepared model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers import QuantLayer, is_quantized, swap
from bitwright.quantizer import Quantizer
from bitwright.rules import Rule, resolve, slot_field, weight_layers


def prepare(model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
    """Swap layers for quantized ones in place, as `rules` say; returns the same `model`.

    Parameters keep their identity and names, so an optimizer, a checkpoint or tied weights made before stay
    valid; the model must then be calibrated (`calibrate`) or loaded before its first forward pass.

    Args:
        model: any module; nothing of it is run.
        rules: ordered, later wins (`Rule`, or `bitwright.rules("w4a4")`).

    Raises:
        BitwrightError: the model was prepared before, a rule names no layer, no layer is left to quantize, or
            a layer cannot be quantized as asked.
    """
    if any(is_quantized(m) for m in model.modules()):
        raise BitwrightError("the model is prepared already; prepare a fresh float model, or change bits by set_bits")
    wanted = resolve(model, list(rules))
    if not wanted:
        raise BitwrightError(f"rules: nothing to quantize in this {type(model).__name__}")
    first = next(iter(weight_layers(model)), None)
    made: list[tuple[str, QuantLayer, dict[str, Quantizer]]] = []
    for name, fields in wanted.items():
        layer = swap(model.get_submodule(name), name)
        slots: dict[str, Quantizer] = {}
        for slot in (*layer.weight_slots, *layer.input_slots):
            spec = fields.get(slot_field(slot, layer))
            if spec is None:
                continue
            try:
                quantizer = layer.make_quantizer(slot, spec)
            except BitwrightError as error:
                raise BitwrightError(f"{name}: {error}") from None
            if name == first and slot == "input_quantizer" and spec.learn is None:
                quantizer.set_learned(False)
            slots[slot] = quantizer
        made.append((name, layer, slots))
    for name, layer, slots in made:
        for slot, quantizer in slots.items():
            quantizer.name = f"{name}.{slot}" if name else slot
            setattr(
                layer,
                slot,
                quantizer.to(next(layer.parameters()).device) if any_parameter(layer) else quantizer,
            )
    for module in model.modules():
        disable_fast_path(module)
    return model


def any_parameter(layer: nn.Module) -> bool:
    """Whether `layer` has parameters (a residual add has none)."""
    return next(iter(layer.parameters()), None) is not None


def disable_fast_path(module: nn.Module) -> None:
    """Make torch's fused encoder layers call their submodules, which the fused path skips in evaluation."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Every swapped layer by dotted name, in the order of definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by dotted name, in the order of definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights and biases and norms, grid parameters), trainable ones only, for two optimizer groups.

    Grid parameters want no weight decay, and often a rate of their own.
    """
    own = {id(p) for q in quantizers(model).values() for p in q.parameters()}
    everything = [p for p in model.parameters() if p.requires_grad]
    return [p for p in everything if id(p) not in own], [p for p in everything if id(p) in own]


@dataclass(frozen=True)
class QuantizerRow:
    """One line of the table that describes a prepared model."""

    name: str
    layer: str
    grid: str
    estimator: str
    bits: int
    signed: bool
    scales: int
    calibrated: bool
    learned: bool


def describe(model: nn.Module) -> list[QuantizerRow]:
    """One row per quantizer: name, layer class, grid, estimator, bits, signedness, scales, state."""
    rows = []
    for layer in quant_layers(model).values():
        for quantizer in layer.quantizers().values():
            rows.append(
                QuantizerRow(
                    quantizer.name,
                    type(layer).__name__.removeprefix("Quant"),
                    quantizer.spec.grid,
                    quantizer.spec.estimator,
                    int(quantizer.bits.item()),
                    bool(quantizer.signed.item()),
                    quantizer.shape.channels,
                    bool(quantizer.calibrated.item()),
                    any(p.requires_grad for p in quantizer.grid.parameters()),
                )
            )
    return rows


def set_bypass(quantizers: Iterable[Quantizer], bypass: bool) -> None:
    """Let tensors through unchanged (True) or quantize them (False)."""
    for quantizer in quantizers:
        quantizer.bypass = bypass
