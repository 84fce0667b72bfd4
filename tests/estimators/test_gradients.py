"""Gradients across the rounding against the papers' formulas in float64."""

import math

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.estimators import ESTIMATORS, make_estimator
from bitwright.estimators.dsq import dsq_slope
from making import make_quantizer

LO, HI = torch.tensor([0.0], dtype=torch.float64), torch.tensor([7.0], dtype=torch.float64)


def codes_and_gradient(name, **options):
    """(v, k, g, dk/dv * g) for values inside and outside the codes 0 ... 7."""
    v = (torch.rand(400, dtype=torch.float64) * 11 - 2).requires_grad_()
    estimator = make_estimator(name, options).double()
    k = estimator(v, LO, HI)
    g = torch.randn_like(k)
    k.backward(g)
    return v.detach(), k.detach(), g, v.grad


@pytest.mark.parametrize("name", ["ste", "clipped_ste", "ewgs", "dsq"])
def test_codes_are_whole_numbers_to_the_last_bit(name):
    for dtype in (torch.float32, torch.float64):
        v = torch.cat([torch.rand(10000, dtype=dtype) * 300 - 20, torch.arange(0, 256, 0.5, dtype=dtype)])
        k = make_estimator(name, {})(v, torch.zeros(1, dtype=dtype), torch.full((1,), 255, dtype=dtype))
        assert torch.equal(k, v.clamp(0, 255).round())
        assert torch.equal(k, k.round())


def test_clipped_ste():
    v, _, g, got = codes_and_gradient("clipped_ste")
    assert torch.equal(got, torch.where((v >= 0) & (v <= 7), g, 0.0))


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.3])
def test_ewgs_scales_by_the_error_on_the_unit_range(delta):
    v, _, g, got = codes_and_gradient("ewgs", delta=delta)
    x_n = v.clamp(0, 7) / 7
    x_q = (x_n * 7).round() / 7
    scaled = torch.tensor(
        [a * (1 + delta * math.copysign(1, a) * e) for a, e in zip(g.tolist(), (x_n - x_q).tolist(), strict=True)]
    )
    torch.testing.assert_close(got, torch.where((v >= 0) & (v <= 7), scaled.double(), 0.0), rtol=1e-6, atol=1e-7)


def soft_staircase(v, alpha):
    """DSQ's staircase for Delta = 1, from equations 4 to 7 of Gong et al."""
    k = math.log(2 / alpha - 1)
    s = 1 / math.tanh(0.5 * k)  # equals 1 / (1 - alpha): the pieces must meet
    assert s == pytest.approx(1 / (1 - alpha))
    i = torch.floor(v)
    return i + 0.5 * (s * torch.tanh(k * (v - i - 0.5)) + 1)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 0.7])
def test_dsq_is_the_slope_of_the_soft_staircase(alpha):
    v = torch.arange(0, 7, dtype=torch.float64).repeat_interleave(9) + torch.linspace(0.1, 0.9, 9).repeat(7)
    h = 1e-6
    slope = (soft_staircase(v + h, alpha) - soft_staircase(v - h, alpha)) / (2 * h)
    torch.testing.assert_close(dsq_slope(v, alpha), slope, rtol=1e-6, atol=1e-8)
    ends = torch.tensor([2 - 1e-12, 2 + 1e-12], dtype=torch.float64)
    torch.testing.assert_close(soft_staircase(ends, alpha), torch.full((2,), 2.0, dtype=torch.float64))

    v, _, g, got = codes_and_gradient("dsq", alpha=alpha)
    k = math.log(2 / alpha - 1)
    d = v - v.floor() - 0.5
    expected = g * 0.5 / (1 - alpha) * k / torch.cosh(k * d) ** 2
    torch.testing.assert_close(got, torch.where((v >= 0) & (v <= 7), expected, 0.0))


@pytest.mark.parametrize("grid", ["lsq", "lsq+", "pact", "dorefa", "minmax", "tqt", "seq"])
def test_ste_passes_the_clip_for_x_but_not_for_the_scale(grid):
    x = torch.randn(3, 4, 20, dtype=torch.float64)
    found = {}
    for name in ("ste", "clipped_ste"):
        q = make_quantizer(grid, 3, x, role="input", estimator=name).eval()
        if grid != "dorefa":
            for p in q.grid.parameters():
                p.data.mul_(0.3)
        wide = (x * 2).requires_grad_()
        y = q(wide)
        y.sum().backward()
        found[name] = (y.detach(), wide.grad, [p.grad for p in q.grid.parameters()])
    (y, dx, dp), (y_clipped, dx_clipped, dp_clipped) = found["ste"], found["clipped_ste"]
    assert torch.equal(y, y_clipped)
    torch.testing.assert_close(dx, torch.ones_like(dx))
    assert (dx_clipped == 0).any()
    torch.testing.assert_close(dp, dp_clipped)


@pytest.mark.parametrize("name", ["ste", "clipped_ste", "ewgs", "dsq"])
def test_gradients_stop_where_none_is_wanted(name):
    v = torch.rand(5, dtype=torch.float64)
    assert not make_estimator(name, {}).double()(v, LO, HI).requires_grad
    with torch.no_grad():
        assert not make_estimator(name, {}).double()(v.requires_grad_(), LO, HI).requires_grad


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ewgs", {"delta": -1}),
        ("ewgs", {"delta": "large"}),
        ("ewgs", {"delta": float("nan")}),
        ("dsq", {"alpha": 1.0}),
        ("dsq", {"alpha": 0}),
        ("ste", {"alpha": 0.5}),
        ("none", {}),
    ],
)
def test_bad_options_are_refused_in_one_line(name, options):
    with pytest.raises(BitwrightError) as caught:
        make_estimator(name, options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_every_estimator_is_in_the_table_by_its_name():
    assert {"ste", "clipped_ste", "ewgs", "dsq"} <= set(ESTIMATORS)
