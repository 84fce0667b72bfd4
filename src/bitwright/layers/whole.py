"""Products of quantized tensors on their integers, as deployed networks compute them: exact sums, scaled once."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.kernels import reproducible
from bitwright.kernels.fused import wants_gradient
from bitwright.layers.output import SharedInput
from bitwright.quantizer import Quantizer

EXACT = 2**24  # float32 holds every integer below


@dataclass(frozen=True)
class Whole:
    """A quantized tensor: numbers * scale. numbers: integers, float32. scale: (channels,) along axis 0, or (1,)."""

    numbers: Tensor
    scale: Tensor


def evaluates(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a layer in evaluation may compute on `x` what has no gradient: eager, in float32, with none wanted."""
    return x.dtype == torch.float32 and not torch.compiler.is_compiling() and not wants_gradient(x, *parameters)


def whole_input(quantizer: nn.Module | None, values: Tensor) -> Whole | None:
    """The integers behind `values`, which `quantizer` gave; None where they are no 8-bit integers times one scale."""
    source = quantizer.source if isinstance(quantizer, SharedInput) else quantizer
    if not isinstance(source, Quantizer) or source.bypass:
        return None
    affine = source.affine()
    inside = (affine.zero == affine.zero.round()) & (affine.zero >= affine.lo) & (affine.zero <= affine.hi)
    if affine.scale.numel() > 1 or affine.zero.numel() > 1 or not bool(inside):
        return None
    return Whole((values / affine.scale).round(), affine.scale)


def whole_weight(quantizer: Quantizer | None, weight: Tensor) -> Whole | None:
    """The integers of a weight, as `bitwright.deploy.fold.integer_weight` has them; None where int8 has not."""
    if quantizer is None or quantizer.bypass:
        return None
    affine = quantizer.affine(weight)
    step = 1 if bool((affine.zero == affine.zero.round()).all()) else 2
    numbers = step * (quantizer.integer_codes(weight) - affine.zero)
    small = bool((numbers >= -128).all() and (numbers <= 127).all())
    return Whole(numbers, affine.scale / step) if small and affine.zero.numel() == 1 else None


def whole_linear(
    x: Tensor, quantizer: nn.Module | None, weight: Tensor, weight_quantizer: Quantizer | None, bias: Tensor | None
) -> Tensor | None:
    """A linear layer of quantized `x`, (..., in), and float `weight`, (out, in); None where it is not on integers."""
    left, right = whole_input(quantizer, x), whole_weight(weight_quantizer, weight)
    if left is None or right is None:
        return None
    return reproducible.scaled(product(left.numbers, right.numbers), left.scale, right.scale, bias)


def exact_in_float(a: Tensor, b: Tensor) -> bool:
    """Whether float32 holds all partial sums of a product of integers; b: (..., k, n), n being summed over."""
    fits = float(a.abs().amax()) * float(b.abs().sum(-1).amax()) < EXACT
    return fits and torch.get_float32_matmul_precision() == "highest"


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
