"""`snap_biases`: scales and biases of the training form where the deployed network has them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import device_of, example_of
from bitwright.deploy.capture import Captured, captured, norm_readers
from bitwright.deploy.freeze import Plan, check_ready, input_codes, layer_plans, weight_and_bias
from bitwright.deploy.integer import InputCodes
from bitwright.deploy.margins import exact_scales
from bitwright.deploy.thresholds import Boundaries, has_lattice, only_step
from bitwright.deploy.ties import part_ties
from bitwright.grids.lsq import LSQ
from bitwright.layers import QuantConv, QuantEmbedding, QuantProduct
from bitwright.layers.fold import Weight, folded_bias, norm_affine
from bitwright.layers.significant import (
    MOST,
    MOST_TOGETHER,
    bias_bits,
    on_steps,
    rounded,
    rounded_together,
    significant_bits,
)
from bitwright.prepare import quant_layers, quantizers
from bitwright.wrappers import unwrap


@torch.no_grad()
def snap_biases(model: nn.Module, example: Any) -> int:
    """Move biases and scales of the training form to where the deployed network has them, in place.

    Integer runtimes add a convolution's bias as int32 at the step input scale * weight scale. Rounding it only in
    the file flips about 1 % of a 2-bit network's codes; rounding it here first makes the accuracy measured
    afterwards that of the shipped network. Scales per channel, float biases and layer norms become numbers of few
    significant bits, which a file holds in few bits (`bitwright.layers.significant`). Scales of quantizers behind one
    another (residual sums) move by a fraction of a percent, so that no value between them lies on a tie
    (`bitwright.deploy.ties`). Call it once, before the last evaluation.

    Args:
        model: prepared and calibrated. Scales move by half a percent at 2 bits and less above, three percent at 1 bit;
            the bias of a BatchNorm (its running mean where it has none) or of the layer itself by at most half a step.
            Where 1-bit quantizers alone read a convolution or linear layer with a BatchNorm, its channels come to share
            one scale: gains and biases move as far as that takes, and codes stay (`bitwright.deploy.thresholds`).
            Gradients do not, so train no further afterwards.
        example: one input batch, as `calibrate` takes them, used to capture the graph.

    Returns:
        How many layers' biases are on the grid of an accumulator.

    Raises:
        BitwrightError: as `freeze`.
    """
    model = unwrap(model)
    check_ready(model)
    graph = captured(model, example_of(example, "snap_biases").mapped(lambda t: t.to(device_of(model))))
    part_ties(model, graph)
    plans = layer_plans(model, graph)
    count = 0
    for name, layer in quant_layers(model).items():
        if isinstance(layer, QuantConv | QuantProduct | QuantEmbedding) and layer.weight_quantizer is not None:
            codes = input_codes(layer, "input_quantizer", name)
            surrounded = Surrounded(layer, name, plans.get(name, Plan(None)), codes)
            surrounded.shorten_scales()
            count += surrounded.shorten_bias()
    shorten_norms(model, graph)
    shorten_tables(model)
    return count


def shorten_norms(model: nn.Module, graph: Captured) -> None:
    """Give layer norms short gains and shifts: as fine as the quantizers behind them read, or `MOST_TOGETHER` bits."""
    modules, found = dict(model.named_modules()), norm_readers(graph)
    for name, norm in modules.items():
        if not isinstance(norm, nn.LayerNorm):
            continue
        parts = [quantizer.rpartition(".") for quantizer in found.get(name, ())]
        codes = [input_codes(modules[layer], slot, layer) for layer, _, slot in parts]
        known = [c for c in codes if c is not None and c.per_tensor]
        bits = significant_bits(max(c.bits for c in known)) if known else MOST_TOGETHER
        if norm.weight is not None:
            norm.weight.copy_(rounded_together(norm.weight, bits))
        if norm.bias is not None:
            step = min((float(c.scale) for c in known), default=None)
            norm.bias.copy_(rounded_together(norm.bias, bits) if step is None else on_steps(norm.bias, step))


def shorten_tables(model: nn.Module) -> None:
    """Give tables that no layer owns, (1, n, features): positions and class tokens, numbers of few bits.

    As many as a scale in front of the finest input has.
    """
    bits = max((int(q.bits) for q in quantizers(model).values() if q.shape.role == "input"), default=MOST)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and len(parameter) == 1 and any(module.children()):
                parameter.copy_(rounded_together(parameter, significant_bits(bits)))


@dataclass(frozen=True)
class Surrounded:
    """A layer with quantized weights in the training form, and what is around it."""

    layer: Any
    name: str
    plan: Plan
    codes: InputCodes | None

    @property
    def bits(self) -> int:
        """Of the finest quantizer behind the layer; the layer's own where what leaves it stays float."""
        own = [self.layer.weight_quantizer.most_bits] + ([self.codes.bits] if self.codes else [])
        return max((reader.bits for reader in self.plan.readers), default=max(own))

    def learned_scale(self) -> nn.Parameter | None:
        """What scales the layer's output per channel and can be set: the norm's gain, or the weight's own scale."""
        if self.plan.norm is not None:
            return self.plan.norm.weight  # pyright: ignore
        grid = self.layer.weight_quantizer.grid
        if not isinstance(grid, LSQ) or grid.scale.numel() == 1:
            return None
        # In groups of a transposed convolution, one scale serves several channels, which want several.
        return grid.scale if grid.scale.numel() == self.layer.output_scales(grid.scale).numel() else None

    def shorten_scales(self) -> None:
        """Give all channels short scales, under which float32 rounds all sums rightly."""
        learned = self.learned_scale()
        weight, _, bias_codes = weight_and_bias(self.layer, self.name, self.plan, self.codes)
        if learned is None or isinstance(weight, Tensor):
            return
        before = learned.detach().double()
        # A channel that is constant has a scale of its own (`on_bias_grid`), which the gain does not move.
        live = (weight.numbers.flatten(1) != 0).any(1) & (before != 0) & (weight.scale != 0)
        unit = torch.where(live, weight.scale.double() / torch.where(live, before, 1.0), 1.0)
        step = only_step(self.plan)
        if step is not None and self.codes is not None and has_lattice(self.codes) and bool(live.any()):
            self.share_scale(weight, step, live, unit)
            return
        readers, input_scale = [], torch.ones(1, device=before.device)
        if bias_codes is not None and self.codes is not None:
            input_scale = self.codes.scale
            found = [c for c in self.plan.readers if c.per_tensor]
            readers = [(float(c.scale), c.lo - int(c.zero), c.hi - int(c.zero)) for c in found]
        wanted = exact_scales(torch.where(live, before * unit, 1.0), significant_bits(self.bits), input_scale, readers)
        learned.copy_(torch.where(live, wanted / unit, before))

    def share_scale(self, weight: Weight, step: float, live: Tensor, unit: Tensor) -> None:
        """Give all `live` channels one scale, and biases under which no code changes; unit: a scale of a gain of 1."""
        own, norm = getattr(self.layer, "bias", None), self.plan.norm
        before = folded_bias(own, norm)
        scales, biases = Boundaries(weight, before, self.codes, step).moved(live)  # pyright: ignore
        norm.weight.copy_(torch.where(live, scales / unit, norm.weight.double()))  # pyright: ignore
        move_bias(self.layer, norm, torch.where(live, biases - folded_bias(own, norm), 0.0))  # pyright: ignore

    def shorten_bias(self) -> int:
        """Put the bias on the accumulator's grid, 1; where it is added in floating point, on one of its own, 0."""
        norm = self.plan.norm
        before = folded_bias(getattr(self.layer, "bias", None), norm)
        weight, _, bias_codes = weight_and_bias(self.layer, self.name, self.plan, self.codes)
        if before is None or isinstance(weight, Tensor):
            return 0
        if bias_codes is None or self.codes is None:
            steps = [float(c.scale.min()) for c in self.plan.readers]
            # What leaves a linear layer is scaled, summed or normalised before it is quantized; a bias is no finer.
            bits = significant_bits(self.bits) if isinstance(self.layer, QuantProduct) else bias_bits(self.bits)
            target = on_steps(before, min(steps)) if steps else rounded_together(before, bits)
        else:
            constant = (weight.numbers.flatten(1) == 0).all(1)
            scale = torch.where(constant, rounded(weight.scale, significant_bits(self.bits)), weight.scale.double())
            target = bias_codes * self.codes.scale.double() * scale
        move_bias(self.layer, norm, target - before)
        return int(bias_codes is not None)


def move_bias(layer: nn.Module, norm: nn.Module | None, delta: Tensor) -> None:
    """Add `delta` (channels,) to the folded bias of a layer."""
    if norm is None:
        layer.bias.add_(delta)  # pyright: ignore
    elif norm.bias is not None:
        norm.bias.add_(delta)  # pyright: ignore
    else:
        norm.running_mean.sub_(delta / norm_affine(norm)[0])  # pyright: ignore
