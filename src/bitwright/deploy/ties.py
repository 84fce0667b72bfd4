"""Scales under which no value that is quantized again can lie on a tie.

A residual sum adds numbers of two grids, a * s_a + b * s_b, and is rounded to a third of step s. Where the trained
scales stand in any ratio, some a and b put the sum so close to the middle between two codes that float32 decides by
its own rounding, and PyTorch, a runtime with fused sums and one without come to different codes. With s_a = s * j / p,
s_b = s * i / p and p odd the sum is (a j + b i) / p codes, which is never a half and at least 1 / (2 p) away from one:
farther than float32 can be off (`odd_parts`). The same goes for a single value between two grids.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from bitwright.deploy.capture import Captured, Requantized, requantized
from bitwright.grids import HardLSQ
from bitwright.grids.lsq import LSQ
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer

# A scale that is fewer parts of its reader's than this is left as it is: it would move by more than 1 %.
FEWEST = 50


def scale_of(quantizer: Quantizer) -> float:
    """The one scale of a quantizer."""
    return float(quantizer.affine().scale)


def movable(quantizer: Quantizer) -> bool:
    """Whether the quantizer has one scale, which is a parameter that may be any number, and a code for 0."""
    return isinstance(quantizer.grid, LSQ) and not isinstance(quantizer.grid, HardLSQ) and uniform(quantizer)


def uniform(quantizer: Quantizer) -> bool:
    """Whether the quantizer has one scale and a code for 0."""
    affine = quantizer.affine()
    return affine.scale.numel() == 1 and bool((affine.zero == affine.zero.round()).all())


def largest_code(quantizer: Quantizer) -> int:
    """The greatest distance of a code from the code of 0."""
    affine = quantizer.affine()
    zero = int(affine.zero)
    return max(affine.hi - zero, zero - affine.lo)


def container_zero(quantizer: Quantizer) -> int:
    """What a file adds to codes (`bitwright.deploy.builder.container_zero`)."""
    return 128 if quantizer.affine().lo < 0 else 0


def odd_parts(
    ratios: Sequence[float], largest: Sequence[int], top: int, zeros: Sequence[int] = (0, 0), zero: int = 0
) -> int:
    """p of j / p: the largest 2^k - 1 that keeps sums farther from ties than float32 can be off.

    Two products, a sum, a division and the scales themselves are each rounded by 2^-24 at most, so that the sum is off
    by (2 * reach + 3 * top) * 2^-24 codes at most, where that matters: reach is the sum of the largest operands.
    onnxruntime's QLinearAdd computes on what the file holds, codes plus zero points, and takes their share of the sum
    away by a constant: (a + z_a) r_a + ((b + z_b) r_b + (zero - z_a r_a - z_b r_b)). Beside the zero point 128 of a
    signed reader float32 is coarse. Each of these is rounded by 2^-24 of its size.

    Args:
        ratios: scale of each source / scale of the reader. largest: of each source, see `largest_code`. top: of the
            reader; sums beyond it are clipped. zeros, zero: of the sources and of the reader, in the file.
    """
    reach = sum(r * k for r, k in zip(ratios, largest, strict=True))
    off = 2 * reach + 3 * (top + 1)
    if len(ratios) == 2 and (zero or any(zeros)):
        shift = sum(r * z for r, z in zip(ratios, zeros, strict=True))
        constant, held = shift + (zero + shift), reach + shift
        off = max(off, reach + held + constant + (zero + shift + held) + (zero + top + 1))
    limit = 2.0**23 / off
    # Ratios that were moved before stay, though their parts may now be counted finer: one of these is what was used.
    finer, coarser = (2 ** math.floor(math.log2(limit * slack)) - 1 for slack in (1.01, 0.99))
    used = [p for p in (coarser, finer) if all(whole(r * p) for r in ratios)]
    return used[0] if used else coarser


def whole(parts: float) -> bool:
    """Whether this is an integer, up to the rounding of two scales in float32."""
    return abs(parts - round(parts)) <= parts * 2.0**-23


def parts_of(reading: Requantized, all_of: dict[str, Quantizer]) -> tuple[int, list[int]]:
    """(p, j of each source): the nearest j / p to the ratios of its scales to the reader's."""
    reader, sources = all_of[reading.reader], [all_of[name] for name in reading.sources]
    ratios = [scale_of(source) / scale_of(reader) for source in sources]
    zeros, zero = [container_zero(source) for source in sources], container_zero(reader)
    parts = odd_parts(ratios, [largest_code(source) for source in sources], largest_code(reader), zeros, zero)
    return parts, [round(ratio * parts) for ratio in ratios]


@torch.no_grad()
def part_ties(model: nn.Module, graph: Captured) -> int:
    """Move the scales of quantizers that stand behind one another into such ratios, in place; how many were moved.

    Sources of sums follow the sum's reader, from the network's end to its beginning; a lone reader follows its source.
    A scale moves once: where a tensor goes into two sums of different scales, the later one decides.
    """
    all_of = quantizers(model)
    found = [r for r in requantized(graph) if all(uniform(all_of[name]) for name in (r.reader, *r.sources))]
    settled: set[str] = set()
    moved = 0

    def move(name: str, scale: float) -> int:
        settled.add(name)
        grid = all_of[name].grid
        assert isinstance(grid, LSQ)
        before = grid.scale.clone()
        grid.scale.fill_(scale)
        return int(not torch.equal(before, grid.scale))

    for reading in reversed(found):
        if len(reading.sources) != 2:
            continue
        unit = scale_of(all_of[reading.reader])
        whole_parts, shares = parts_of(reading, all_of)
        for source, share in zip(reading.sources, shares, strict=True):
            if share >= FEWEST and source not in settled and movable(all_of[source]):
                settled.add(reading.reader)
                moved += move(source, unit * share / whole_parts)
    for reading in found:
        reader, source = reading.reader, next(iter(reading.sources))
        if len(reading.sources) > 1 or reader == source:
            continue
        whole_parts, (share,) = parts_of(reading, all_of)
        if share < FEWEST:
            continue
        if reader not in settled and movable(all_of[reader]):
            settled.add(source)
            moved += move(reader, scale_of(all_of[source]) * whole_parts / share)
        elif source not in settled and movable(all_of[source]):
            moved += move(source, scale_of(all_of[reader]) * share / whole_parts)
    return moved
