"""DoReFa-Net's and SAT's formulas (Zhou 2016; Jin 2020) in float64, gradients by hand."""

import math

import pytest
import torch


def hand_gradient(w, g):
    """d/dw of sum g * tanh(w)/max|tanh(w)|, the rounding passed straight through."""
    t = torch.tanh(w)
    flat = t.abs().argmax()
    largest, sign = t.flatten()[flat].abs(), t.flatten()[flat].sign()
    dt = g / largest
    through_max = -(g * t).sum() / largest**2 * sign
    dt = dt.flatten().index_add(0, flat.reshape(1), through_max.reshape(1)).view_as(w)
    return dt * (1 - t**2)


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights(make, bits):
    w = torch.randn(6, 2, 3, 3, dtype=torch.float64).requires_grad_()
    q = make("dorefa", bits, w.detach(), channels=6)
    g = torch.randn_like(w)
    y = q(w)
    y.backward(g)
    n = 2**bits - 1
    t = torch.tanh(w.detach())
    expected = 2 * torch.round(n * (t / (2 * t.abs().max()) + 0.5)) / n - 1
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(w.grad, hand_gradient(w.detach(), g))
    assert q.shape.channels == 1, "one scale, whatever was asked for"


@pytest.mark.parametrize("bits", range(1, 9))
def test_inputs_clip_to_the_unit_interval(make, bits):
    x = torch.randn(2, 3, 50, dtype=torch.float64).requires_grad_()
    q = make("dorefa", bits, x.detach(), role="input", signed=False)
    y = q(x)
    y.sum().backward()
    n = 2**bits - 1
    torch.testing.assert_close(y.detach(), (n * x.detach().clamp(0, 1)).round() / n)
    assert torch.equal(x.grad, ((x >= 0) & (x <= 1)).double())
    signed = make("dorefa", bits, x.detach(), role="input", signed=True)
    clipped = x.detach().clamp(-1, 1)
    torch.testing.assert_close(signed(x).detach(), 2 * (n * (clipped / 2 + 0.5)).round() / n - 1)


@pytest.mark.parametrize(("shape", "n_out"), [((6, 5), 6), ((6, 2, 3, 3), 54)])
def test_sat_rescales_to_the_variance_of_a_fresh_layer(make, shape, n_out):
    w = (torch.randn(shape, dtype=torch.float64) * 3).requires_grad_()
    plain, sat = make("dorefa", 3, w.detach()), make("sat", 3, w.detach(), rescale=True)
    constant = 1 / (math.sqrt(n_out) * plain(w).detach().std())
    torch.testing.assert_close(sat(w), plain(w) * constant)
    g = torch.randn_like(w)
    torch.testing.assert_close(*(torch.autograd.grad(f, w, g)[0] for f in (sat(w), plain(w) * constant)))
    torch.testing.assert_close(sat(w).detach().std(), torch.tensor(n_out**-0.5, dtype=torch.float64))


def test_sat_rescales_linear_layers_only_by_default(make):
    linear, conv = torch.randn(4, 3), torch.randn(4, 3, 1, 1)
    assert not torch.equal(make("sat", 4, linear)(linear), make("dorefa", 4, linear)(linear))
    assert torch.equal(make("sat", 4, conv)(conv), make("dorefa", 4, conv)(conv))


@pytest.mark.parametrize("grid", ["dorefa", "sat"])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_weights_stay_bounded(make, grid, value):
    w = torch.full((3, 4), value, requires_grad=True)
    y = make(grid, 4, w.detach())(w)
    y.sum().backward()
    assert y.abs().max() <= 1
    assert w.grad.abs().max() <= 100
