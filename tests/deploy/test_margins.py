"""Scales that keep integer sums off the boundaries of codes: against every sum there is, in exact arithmetic."""

from fractions import Fraction

import pytest
import torch

from bitwright.deploy.margins import FARTHEST, exact_scales, undecided
from bitwright.layers.significant import MOST

SCALE, OUTPUT = 0.0173, 0.0391


def exact_code(n: int, multiplier: Fraction) -> int:
    """round(n * multiplier), ties to even: Python's own."""
    return round(n * multiplier)


def wrong_sums(multiplier: float, exact: Fraction, reach: int) -> int:
    """Sums within reach that float32 takes to another code than exact arithmetic."""
    n = torch.arange(-reach, reach + 1)
    ours = (n.float() * torch.tensor(multiplier, dtype=torch.float32)).round().int()
    suspects = (n.double() * float(exact) % 1 - 0.5).abs() < 1e-3  # elsewhere both are sure
    return sum(int(ours[i]) != exact_code(int(n[i]), exact) for i in suspects.nonzero()[:, 0].tolist())


def test_boundaries_that_float32_gets_wrong_are_all_that_there_are():
    torch.manual_seed(0)
    scale = torch.rand(300) * 2e-3 + 1e-3
    x, y = torch.tensor([SCALE]), torch.tensor(OUTPUT)
    multiplier = x * scale / y
    exact = x.double() * scale.double() / y.double()
    wrong, _ = undecided(multiplier, exact, -127, 127)
    assert wrong.sum() > 0
    for i in range(300):
        fraction = Fraction(float(x)) * Fraction(float(scale[i])) / Fraction(float(y))
        reach = int(127 / float(exact[i]))
        assert int(wrong[i]) == wrong_sums(float(multiplier[i]), fraction, reach)


def test_scales_without_a_wrong_boundary():
    torch.manual_seed(1)
    sign = torch.randn(20).sign().double()
    scale = sign * (torch.rand(20, dtype=torch.float64) * 2e-3 + 1e-3)
    x = torch.tensor([SCALE])
    found = exact_scales(scale, MOST, x, [(OUTPUT, -127, 127), (3 * OUTPUT, -127, 127)])
    assert torch.equal(found.sign(), sign)
    assert 0 < (found / scale - 1).abs().max() <= (FARTHEST + 0.5) * 2.0 ** (1 - MOST)
    for s in found.float().tolist():
        for step in (OUTPUT, 3 * OUTPUT):
            y = torch.tensor(step)
            exact = Fraction(float(x)) * Fraction(s) / Fraction(float(y))
            assert wrong_sums(float(x * torch.tensor(s) / y), exact, int(127 / abs(float(exact)))) == 0


@pytest.mark.parametrize("bits", [7, 8, 10, 14])
def test_scales_have_the_bits_that_are_asked_for(bits):
    """Whole numbers below 2^bits, times a power of two each; without a reader the nearest ones."""
    scale = torch.randn(200, generator=torch.Generator().manual_seed(bits)).double() * 1e-2
    for readers in ([], [(OUTPUT, 0, 15)]):
        found = exact_scales(scale, bits, torch.tensor([SCALE]), readers)
        for value in found.tolist():
            numerator, denominator = abs(value).as_integer_ratio()
            assert denominator & (denominator - 1) == 0
            assert (numerator // (numerator & -numerator)).bit_length() <= bits
        if not readers:
            assert ((found / scale - 1).abs() <= 2.0**-bits).all()


def test_a_good_scale_stays():
    """Multiplier 1/3: sums lie thirds from each other and a sixth from every boundary."""
    scale = torch.tensor([1.0], dtype=torch.float64)
    assert torch.equal(exact_scales(scale, MOST, torch.tensor([1.0]), [(3.0, -127, 127)]), scale)
