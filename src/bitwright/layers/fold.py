"""The numbers of a deployed layer: integer weights, scales that absorb BatchNorm, biases on the runtime's grid."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.kernels.reference import along
from bitwright.layers.significant import landed, landed_together
from bitwright.quantizer import Quantizer

# A bias may take this many steps of its grid at most; beyond, int32 accumulators could overflow.
BIAS_LIMIT = 2**31 - 1
# Weights of fewer than 4 bits are held in numbers up to this: the grid of the bias is then no coarser than at 4 bits.
FINE = 8
# The bias of a constant channel takes this many steps, or as many as the largest other one.
CONSTANT = 2**10
# Below this share of the bias a channel's weights vanish in float32 already; such a channel is a constant.
NEGLIGIBLE = 2.0**-26


@dataclass(frozen=True)
class Weight:
    """A quantized weight: value = numbers * scale, numbers = multiple * (step * stored + offset).

    numbers: integers, the weight's shape; int8 where they fit, else int16 (8-bit grids without a code for 0).
    scale: (channels,) or (1,), float32, along axis 0; negative where a negative BatchNorm gain was absorbed.
    bits: width of `stored`, which is what the file holds. step: 2 where the grid has no code for 0, else 1.
    multiple: a power of two, see `finer`.
    """

    numbers: Tensor
    scale: Tensor
    bits: int
    step: int
    offset: int
    multiple: int = 1

    @property
    def stored(self) -> Tensor:
        """Unsigned codes in [0, 2^bits - 1], uint8."""
        return ((self.numbers.int() // self.multiple - self.offset) // self.step).to(torch.uint8)

    def values(self) -> Tensor:
        """The weight in float32, one multiplication per element, as any runtime dequantizes it."""
        return self.numbers.float() * along_first(self.scale, self.numbers.ndim)


def along_first(t: Tensor, ndim: int) -> Tensor:
    """A (channels,) or (1,) vector viewed along axis 0 of `ndim` axes."""
    return t.view(-1, *[1] * (ndim - 1))


@torch.no_grad()
def integer_weight(quantizer: Quantizer, weight: Tensor, name: str) -> Weight:
    """The weight of a layer as integers: the codes of the training form itself.

    Raises:
        BitwrightError: a zero point is neither whole nor half, or the weight is not finite.
    """
    affine = quantizer.affine(weight)
    zero = affine.zero.double()
    if not bool(torch.isfinite(weight).all() and torch.isfinite(affine.scale).all()):
        raise BitwrightError(f"{name}: the weight or its scale holds NaN or infinity")
    if bool((zero * 2 != (zero * 2).round()).any()):
        raise BitwrightError(f"{name}: a weight's zero point must be a whole or half number, not {zero.tolist()[:3]}")
    steps = torch.where(zero == zero.round(), 1.0, 2.0)  # one, or one per channel
    step = int(steps.min())  # a tensor has one: where channels differ, those of half numbers leave out every other
    axis = quantizer.shape.axis
    codes = quantizer.integer_codes(weight)
    numbers = along(steps, codes, axis) * (codes - along(zero, codes, axis))
    small = bool((numbers >= -128).all() and (numbers <= 127).all())
    if zero.numel() == 1:
        lo, hi = affine.lo, affine.hi
        offset, bits = round(step * (lo - float(zero))), (hi - lo).bit_length()
    else:
        offset, most = int((steps * (quantizer.code_lo - zero)).min()), int((steps * (quantizer.code_hi - zero)).max())
        bits = ((most - offset) // step).bit_length()
    return Weight(numbers.to(torch.int8 if small else torch.int16), (affine.scale / steps).float(), bits, step, offset)


@torch.no_grad()
def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift), float64: the BatchNorm `norm` in evaluation is factor * x + shift per channel."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * factor
    if norm.weight is not None:
        gain, bias = norm.weight.double(), norm.bias.double()
        factor, shift = factor * gain, shift * gain + bias
    return factor, shift


@torch.no_grad()
def folded_bias(bias: Tensor | None, norm: nn.Module | None) -> Tensor | None:
    """The layer's bias after folding, (channels,) float64, or None where there is none."""
    if norm is None:
        return None if bias is None else bias.double()
    factor, shift = norm_affine(norm)
    own = torch.zeros_like(shift) if bias is None else bias.double() * factor
    terms = own.abs() + shift.abs() + (norm.running_mean.double() * factor).abs()  # pyright: ignore
    return landed_together(own + shift, terms)


