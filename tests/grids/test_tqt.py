"""TQT against closed forms in float64."""

import math

import pytest
import torch

from bitwright.grids import code_range
from bitwright.grids.tqt import power_of_two, squared_error


def test_every_power_of_two_of_float32_is_exact():
    exponents = torch.arange(-120.0, 121.0)
    assert power_of_two(exponents).tolist() == [2.0 ** int(e) for e in exponents]
    assert power_of_two(exponents - 0.5).tolist() == [2.0 ** int(e) for e in exponents]
    assert power_of_two(exponents + 0.01).tolist() == [2.0 ** (int(e) + 1) for e in exponents]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_values_and_gradients_are_the_papers(make, bits, signed):
    x = torch.randn(4, 3, 50, dtype=torch.float64) * 3
    q = make("tqt", bits, x, role="input", signed=signed)
    q.grid.log2_scale.data.fill_(-1.3)
    x.requires_grad_()
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)
    s, codes = 0.5, code_range(bits, signed)
    n, p = codes.lo.item(), codes.hi.item()
    v = x.detach() / s
    k = v.round()
    inside = (v >= n) & (v <= p)
    torch.testing.assert_close(y.detach(), k.clamp(n, p) * s, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, g * inside)
    rate = torch.where(v < n, torch.full_like(v, n), torch.where(v > p, torch.full_like(v, p), k - v))
    expected = (g * s * math.log(2.0) * rate).sum()
    torch.testing.assert_close(q.grid.log2_scale.grad, expected.reshape(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_it_starts_at_the_best_power_of_two_per_channel(make, bits):
    x = torch.randn(3, 400, dtype=torch.float64) * torch.tensor([[0.02], [1.0], [30.0]], dtype=torch.float64)
    q = make("tqt", bits, x, channels=3)
    chosen = power_of_two(q.grid.log2_scale.detach())
    codes = q.codes
    best = squared_error(x, chosen, codes)
    for shift in range(-8, 9):
        assert (best <= squared_error(x, chosen * 2.0**shift, codes) + 1e-12).all()
    assert (q.grid.log2_scale.detach() % 1 == 0.5).all()


def test_bits_change_the_scale_by_whole_shifts_of_inputs(make):
    q = make("tqt", 8, torch.rand(1, 1, 100), role="input", signed=False)
    before = q.affine().scale.clone()
    q.set_bits(3)
    assert torch.equal(q.affine().scale, before * 2**5)
    q.set_bits(8)
    assert torch.equal(q.affine().scale, before)


def test_fewer_bits_of_weights_take_the_best_step_for_a_normal_distribution(make):
    q = make("tqt", 4, torch.randn(1, 5000, dtype=torch.float64))
    four = q.affine().scale.item()
    q.set_bits(2)
    two = make("tqt", 2, torch.randn(1, 5000, dtype=torch.float64)).affine().scale.item()
    assert q.affine().scale.item() / two in (0.5, 1.0, 2.0)
    assert q.affine().scale.item() > four
