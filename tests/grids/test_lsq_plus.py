"""LSQ+ against the equations of Bhalgat et al. (2020), section 3, in float64."""

import math

import pytest
import torch


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("estimator", ["clipped_ste", "ste"])
def test_scale_and_offset_gradients(make, bits, estimator):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    q = make("lsq+", bits, x, role="input", estimator=estimator)
    s, b = 2.0 / 2**bits, -0.7
    q.grid.scale.data.fill_(s)
    q.grid.offset.data.fill_(b)
    x.requires_grad_()
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)

    top = 2**bits - 1
    v = (x.detach() - b) / s
    k = v.round().clamp(0, top)
    below, above = v < 0, v > top
    inside = ~(below | above)
    ds = torch.where(inside, k - v, k)
    db = (~inside).to(x.dtype)
    dx = torch.ones_like(x) if estimator == "ste" else inside.to(x.dtype)
    scaling = 1 / math.sqrt(15 * top)  # codes run from 0 to 2^b - 1 whatever the sign of the data
    torch.testing.assert_close(y.detach(), k * s + b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, g * dx)
    torch.testing.assert_close(q.grid.scale.grad, (g * ds).sum().reshape(1) * scaling, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(q.grid.offset.grad, (g * db).sum().reshape(1) * scaling, rtol=1e-7, atol=1e-8)
    assert inside.any()
    assert (~inside).any()


def test_weights_are_symmetric_and_start_at_three_sigma(make):
    w = torch.randn(2, 500, dtype=torch.float64) + 0.1
    q = make("lsq+", 4, w, channels=2)
    mean, std = w.mean(1), w.std(1, correction=0)
    expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2**3
    torch.testing.assert_close(q.grid.scale.data, expected)
    assert q.grid.offset is None


def test_offset_starts_where_the_data_is(make):
    x = torch.rand(1, 3, 400, dtype=torch.float64) * 2 + 5  # far from zero: a symmetric grid would waste its codes
    q = make("lsq+", 4, x, role="input")
    error = (q(x) - x).abs().max()
    assert error <= 2 / 15
    assert 4.9 <= q.grid.offset.item() <= 5.2


def test_set_bits_keeps_both_ends(make):
    q = make("lsq+", 8, torch.randn(1, 1, 400), role="input")
    ends = torch.tensor([-1e6, 1e6])
    before = q(ends)
    for bits in (4, 1, 2):
        q.set_bits(bits)
        torch.testing.assert_close(q(ends), before, rtol=1e-4, atol=1e-4)
