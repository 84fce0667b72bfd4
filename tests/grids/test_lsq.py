"""LSQ against the paper's equations 1 to 3, written out element by element in float64."""

import math

import pytest
import torch

CASES = [(bits, signed) for bits in range(1, 9) for signed in (True, False)]


def limits(bits, signed):
    """(-Qn, Qp, code of zero); one signed bit has the two values -s/2 and s/2."""
    if signed and bits > 1:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.0
    return 0, 2**bits - 1, 0.5 if signed else 0.0


def paper(x, s, lo, hi, zero):
    """(value, dvalue/dx, dvalue/ds) of one element, in Python numbers."""
    v = x / s + zero
    if v < lo:
        return (lo - zero) * s, 0.0, lo - zero
    if v > hi:
        return (hi - zero) * s, 0.0, hi - zero
    return (round(v) - zero) * s, 1.0, round(v) - v


@pytest.mark.parametrize(("bits", "signed"), CASES)
@pytest.mark.parametrize("role", ["weight", "input"])
def test_values_and_both_gradients(make, bits, signed, role):
    x = torch.randn(4, 3, 5, dtype=torch.float64) * 2
    q = make("lsq", bits, x, role=role, signed=signed)
    q.grid.scale.data.fill_(3.0 / 2**bits)
    x.requires_grad_()
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)

    lo, hi, zero = limits(bits, signed)
    s = 3.0 / 2**bits
    rows = [paper(v, s, lo, hi, zero) for v in x.detach().flatten().tolist()]
    value, dx, ds = (torch.tensor(c, dtype=torch.float64).view_as(x) for c in zip(*rows, strict=True))
    n = 60 if role == "weight" else 15  # an input counts the features of one sample
    torch.testing.assert_close(y.detach(), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, g * dx)
    expected = (g * ds).sum() / math.sqrt(n * hi)
    torch.testing.assert_close(q.grid.scale.grad, expected.reshape(1), rtol=1e-8, atol=1e-8)
    assert {v for v, d in zip(dx.flatten().tolist(), rows, strict=True) if d} == {0.0, 1.0}, "both cases were met"


def test_per_channel_scales_have_gradients_of_their_own(make):
    w = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    q = make("lsq", 3, w, channels=3)
    s = torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64)
    q.grid.scale.data.copy_(s)
    w.requires_grad_()
    g = torch.randn_like(w)
    q(w).backward(g)
    for c in range(3):
        rows = [paper(v, s[c].item(), -4, 3, 0.0) for v in w[c].detach().flatten().tolist()]
        ds = torch.tensor([r[2] for r in rows], dtype=torch.float64)
        expected = (g[c].flatten() * ds).sum() / math.sqrt(16 * 3)  # 16 weights share a scale
        torch.testing.assert_close(q.grid.scale.grad[c], expected, rtol=1e-8, atol=1e-8)


def test_ties_go_to_even_and_limits_belong_to_the_inside(make):
    q = make("lsq", 3, torch.ones(4), signed=True)
    q.grid.scale.data.fill_(0.5)
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 1.5, 1.75, -2.0, -2.25], requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 1.0, 1.0, 0.0, -1.0, 1.5, 1.5, -2.0, -2.0]
    assert x.grad.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 0]


def test_initial_scale_is_the_papers(make):
    x = torch.randn(3, 50, dtype=torch.float64)
    for bits, qp in ((2, 1), (4, 7), (8, 127)):
        q = make("lsq", bits, x, channels=3)
        torch.testing.assert_close(q.grid.scale.data, 2 * x.abs().mean(1) / math.sqrt(qp))


def test_mse_init_beats_every_other_fraction_of_the_range(make):
    x = torch.randn(1, 4000, dtype=torch.float64)
    q = make("lsq", 3, x, init="mse")
    best = (q(x) - x).square().mean()
    for factor in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0):
        s = q.grid.scale.data * factor
        other = ((x / s).round().clamp(-4, 3) * s - x).square().mean()
        assert best <= other * 1.001


def test_scales_of_weights_follow_the_best_step_for_normal_values(make):
    """Against the least squared error over the quantiles of a normal distribution, by search."""
    values = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    best = {}
    for bits in range(1, 9):
        steps = torch.linspace(2.0, 6.0, 801, dtype=torch.float64) / 2**bits * 1.5
        top = 2 ** (bits - 1) - 0.5  # codes in the middle of their intervals, as Max has them
        errors = [(((values / s - 0.5).round() + 0.5).clamp(-top, top) * s - values).square().mean() for s in steps]
        best[bits] = steps[torch.stack(errors).argmin()].item()
    q = make("lsq", 4, torch.randn(1, 2000), role="weight")
    scale = q.grid.scale.item()
    for bits in (2, 3, 8, 1, 5, 4):
        q.set_bits(bits)
        assert q.grid.scale.item() / scale == pytest.approx(best[bits] / best[4], rel=0.06), bits
    assert q.grid.scale.item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_set_bits_keeps_the_upper_clipping_bound_of_inputs(make, signed):
    q = make("lsq", 8, torch.rand(100) * 3, signed=signed, role="input")
    top = q(torch.tensor([1e9])).item()
    for bits in (4, 3, 1, 2, 8):
        q.set_bits(bits)
        assert q(torch.tensor([1e9])).item() == pytest.approx(top, rel=1e-5)


def test_a_scale_that_crosses_zero_stays_positive(make):
    q = make("lsq", 4, torch.randn(10))
    q.grid.scale.data.fill_(-0.3)
    assert q.affine().scale.item() == pytest.approx(0.3)
    q.grid.scale.data.zero_()
    assert torch.isfinite(q(torch.randn(5))).all()
