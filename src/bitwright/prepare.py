"""From a float model to a quantized one: `prepare`, and what to ask of a prepared model."""

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bitwright.errors import BitwrightError
from bitwright.grids import Shape
from bitwright.layers import (
    OUTPUT,
    QuantLayer,
    SharedInput,
    attach_output,
    detach_output,
    float_products,
    has_output,
    is_quantized,
    let_wait,
    quantizer_in,
    swap,
    target_class,
    unswap,
    without_form,
)
from bitwright.quantizer import Quantizer
from bitwright.rules import Rule, resolve, slot_field, weight_layers
from bitwright.spec import QuantizerSpec
from bitwright.wrappers import unwrap

logger = logging.getLogger("bitwright")


@torch.inference_mode(False)  # tensors made in that mode could not be calibrated or trained
def prepare(model: nn.Module, rules: Sequence[Rule]) -> nn.Module:
    """Swap layers for quantized ones in place, as `rules` say; returns the same `model`.

    Parameters keep their identity and names, so an optimizer, a checkpoint or tied weights made before stay
    valid; the model must then be calibrated (`calibrate`) or loaded before its first forward pass.

    Args:
        model: any module; nothing of it is run. Layers with weights that have no quantized form (recurrent
            layers, parametrized ones) stay float, and one line in the log names them.
        rules: ordered, later wins (`Rule`, or `bitwright.rules("w4a4")`).

    Raises:
        BitwrightError: the model was prepared before, a rule names no layer, no layer is left to quantize, or
            a layer cannot be quantized as asked. The model then is as it was.
    """
    if isinstance(rules, str | Rule):
        raise BitwrightError(f"rules: a list of rules is expected, not {rules!r}; bitwright.rules('w4a4') makes one")
    given, model = model, unwrap(model)
    empty = next((n for n, p in model.named_parameters() if is_lazy(p)), None)
    if empty is not None:
        raise BitwrightError(f"{empty} has no shape yet: call the model on an example first, then prepare it")
    if any(is_quantized(m) or has_output(m) for m in model.modules()):
        raise BitwrightError("the model is prepared already; prepare a fresh float model, or change bits by set_bits")
    wanted = resolve(model, list(rules))
    if not wanted:
        raise BitwrightError(f"rules: nothing to quantize in this {type(model).__name__}")
    originals = {module: type(module) for module in model.modules()}
    first = next(iter(weight_layers(model)), None)
    shared: dict[str, str] = {}
    try:
        for name, fields in wanted.items():
            module = model.get_submodule(name)
            output, shares = fields.pop("output", None), fields.pop("shares", None)
            if shares is not None:
                shared[name] = shares
                fields.pop("input", None)
            if fields:
                add_quantizers(swap(module, name), name, fields, is_first=name == first)
            if output is not None:
                attach_output(module, output_quantizer(module, name, output, model))
        for name, source in shared.items():
            share_output(model, name, source)
        for name, module in model.named_modules():
            target = target_class(module)
            if target and any(is_quantized(module.get_submodule(child)) for child in target.reads):
                swap(module, name)
    except BitwrightError:
        for module, original in originals.items():
            detach_output(module)
            if type(module) is not original:
                unswap(module, original)
        raise
    let_wait(model)
    for module in model.modules():
        disable_fast_path(module)
    say_what_stays_float(model)
    return given


def say_what_stays_float(model: nn.Module) -> None:
    """A line in the log for layers with weights that have no quantized form, whatever the rules say, and one for
    attention whose products have none.
    """
    left = without_form(model)
    if left:
        counts, shown = in_words(model, list(left))
        reason = next(iter(left.values()))
        warn_once(f"bitwright: {counts} stay float ({shown}): {reason}; bitwright.coverage lists all")
    products = [name for name in float_products(model) if name not in left]
    if products:
        counts, shown = in_words(model, products)
        warn_once(
            f"bitwright: attention products of {counts} stay float ({shown}): those of nn.MultiheadAttention and of "
            "torchvision's, timm's and transformers' models have a quantized form"
        )


