"""The exact sums of a layer, noted on its output: a BatchNorm that reads it scales the sums themselves, once.

A deployed network has no such norm: it is folded into the scales and the bias of the layer in front. An evaluation
that scaled the sums, rounded, and then normalised what was rounded would differ from it in the last bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.kernels.reproducible import scaled
from bitwright.layers.fold import Weight, folded_bias, folded_weight, magnitudes, with_bias
from bitwright.layers.whole import EXACT, evaluates, product, whole_input, whole_weight
from bitwright.quantizer import Quantizer


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of products of integers, (N, channels, ...) or (..., channels).

    weight: before any norm. bias: of the layer, or None. input_scale: (1,), reach: the largest |integer| of the input.
    trailing: axes behind the channels. axes: of an output that a norm along the channels reads. whole_bias: the bias
    is rounded to the grid of the sums and added to them, as integer kernels do with a convolution's.
    """

    numbers: Tensor
    weight: Weight
    bias: Tensor | None
    input_scale: Tensor
    reach: int
    trailing: int
    axes: int
    whole_bias: bool

    @torch.no_grad()
    def finished(self, norm: nn.Module | None = None) -> Tensor:
        """The layer's output, float32, or that of the BatchNorm `norm` behind it, as the deployed network has it."""
        weight, bias, codes = folded_weight(self.weight, norm), folded_bias(self.bias, norm), None
        if bias is not None and self.whole_bias:
            weight, bias, codes = with_bias(weight, bias, self.input_scale, self.reach)
        most = magnitudes(weight.numbers)
        largest = most * self.reach + (0 if codes is None else codes.abs())
        # In float32 where it holds every sum: an evaluation is mostly passes over these.
        dtype = torch.float32 if int(largest.max()) < EXACT else torch.float64
        # Folding takes a channel's weights away where its scale is 0 or vanishes beside the bias.
        sums = self.numbers.to(dtype) * self.view(weight.multiple * (most != 0)).to(dtype)
        if codes is not None:
            return scaled(sums.add_(self.view(codes).to(dtype)), self.input_scale, self.view(weight.scale))
        float_bias = None if bias is None else self.view(bias.float())
        return scaled(sums, self.input_scale, self.view(weight.scale), float_bias)

    def view(self, t: Tensor) -> Tensor:
        """Numbers per channel, (channels,) or (1,), so that they meet the sums."""
        return t.view(-1, *[1] * self.trailing)

    def noted(self) -> Tensor:
        """The layer's output, which `normed` knows again."""
        y: Any = self.finished()
        y.bitwright_sums = self, None if y.is_inference() else y._version
        return y


def linear_sums(
    x: Tensor, quantizer: nn.Module | None, weight: Tensor, weight_quantizer: Quantizer | None, bias: Tensor | None
) -> Sums | None:
    """Of a linear layer of quantized `x`, (..., in), and float `weight`, (out, in); None if it is not on integers."""
    left, right = whole_input(quantizer, x), whole_weight(weight_quantizer, weight)
    if left is None or right is None:
        return None
    sums = product(left.numbers, right.numbers.float())
    return Sums(sums, right, bias, left.scale, left.reach, 0, 2, False)


def normed(norm: Any, x: Tensor) -> Tensor | None:
    """What the BatchNorm `norm` makes of `x` on the sums behind it; None unless `x` is the output of a layer on sums.

    A tensor that somebody wrote to is none any more. Those of `torch.inference_mode` do not say so and are compared.
    """
    if torch.compiler.is_compiling():
        return None
    sums, version = getattr(x, "bitwright_sums", (None, None))
    if sums is None or norm.training or norm.running_mean is None or x.ndim != sums.axes:
        return None
    if not evaluates(x, norm.weight, norm.bias):
        return None
    same = torch.equal(x, sums.finished()) if version is None else version == x._version
    return sums.finished(norm) if same else None
