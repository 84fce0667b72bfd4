"""Products of quantized tensors on their integers, as deployed networks compute them: exact sums, scaled once."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.kernels import reproducible
from bitwright.kernels.fused import wants_gradient
from bitwright.layers.fold import Weight, integer_weight
from bitwright.layers.output import SharedInput
from bitwright.quantizer import Quantizer

EXACT = 2**24  # float32 holds every integer below


@dataclass(frozen=True)
class Whole:
    """A quantized tensor: numbers * scale. numbers: integers, float32. scale: (channels,) along axis 0, or (1,).

    reach: the largest |number| that the codes allow.
    """

    numbers: Tensor
    scale: Tensor
    reach: int


def evaluates(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a layer in evaluation may compute on `x` what has no gradient: eager, in float32, with none wanted."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled(x.device.type) and not wants_gradient(x, *parameters)


def whole_input(quantizer: nn.Module | None, values: Tensor) -> Whole | None:
    """The integers behind `values`, which `quantizer` gave; None where they are no 8-bit integers times one scale."""
    source = quantizer.source if isinstance(quantizer, SharedInput) else quantizer
    if not isinstance(source, Quantizer) or source.bypass:
        return None
    affine = source.affine()
    inside = (affine.zero == affine.zero.round()) & (affine.zero >= affine.lo) & (affine.zero <= affine.hi)
    if affine.scale.numel() > 1 or affine.zero.numel() > 1 or not bool(inside):
        return None
    zero = int(affine.zero)
    return Whole((values / affine.scale).round(), affine.scale, max(zero - affine.lo, affine.hi - zero))


def whole_weight(quantizer: Quantizer | None, weight: Tensor) -> Weight | None:
    """The weight as deployment has it; None where int8 has not."""
    if quantizer is None or quantizer.bypass:
        return None
    affine = quantizer.affine(weight)
    zero, finite = affine.zero.double() * 2, weight.isfinite().all() & affine.scale.isfinite().all()
    if not bool(finite & (zero == zero.round()).all()):
        return None
    found = integer_weight(quantizer, weight, quantizer.name)
    return found if found.numbers.dtype == torch.int8 else None


def exact_in_float(a: Tensor, b: Tensor) -> bool:
    """Whether float32 holds all partial sums of a product of integers; b: (..., k, n), n being summed over."""
    fits = float(a.abs().amax()) * float(b.abs().sum(-1).amax()) < EXACT
    # Elsewhere than on a CPU, convolutions may go through transforms that are inexact on integers.
    return fits and a.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of integers, (..., m, n) and (..., k, n), exact, in float32 or float64."""
    if not exact_in_float(a, b):
        a, b = a.double(), b.double()
    return a @ b.transpose(-2, -1)


def whole_product(a: Tensor, left: nn.Module | None, b: Tensor, right: nn.Module | None) -> Tensor | None:
    """a @ b^T of tensors that `left` and `right` quantized; None where it is not on integers."""
    x, y = whole_input(left, a), whole_input(right, b)
    if x is None or y is None:
        return None
    return reproducible.scaled(product(x.numbers, y.numbers), x.scale, y.scale)