def in_words(model: nn.Module, names: list[str]) -> tuple[str, str]:
    """(how many layers of which class, the first names)."""
    kinds = Counter(type(model.get_submodule(name)).__name__ for name in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return counts, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@functools.cache
def warn_once(line: str) -> None:
    """Log a line; a trainer prepares the same network several times."""
    logger.warning("%s", line)


def output_quantizer(module: nn.Module, name: str, spec: QuantizerSpec, model: nn.Module) -> Quantizer:
    """A quantizer for the output of `module` inside `model`, not yet attached."""
    if spec.per_channel:
        raise BitwrightError(f"{name}: runtimes take one scale per output tensor; use per_channel: false")
    try:
        quantizer = Quantizer(spec, Shape("input"))
    except BitwrightError as error:
        raise BitwrightError(f"{name}: {error}") from None
    like = next(chain(module.parameters(), model.parameters()), None)
    return at_home(quantizer, f"{name}.{OUTPUT}", module.training, like)


def share_output(model: nn.Module, name: str, source: str) -> None:
    """Let the layer `name` read the output quantizer of the module `source`."""
    module = dict(model.named_modules()).get(source)
    quantizer = None if module is None else quantizer_in(module, OUTPUT)
    if quantizer is None:
        raise BitwrightError(f"{name}: shares: {source!r} has no output quantizer; give it one by a rule with `output`")
    swap(model.get_submodule(name), name).input_quantizer = SharedInput(quantizer)  # pyright: ignore


def at_home(quantizer: Quantizer, name: str, training: bool, like: Tensor | None) -> Quantizer:
    """`quantizer` with its name and mode, and the device and precision of `like`."""
    quantizer.name = name
    quantizer.train(training)
    return quantizer if like is None else quantizer.to(like.device, like.dtype)


def add_quantizers(layer: QuantLayer, name: str, fields: dict[str, QuantizerSpec], is_first: bool) -> None:
    """Fill the slots of a swapped layer as `fields` (rule field: spec) say, with its mode, device and precision."""
    like = next(layer.parameters(), None)
    for slot in (*layer.weight_slots, *layer.input_slots):
        spec = fields.get(slot_field(slot, type(layer)))
        if spec is None:
            continue
        try:
            quantizer = layer.make_quantizer(slot, spec)
        except BitwrightError as error:
            raise BitwrightError(f"{name}: {error}") from None
        if is_first and slot == "input_quantizer" and spec.learn is None:
            quantizer.set_learned(False)
        setattr(layer, slot, at_home(quantizer, f"{name}.{slot}" if name else slot, layer.training, like))


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
    """One line of the table that describes a prepared model; bits: the mean where channels have their own."""

    name: str
    layer: str
    grid: str
    estimator: str
    bits: float
    signed: bool
    scales: int
    calibrated: bool
    learned: bool
    most_bits: int


def describe(model: nn.Module) -> list[QuantizerRow]:
    """One row per quantizer: name, class of its module, grid, estimator, bits, signedness, scales, state."""
    rows = []
    for name, quantizer in quantizers(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        rows.append(
            QuantizerRow(
                quantizer.name,
                type(layer).__name__.removeprefix("Quant"),
                quantizer.spec.grid,
                quantizer.spec.estimator,
                quantizer.mean_bits,
                bool(quantizer.signed.item()),
                quantizer.shape.channels,
                bool(quantizer.calibrated.item()),
                any(p.requires_grad for p in quantizer.grid.parameters()),
                quantizer.most_bits,
            )
        )
    return rows


def set_bypass(quantizers: Iterable[Quantizer], bypass: bool) -> None:
    """Let tensors through unchanged (True) or quantize them (False)."""
    for quantizer in quantizers:
        quantizer.bypass = bypass
