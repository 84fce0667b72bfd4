"""Norms, softmax and GELU that come out the same, to the last bit, wherever they are computed.

Float32 sums depend on their order, and exponentials and error functions on who computes them. Here sums are exact or
taken in float64, whose rounding a float32 does not show; functions are looked up or rounded so coarsely that nobody's
rounding matters; and all else is IEEE operations, one at a time. `bitwright.deploy.elementary` has the same as ONNX
nodes. For evaluation: rounding has no gradient.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# GELU reads its input in steps of 2^-10 from -8 (where it is 0 in float32's eyes) to just below 56: 16 bits.
GELU_STEP, GELU_ZERO, GELU_COUNT = 2.0**-10, 8 * 2**10, 2**16
# Added to a score below 2^11 in size, this rounds it to a multiple of 2^-11.
SCORE_GRID = 1.5 * 2**12
# exp(s) * this, for s a multiple of 2^-11, is never so close to a half that an exponential function which is off by
# 5 * 2^-24 of its value is rounded to another integer. Sums of 3,900 such integers are exact in float32.
EXP_UNITS = 4255.2607421875


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last axis; x: (..., n) float32, weight and bias: (n,)."""
    mean = x.double().mean(-1, True).float()
    centered = x - mean
    variance = (centered * centered).double().mean(-1, True)
    y = centered / (variance + eps).sqrt().float()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def pooled(x: Tensor) -> Tensor:
    """The mean of (N, C, H, W) float32 over rows and columns, (N, C, 1, 1)."""
    return x.double().mean((-2, -1), True).float()


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis, float32; scores count in steps of 2^-11, exponentials in 4,255ths of the largest.

    Scores are at most 2^11 in size (or minus infinity), and at most 3,900 of them in a row.
    """
    x = x + SCORE_GRID
    units = ((x - x.amax(-1, True)).exp() * EXP_UNITS).round()
    return units / units.sum(-1, True)


@functools.cache
def gelu_table(device: torch.device) -> Tensor:
    """GELU of every input that `gelu` tells apart, (GELU_COUNT,) float32."""
    x = (torch.arange(GELU_COUNT, dtype=torch.float64) - GELU_ZERO) * GELU_STEP
    return F.gelu(x).float().to(device)


def gelu(x: Tensor) -> Tensor:
    """GELU, float32; inputs count in steps of 2^-10, from -8 to just below 56."""
    k = (x / GELU_STEP).round().clamp(-GELU_ZERO, GELU_COUNT - 1 - GELU_ZERO).nan_to_num()
    return gelu_table(x.device)[k.int() + GELU_ZERO]


def scaled(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact sums of products of integers as runtimes scale them, float32: sums * (left * right) + bias.

    Args:
        sums: (..., channels), integers in any dtype. left, right: scales of the operands, float32, (1,) or (channels,).
        bias: (channels,) float32, or None.
    """
    y = sums.float() * (left * right)
    return y if bias is None else y + bias