def folded_weight(weight: Weight, norm: nn.Module | None) -> Weight:
    """`weight` with the norm's factor in its scales, which become per channel; exact where they are short numbers.

    A channel whose scale is 0 gets weights of 0 instead, and another channel's scale, where the grid has a 0.
    """
    scale = weight.scale
    if norm is not None:
        scale = (norm_affine(norm)[0] * scale.double()).float()
    zero = scale == 0
    if bool(zero.any()) and scale.numel() > 1 and weight.step == 1:
        numbers = torch.where(along_first(zero, weight.numbers.ndim), 0, weight.numbers).to(weight.numbers.dtype)
        others = scale[~zero].abs()
        weight = replace(weight, numbers=numbers)
        scale = torch.where(zero, others.max() if others.numel() else 1.0, scale)
    return replace(weight, scale=landed(scale))


def finer(weight: Weight) -> Weight:
    """The same values in larger numbers, at most `FINE`, and smaller scales; exact, as the factor is a power of two.

    A bias is rounded to steps of input scale * weight scale. With 2-bit weights and inputs that step is a tenth of
    what leaves the layer, and rounding to it cost 0.5 to 2 points of a small ResNet (`benchmarks/accuracy`). With the
    numbers of a 4-bit weight it is a quarter as coarse; larger ones would leave the range in which Winograd
    convolution is exact.
    """
    largest = max(abs(weight.offset), abs(weight.offset + weight.step * (2**weight.bits - 1)))
    multiple = 1 << max((FINE // largest).bit_length() - 1, 0)
    return replace(weight, numbers=weight.numbers * multiple, scale=weight.scale / multiple, multiple=multiple)


@torch.no_grad()
def magnitudes(numbers: Tensor) -> Tensor:
    """The sum of |n| per output channel, (channels,) int64; of int8's -128 its own type has no absolute value."""
    return numbers.flatten(1).long().abs().sum(1)


def on_bias_grid(weight: Weight, bias: Tensor, input_scale: Tensor, reach: int) -> tuple[Weight, Tensor | None]:
    """A convolution's bias as integers on the grid input_scale * weight.scale, which int32 accumulators add.

    A channel whose weights vanish beside its bias (an all-zero filter, a norm with zero gain) would need a step
    near 0: it becomes a constant, with weights 0 and a step that suits the bias (`constant_steps`). The grid is refined
    first (`finer`).

    Args:
        weight: after folding.
        bias: (channels,) float64, after folding.
        input_scale: (1,).
        reach: largest |integer| that an input can be.

    Returns:
        The weight and the integer bias, (channels,) int64; None where some channel has no such grid, so that the
        bias must be added in floating point.
    """
    coarse, weight = weight, finer(weight)
    scale = weight.scale.double().expand(bias.shape[0]).clone()
    unit = input_scale.double()
    most = magnitudes(weight.numbers).double() * reach
    silent = most * (unit * scale).abs() <= NEGLIGIBLE * bias.abs()
    numbers = weight.numbers
    if bool(silent.any()) and weight.step == 1:
        numbers = torch.where(along_first(silent, numbers.ndim), 0, numbers).to(numbers.dtype)
        most = torch.where(silent, 0.0, most)
        scale = torch.where(silent, constant_steps(bias / unit, scale, silent), scale)
        weight = replace(weight, numbers=numbers, scale=scale.float())
    weight = replace(weight, scale=landed(weight.scale))
    codes = (bias / (unit * weight.scale.double())).round()
    if not bool(((codes.abs() + most) < BIAS_LIMIT).all()):  # NaN (0 / 0) is refused here as well
        return coarse, None
    return weight, codes.to(torch.int64)


def with_bias(weight: Weight, bias: Tensor, input_scale: Tensor, reach: int) -> tuple[Weight, Tensor, Tensor | None]:
    """(weight, bias float64, bias codes) of a convolution whose bias is added to its integer sums; see `on_bias_grid`.

    The bias is the value of its codes; where it has none it stays as it is, to be added in floating point.
    """
    weight, codes = on_bias_grid(weight, bias, input_scale, reach)
    if codes is None:
        return weight, bias, None
    return weight, codes * (input_scale.double() * weight.scale.double()), codes


def constant_steps(bias: Tensor, scale: Tensor, silent: Tensor) -> Tensor:
    """Scales (channels,) for `silent` channels, float64, such that their biases take codes as large as the others'.

    Args:
        bias: (channels,) float64, in units of the input scale. scale: of the other channels, within whose range the
            new ones lie, so that they need no more bits in a file.
    """
    others = scale[~silent].abs()
    codes = (bias[~silent] / others).round().abs()
    wanted = bias.abs() / max(float(codes.max()) if len(codes) else 0.0, CONSTANT)
    wanted = torch.where(bias == 0, 1.0, wanted)
    return wanted.clamp(others.min(), others.max()) if len(others) else wanted
