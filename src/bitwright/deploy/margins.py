"""Scales under which no integer sum of a convolution is rounded differently by float32 and by exact arithmetic.

A convolution with a quantizer behind it takes an integer sum n (bias included) to the code round(n * M), M = input
scale * weight scale / output scale. For each boundary between two codes one sum lies next to it; where it lies closer
than float32 resolves, a runtime (which multiplies float32(n) by float32(M)) and the network as defined come to
different codes, at 8 bits in a few of a million. The sums are integers, so all those cases can be listed (for M above
2^-14 one sum per boundary; with a smaller M, which takes sums of millions, float32 is unsure of several):
`exact_scales` looks for a weight scale without any among short numbers near the trained one.
"""

import torch
from torch import Tensor

from bitwright.layers.significant import MOST, neighbours

# Numbers of `MOST` significant bits that are tried on each side: a scale moves by 0.3 % at most.
FARTHEST = 24


def undecided(multiplier: Tensor, exact: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """How many boundaries of codes float32 gets wrong, and how near they are.

    Args:
        multiplier: any shape, float32: what a runtime multiplies sums by; exact: the same in float64, not 0.
        lo, hi: lowest and highest code, counted from the zero point.

    Returns:
        (wrong, margin), the shape of `multiplier`: boundaries at which float32 rounds the nearest sum to the other
        code, and the least distance of a nearest sum from its boundary, in units of float32's resolution there.
    """
    ties = torch.arange(lo, hi, dtype=torch.float64, device=exact.device) + 0.5
    sums = (ties / exact[..., None]).round()
    values = sums * exact[..., None]
    wrong = (sums.float() * multiplier[..., None]).round() != values.round()
    distance = (values - ties).abs() / (2.0**-23 * (ties.abs() + 0.5))
    return wrong.sum(-1), distance.amin(-1)


@torch.no_grad()
def exact_scales(scale: Tensor, bits: int, input_scale: Tensor, readers: list[tuple[float, int, int]]) -> Tensor:
    """The weight scales to use, float64, numbers of `bits` significant bits.

    Args:
        scale: (channels,) float64, none 0. bits: at most `MOST`; with fewer, fewer numbers are tried.
        input_scale: (1,) float32. readers: (scale, lowest, highest code from zero) of each quantizer behind the layer.

    Returns:
        Per channel the nearest number without a wrong boundary and with every sum 8 resolutions away; where there is
        none the one with the fewest wrong boundaries, then the widest margin.
    """
    tried = neighbours(scale, bits, max(FARTHEST >> (MOST - bits), 1)).float()  # (candidates, channels)
    wrong, margin = torch.zeros_like(tried), torch.full_like(tried, torch.inf, dtype=torch.float64)
    for step, lo, hi in readers:
        output = torch.tensor(step, dtype=torch.float32, device=scale.device)
        exact = input_scale.double() * tried.double() / output.double()
        more, near = undecided(input_scale * tried / output, exact, lo, hi)
        wrong, margin = wrong + more, torch.minimum(margin, near)
    score = wrong.double() * 1e6 - margin.clamp(max=8.0)
    best = score.argmin(0)  # the first of equals: the smallest change
    return tried.gather(0, best[None])[0].double()
