"""LSQ: learned step size quantization (Esser et al., ICLR 2020)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids.base import (
    Affine,
    CodeRange,
    Grid,
    Shape,
    Stats,
    make_affine,
    positive,
)
from bitwright.kernels import EPS, fake_quantize


def lsq_initial_scale(mean_abs: Tensor, codes: CodeRange) -> Tensor:
    """2 mean|v| / sqrt(Qp) (section 2.1 of the paper)."""
    return positive(2.0 * mean_abs / codes.hi.sqrt().to(mean_abs))


def mse_scale(sample: Tensor, codes: CodeRange, candidates: int = 80) -> Tensor:
    """The scale per channel, among `candidates` fractions of the full range, with the least squared error.

    Args:
        sample: (channels, n).
        codes: bit-width and signedness.
    """
    lo, hi = codes.lo.to(sample), codes.hi.to(sample)
    reach = torch.maximum(-codes.lo, codes.hi).to(sample) if codes.zero == 0.0 else hi - codes.zero
    full = positive(sample.abs().amax(1)) / reach
    best, best_error = full.clone(), torch.full_like(full, torch.inf)
    for i in range(1, candidates + 1):
        scale = full * (i / candidates) * 1.2
        k = (sample / scale[:, None] + codes.zero).round().clamp(lo, hi)
        error = ((k - codes.zero) * scale[:, None] - sample).square().mean(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def shared_by(x: Tensor, shape: Shape) -> int:
    """N of the gradient's factor 1 / sqrt(N Qp) (section 2.2): elements that share a scale, per sample for inputs.

    The paper counts the features of one sample; some public code counts the whole batch.
    """
    n = shape.numel if shape.role == "weight" else math.prod(x.shape[1:])
    return max(n // shape.channels, 1)


def normal_step(codes: CodeRange) -> Tensor:
    """The step of least squared error for normally distributed values, up to a factor that all bits share.

    (b + 4) / 2^b: within 3 % of Max, "Quantizing for minimum distortion" (1960), table II, at 1 to 8 bits.
    """
    count = codes.hi - codes.lo + 1
    return (count.log2() + 4) / count


class LSQ(Grid):
    """value = scale * round(clip(x / scale, -Qn, Qp)), the scale learned with the gradient 1/sqrt(N Qp)-scaled.

    Args:
        init: "lsq" (2 mean|x| / sqrt(Qp), the paper) or "mse" (least squared error over calibration values).

    Where the bits change, inputs keep their upper clipping bound and weights' scales follow the best step for normally
    distributed values: few bits with a clipping bound made for many round nearly every weight to 0. Measured on a
    ResNet-20 at W4A3, without further training: all inner weights at 2 bits raise the loss from 0.47 by 0.31 so, and by
    1.36 with the bound kept (`python benchmarks/accuracy/bit_sensitivity.py RUN --data-dir DIR`, CSV kept).
    """

    def __init__(self, shape: Shape, init: Literal["lsq", "mse"] = "lsq"):
        super().__init__(shape)
        if init not in ("lsq", "mse"):
            raise BitwrightError(f"grid_options.init of 'lsq': {init!r} is not accepted; use 'lsq' or 'mse'")
        self.init = init
        self.scale = nn.Parameter(torch.ones(shape.channels))

    def effective_scale(self) -> Tensor:
        """The positive scale, shape (channels,)."""
        return self.scale.abs() + EPS

    def forward(self, x: Tensor, codes: CodeRange, estimator: nn.Module) -> Tensor:
        count = shared_by(x, self.shape)
        return fake_quantize(x, self.scale, codes.zero, codes.lo, codes.hi, estimator, self.shape.axis, count)

    def affine(self, x: Tensor | None, codes: CodeRange) -> Affine:
        return make_affine(self.effective_scale(), codes.zero, codes)

    @torch.no_grad()
    def initialize(self, stats: Stats, codes: CodeRange) -> None:
        if self.init == "mse":
            self.scale.copy_(mse_scale(stats.sample, codes))
        else:
            self.scale.copy_(lsq_initial_scale(stats.mean_abs, codes))

    @torch.no_grad()
    def rescale(self, old: CodeRange, new: CodeRange) -> None:
        if self.shape.role == "weight":
            self.scale.mul_(normal_step(new) / normal_step(old))
        else:  # the upper clipping bound stays: s_new * Qp_new = s_old * Qp_old
            self.scale.mul_((old.hi - old.zero) / (new.hi - new.zero))
