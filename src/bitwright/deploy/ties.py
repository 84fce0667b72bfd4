"""Scales under which no value that is quantized again can lie on a tie.

A residual sum adds numbers of two grids, a * s_a + b * s_b, and is rounded to a third of step s. Where the trained
scales stand in any ratio, some a and b put the sum so close to the middle between two codes that float32 decides by
its own rounding, and PyTorch, a runtime with fused sums and one without come to different codes. With s_a = s * j /
`PARTS`, s_b = s * i / `PARTS` and `PARTS` odd the sum is (a j + b i) / PARTS codes, which is never a half and at least
1 / (2 PARTS) away from one: farther than float32 can be off. The same goes for a single value between two grids.
"""

import torch
from torch import nn

from bitwright.deploy.capture import Captured, requantized
from bitwright.grids.lsq import LSQ
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer

# Odd. It keeps values 2.4e-4 of a step away from ties. In float32 two products, a sum and a division are off by
# 4 * 2^-24 * 512 = 1.2e-4 at most where no operand is more than 256 codes of up to 2 steps. A ratio of 1 / 4, a usual
# one, moves by 0.1 % at most.
PARTS = 2047
# A source whose ratio is beyond these is left as it is: below, the parts are too coarse; above, float32 is.
SMALLEST, LARGEST = 50, 2 * PARTS


def scale_of(quantizer: Quantizer) -> float:
    """The one scale of a quantizer."""
    return float(quantizer.affine().scale)


def movable(quantizer: Quantizer) -> bool:
    """Whether the quantizer has one scale, which is a parameter, and a code for 0."""
    zero = quantizer.affine().zero
    one = isinstance(quantizer.grid, LSQ) and quantizer.shape.channels == 1
    return one and bool((zero == zero.round()).all())


def nearest_parts(ratio: float) -> int | None:
    """j of the nearest j / PARTS; None where the ratio is out of reach."""
    parts = round(ratio * PARTS)
    return parts if SMALLEST <= parts <= LARGEST else None


@torch.no_grad()
def part_ties(model: nn.Module, graph: Captured) -> int:
    """Move the scales of quantizers that stand behind one another into such ratios, in place; how many were moved.

    Sources of sums follow the sum's reader, from the network's end to its beginning; a lone reader follows its source.
    A scale moves once: where a tensor goes into two sums of different scales, the later one decides.
    """
    found, all_of = requantized(graph), quantizers(model)
    settled: set[str] = set()
    moved = 0

    def move(name: str, scale: float) -> int:
        settled.add(name)
        grid = all_of[name].grid
        assert isinstance(grid, LSQ)
        before = grid.scale.clone()
        grid.scale.fill_(scale)
        return int(not torch.equal(before, grid.scale))

    pairs = [(r, s) for r in reversed(found) if len(r.sources) == 2 for s in r.sources]
    for reading, source in pairs:
        unit = scale_of(all_of[reading.reader])
        parts = nearest_parts(scale_of(all_of[source]) / unit)
        if parts is not None and source not in settled and movable(all_of[source]):
            settled.add(reading.reader)
            moved += move(source, unit * parts / PARTS)
    for reading in found:
        reader, source = reading.reader, next(iter(reading.sources))
        if len(reading.sources) > 1 or reader == source:
            continue
        parts = nearest_parts(scale_of(all_of[source]) / scale_of(all_of[reader]))
        if parts is None:
            continue
        if reader not in settled and movable(all_of[reader]):
            settled.add(source)
            moved += move(reader, scale_of(all_of[source]) * PARTS / parts)
        elif source not in settled and movable(all_of[source]):
            moved += move(source, scale_of(all_of[reader]) * parts / PARTS)
    return moved
