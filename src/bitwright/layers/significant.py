"""Scales and biases of few significant bits, which a file holds in few bits.

A quantizer of b bits behind a layer has at most 2^b codes. A scale of b + 6 significant bits is at most 2^-(b + 6) off,
which moves the largest code by 1/64 of a step. Scales and biases of the training form are moved to such numbers before
the last evaluation (`snap_biases`), so that what is evaluated is what is stored.
"""

import math

import torch
from torch import Tensor

EXTRA, MOST = 6, 14
# In front of a quantizer of 1 bit: the one boundary between its codes lies half a code from 0 at most, and 5 bits move
# it by no more than 1/64 of a step too.
ONE_BIT = 5
# The same for biases, which share one power of two in a layer, so that small ones have fewer.
EXTRA_BIAS, MOST_TOGETHER = 8, 16
# A product of two float32 numbers that should be a short number is at most this far from it, relatively.
ULPS = 2.0**-22


def significant_bits(bits: int) -> int:
    """Significant bits of a scale in front of a quantizer of `bits` bits."""
    return min(bits + EXTRA, MOST) if bits > 1 else ONE_BIT


def bias_bits(bits: int) -> int:
    """Bits of the largest bias that is added in floating point, in front of a quantizer of `bits` bits."""
    return min(bits + EXTRA_BIAS, MOST_TOGETHER)


def rounded(x: Tensor, bits: int) -> Tensor:
    """The nearest numbers of `bits` significant bits, the shape of `x`, float64 (Veltkamp's splitting)."""
    wide = x.double() * (2.0 ** (53 - bits) + 1)
    return wide - (wide - x.double())


def neighbours(x: Tensor, bits: int, farthest: int) -> Tensor:
    """Numbers of `bits` significant bits around `x` (n,), none of it 0: (2 * farthest + 1, n), nearest first."""
    k = torch.arange(2 * farthest + 1, device=x.device)
    steps = torch.where(k % 2 == 0, -(k // 2), (k + 1) // 2).double()
    mantissa, _ = torch.frexp(x.double())
    one = (x.double() / mantissa).abs() * 2.0**-bits
    return rounded(rounded(x, bits) + steps[:, None] * one, bits)


def landed(scale: Tensor) -> Tensor:
    """`scale` (channels,), float32; exact where all of it was moved to short numbers and is off by rounding alone."""
    if scale.numel() == 1:
        return scale
    short = rounded(scale, MOST).float()
    near = (short - scale).abs() <= ULPS * scale.abs()
    return short if bool(near.all()) else scale


def rounded_together(x: Tensor, bits: int) -> Tensor:
    """The nearest multiples of one power of two, float64: the largest number has at most `bits` significant bits."""
    largest = x.double().abs().max()
    if not float(largest):
        return x.double()
    unit = largest / torch.frexp(largest)[0] * 2.0**-bits
    return (x.double() / unit).round() * unit


def on_steps(x: Tensor, step: float) -> Tensor:
    """The nearest multiples of a power of two, at most 1/64 of `step` off, float64."""
    unit = 2.0 ** (math.frexp(step)[1] - EXTRA)
    return (x.double() / unit).round() * unit


def landed_together(x: Tensor, terms: Tensor) -> Tensor:
    """`x` (channels,), float64, a sum of float32 numbers of size `terms`; exact where it was `rounded_together`."""
    short = rounded_together(x, MOST_TOGETHER)
    near = (short - x).abs() <= ULPS * terms
    return short if bool(near.all()) else x
