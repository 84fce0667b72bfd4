"""PACT (Choi 2018, eqs. 2 and 3) and its calibrated gradient (Jin 2020) against closed forms in float64."""

import pytest
import torch


def unsigned(x, alpha, bits, calibrated):
    """(value, dx, dalpha) of one element, in Python numbers; the value clips at 0 and alpha."""
    n = 2**bits - 1
    if x >= alpha:
        return alpha, float(x == alpha), 0.0 if calibrated and x == alpha else 1.0
    if x <= 0:
        return 0.0, float(x == 0), 0.0
    code = round(n * x / alpha)
    return code * alpha / n, 1.0, code / n - x / alpha if calibrated else 0.0


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("calibrated", [False, True])
def test_unsigned_values_and_gradients(make, bits, calibrated):
    x = torch.randn(4, 3, 9, dtype=torch.float64) * 2
    q = make("pact", bits, x, role="input", signed=False, calibrated=calibrated)
    q.grid.alpha.data.fill_(1.3)
    x.requires_grad_()
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)
    rows = [unsigned(v, 1.3, bits, calibrated) for v in x.detach().flatten().tolist()]
    value, dx, dalpha = (torch.tensor(c, dtype=torch.float64).view_as(x) for c in zip(*rows, strict=True))
    torch.testing.assert_close(y.detach(), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, g * dx)
    torch.testing.assert_close(q.grid.alpha.grad, (g * dalpha).sum().reshape(1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("calibrated", [False, True])
def test_signed_tensors_clip_alike_on_both_sides(make, bits, calibrated):
    x = torch.randn(300, dtype=torch.float64) * 2
    q = make("pact", bits, x, signed=True, calibrated=calibrated)
    q.grid.alpha.data.fill_(1.3)
    y = q(x)
    y.sum().backward()
    n, v = 2 ** (bits - 1) - 1, x / 1.3
    code = (n * v).round().clamp(-n, n)
    torch.testing.assert_close(y.detach(), code * 1.3 / n, rtol=1e-9, atol=1e-9)
    outside = (v >= 1).double() - (v <= -1).double()
    rounding = torch.where(outside == 0, code / n - v, 0.0) if calibrated else 0.0
    torch.testing.assert_close(q.grid.alpha.grad, (outside + rounding).sum().reshape(1), rtol=1e-8, atol=1e-8)


def test_one_signed_bit_is_plus_and_minus_alpha(make):
    q = make("pact", 1, torch.randn(50), signed=True)
    q.grid.alpha.data.fill_(0.8)
    y = q(torch.tensor([-3.0, -0.1, 0.1, 3.0]))
    torch.testing.assert_close(y, torch.tensor([-0.8, -0.8, 0.8, 0.8]))


def test_the_original_gradient_at_alpha_is_one(make):
    q = make("pact", 4, torch.rand(10).view(1, 1, 10), role="input", signed=False)
    q.grid.alpha.data.fill_(1.0)
    q(torch.tensor([[[1.0, 0.999]]])).sum().backward()
    assert q.grid.alpha.grad.item() == 1.0


def test_sat_inputs_are_calibrated_pact(make):
    x = torch.rand(2, 3, 20, dtype=torch.float64)
    ours, pact = (
        make(g, 4, x, role="input", signed=False, **o) for g, o in (("sat", {}), ("pact", {"calibrated": True}))
    )
    for q in (ours, pact):
        q.grid.alpha.data.fill_(0.6)
        q(x).sum().backward()
    torch.testing.assert_close(ours.grid.alpha.grad, pact.grid.alpha.grad)


def test_set_bits_keeps_alpha(make):
    q = make("pact", 8, torch.rand(1, 1, 30), role="input", signed=False)
    before = q.grid.alpha.item()
    q.set_bits(2)
    assert q.grid.alpha.item() == before
    assert q(torch.tensor([99.0])).item() == pytest.approx(before)
