"""SEQ: the balanced values at 2 bits, LSQ elsewhere."""

import math

import pytest
import torch


def test_values_and_gradients_at_two_bits(make):
    w = torch.randn(3, 40, dtype=torch.float64) * 2
    q = make("seq", 2, w, channels=3)
    s = torch.tensor([0.4, 0.9, 1.7], dtype=torch.float64)
    q.grid.scale.data.copy_(s)
    w.requires_grad_()
    g = torch.randn_like(w)
    y = q(w)
    y.backward(g)
    values = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    v = w.detach() / s[:, None]
    nearest = values[(v[..., None] - values).abs().argmin(-1)]
    torch.testing.assert_close(y.detach(), nearest * s[:, None], rtol=1e-9, atol=0)
    inside = v.abs() <= 1.5
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(w.grad, g * inside)
    rate = torch.where(inside, nearest - v, 1.5 * v.sign())
    expected = (g * rate).sum(1) / math.sqrt(40)  # 40 weights share a scale, Qp = 1
    torch.testing.assert_close(q.grid.scale.grad, expected, rtol=1e-8, atol=1e-8)


def test_normal_weights_lose_a_fifth_less_than_in_twos_complement(make):
    w = torch.randn(1, 200_000, dtype=torch.float64)
    error = {grid: (make(grid, 2, w, init="mse")(w) - w).square().mean().item() for grid in ("seq", "lsq")}
    assert error["seq"] == pytest.approx(0.1189, abs=1e-3)
    assert error["lsq"] == pytest.approx(0.1494, abs=1e-3)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_elsewhere_it_is_lsq(make, bits):
    w = torch.randn(2, 50)
    assert torch.equal(make("seq", bits, w, channels=2)(w), make("lsq", bits, w, channels=2)(w))
    x = torch.rand(2, 3, 5)
    for signed in (False, True):
        one, two = (make(grid, 2, x, role="input", signed=signed) for grid in ("seq", "lsq"))
        assert torch.equal(one(x), two(x))


def test_bits_change_between_the_two_forms(make):
    w = torch.randn(1, 20_000, dtype=torch.float64)
    q = make("seq", 4, w, init="mse")
    q.set_bits(2)
    assert (q(w) - w).square().mean() < 0.125  # 0.119 is the least
    assert q.affine().zero.item() == -0.5
    q.set_bits(4)
    assert q.affine().zero.item() == 0.0
    assert (q(w) - w).square().mean() < 0.013
