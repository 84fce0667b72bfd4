"""What all grids share: the range of codes, the tensor's shape, calibration statistics, the affine form."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitwright.spec import Role


class CodeRange(NamedTuple):
    """The integer codes of one bit-width.

    lo, hi: shape (1,), float: smallest and largest code. Signed: -2^(b-1) and 2^(b-1) - 1; unsigned: 0 and 2^b - 1.
    zero: the code of the value 0 in symmetric grids: 0.0, except 0.5 for signed 1-bit tensors, whose two
        values are -scale/2 and +scale/2 (a two's complement bit would be {-1, 0}), and what a grid itself says.
    signed: whether the tensor takes negative values.
    """

    lo: Tensor
    hi: Tensor
    zero: float
    signed: bool


def code_range(bits: int, signed: bool) -> CodeRange:
    """The codes of `bits` bits (1 to 8)."""
    if signed and bits > 1:
        lo, hi, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.0
    else:
        lo, hi, zero = 0, 2**bits - 1, 0.5 if signed else 0.0
    return CodeRange(torch.tensor([float(lo)]), torch.tensor([float(hi)]), zero, signed)


@dataclass(frozen=True)
class Shape:
    """What a grid needs to know of the tensor that it quantizes.

    role: "weight" or "input". channels: how many scales (1: per tensor). axis: the channel axis.
    numel: elements of a weight; 0 for inputs, whose size is known at run time only.
    linear: whether the weight belongs to a layer without spatial extent.
    """

    role: Role
    channels: int = 1
    axis: int = 0
    numel: int = 0
    linear: bool = False


def as_float(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it has that precision already."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Stats:
    """Statistics of a tensor per scale; every field but `sample` has shape (channels,).

    sample: (channels, n): values drawn from the tensor, for searches.
    """

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    mean_abs: Tensor
    std: Tensor
    sample: Tensor

    @staticmethod
    def of(values: Tensor) -> "Stats":
        """Statistics of `values`, shape (channels, n), n >= 1; all of it is kept as the sample."""
        v = as_float(values.detach())
        std = v.std(dim=1, correction=0)
        return Stats(v.amin(1), v.amax(1), v.mean(1), v.abs().mean(1), std, v)


@dataclass(frozen=True)
class Affine:
    """A grid in numbers: value = (code - zero) * scale, code an integer in [lo, hi].

    scale: (channels,), positive. zero: (1,) or (channels,), float, possibly fractional.
    """

    scale: Tensor
    zero: Tensor
    lo: int
    hi: int


def positive(statistic: Tensor) -> Tensor:
    """A per-channel scale estimate with zeros replaced, so that an all-zero channel divides by something.

    The substitute is the mean of the other channels, or 1 where every channel is zero.
    """
    good = statistic > 0
    substitute = statistic[good].mean() if bool(good.any()) else statistic.new_ones(())
    return torch.where(good, statistic, substitute)


class Grid(nn.Module):
    """Base of all grids; `shape` is the tensor's, as this grid treats it (some have one scale whatever is asked).

    Subclasses implement `forward` (fake quantization of `x`), `affine` (the same function in numbers),
    `initialize` (from statistics) and, where their parameters are tied to a bit-width, `rescale`.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape

    def code_range(self, bits: int, signed: bool) -> CodeRange:
        """The codes of `bits` bits (1 to 8) in this grid."""
        return code_range(bits, signed)

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        """Values of `x` moved to the grid: same shape; gradient as the estimator says."""
        raise NotImplementedError

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        """Scale and zero point now; `x` is the weight (grids of weights may depend on it), None for inputs."""
        raise NotImplementedError

    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        """Set the parameters from statistics; values are written in place."""
        raise NotImplementedError

    @torch.no_grad()
    def rescale(self, old: CodeRange, new: CodeRange) -> None:
        """Follow a change of the bit-width; grids whose clipping bound does not depend on it do nothing."""


def make_affine(scale: Tensor, zero: Tensor | float, codes: CodeRange) -> Affine:
    """An `Affine` with detached copies and integer code bounds."""
    scale = scale.detach().clone().reshape(-1)
    zero_t = zero.detach().clone().reshape(-1) if isinstance(zero, Tensor) else scale.new_full((1,), float(zero))
    return Affine(scale, zero_t, int(codes.lo.item()), int(codes.hi.item()))
