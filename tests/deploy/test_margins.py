"""Gains that keep integer sums off the boundaries of codes: against every sum there is, in exact arithmetic."""

from fractions import Fraction

import torch

from bitwright.deploy.margins import FARTHEST, STEP, candidates, exact_gains, undecided

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


def test_gains_without_a_wrong_boundary():
    torch.manual_seed(1)
    gain = torch.randn(20).sign() * (torch.rand(20) + 0.5)
    unit = torch.rand(20, dtype=torch.float64) * 2e-3 + 1e-3
    gain[3] = 0
    x = torch.tensor([SCALE])
    found = exact_gains(gain, unit, x, [(OUTPUT, -127, 127), (3 * OUTPUT, -127, 127)])
    assert found[3] == 0
    moved = (found / gain - 1).nan_to_num(0).abs()
    assert 0 < moved.max() <= STEP * FARTHEST * 1.01
    for g, u in zip(found.tolist(), unit.tolist(), strict=True):
        if g == 0:
            continue
        scale = torch.tensor([g], dtype=torch.float32).double().mul(u).float()
        for step in (OUTPUT, 3 * OUTPUT):
            y = torch.tensor(step)
            exact = Fraction(float(x)) * Fraction(float(scale)) / Fraction(float(y))
            assert wrong_sums(float(x * scale / y), exact, int(127 / abs(float(exact)))) == 0


def test_a_good_gain_stays():
    """Multiplier 1/3: sums lie thirds from each other and a sixth from every boundary."""
    gain = torch.tensor([1.0])
    found = exact_gains(gain, torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0]), [(3.0, -127, 127)])
    assert torch.equal(found, gain)


def test_changes_are_tried_from_the_smallest_on():
    steps = ((candidates() - 1) / STEP).round().tolist()
    assert steps[:5] == [0, 1, -1, 2, -2]
    assert sorted(steps) == list(range(-FARTHEST, FARTHEST + 1))
