"""Gains under which no integer sum of a convolution is rounded differently by float32 and by exact arithmetic.

A convolution with a quantizer behind it takes an integer sum n (bias included) to the code round(n * M), M = input
scale * weight scale / output scale. For each boundary between two codes one sum lies next to it; where it lies closer
than float32 resolves, a runtime (which multiplies float32(n) by float32(M)) and the network as defined come to
different codes, at 8 bits in a few of a million. The sums are integers, so all those cases can be listed (for M above
2^-14 one sum per boundary; with a smaller M, which takes sums of millions, float32 is unsure of several): `exact_gains`
moves the gain of a BatchNorm by at most `FARTHEST` steps of 2^-14 until none is left.
"""

import torch
from torch import Tensor

STEP, FARTHEST = 2.0**-14, 24


def candidates() -> Tensor:
    """Factors of a gain, (2 * FARTHEST + 1,) float64, the smallest change first."""
    k = torch.arange(2 * FARTHEST + 1)
    return 1 + STEP * torch.where(k % 2 == 0, -(k // 2), (k + 1) // 2).double()


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
def exact_gains(gain: Tensor, unit: Tensor, input_scale: Tensor, readers: list[tuple[float, int, int]]) -> Tensor:
    """The gains to use, float32.

    Args:
        gain: (channels,) float32, of the norm. unit: (channels,) float64: weight scale of the folded layer / gain.
        input_scale: (1,) float32. readers: (scale, lowest, highest code from zero) of each quantizer behind the layer.

    Returns:
        Per channel the least change without a wrong boundary and with every sum 8 resolutions away; where there is
        none the one with the fewest wrong boundaries, then the widest margin. A gain of 0 stays.
    """
    tried = (gain.double() * candidates().to(gain.device)[:, None]).float()  # (candidates, channels)
    scale = (tried.double() * unit).float()
    wrong, margin = torch.zeros_like(scale), torch.full_like(scale, torch.inf, dtype=torch.float64)
    for step, lo, hi in readers:
        output = torch.tensor(step, dtype=torch.float32, device=gain.device)
        exact = input_scale.double() * scale.double() / output.double()
        more, near = undecided(input_scale * scale / output, torch.where(exact == 0, 1.0, exact), lo, hi)
        wrong, margin = wrong + more, torch.minimum(margin, near)
    score = wrong.double() * 1e6 - margin.clamp(max=8.0)
    best = score.argmin(0)  # the first of equals: the smallest change
    return torch.where(gain == 0, gain, tried.gather(0, best[None])[0])
