"""Every function against float64, and the properties on which equality rests."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels import reproducible as exact
from bitwright.kernels.reproducible import EXP_UNITS, GELU_COUNT, GELU_STEP, GELU_ZERO, SCORE_GRID


def test_layer_norm_is_that_of_float64_up_to_roundings():
    x = torch.randn(50, 96) * 3 + torch.linspace(-40, 40, 50)[:, None]
    gain, shift = torch.randn(96), torch.randn(96)
    y = exact.layer_norm(x, gain, shift, 1e-6)
    reference = F.layer_norm(x.double(), (96,), gain.double(), shift.double(), 1e-6)
    assert y.dtype == torch.float32
    # The mean is rounded to float32: of |mean| = 40 that is 2^-19 beside a deviation of 3.
    assert (y - reference).abs().max() < 1e-5
    assert torch.equal(
        exact.layer_norm(x, None, None, 1e-6), exact.layer_norm(x, torch.ones(96), torch.zeros(96), 1e-6)
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 700), st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_the_order_of_a_row_does_not_change_its_norm(n, seed, scale, mean):
    torch.manual_seed(seed)
    x, order = torch.randn(4, n) * scale + mean, torch.randperm(n)
    y = exact.layer_norm(x, None, None, 1e-6)
    assert torch.equal(exact.layer_norm(x[:, order], None, None, 1e-6), y[:, order])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3900), st.integers(0, 2**31), st.floats(0, 40))
def test_the_order_of_scores_does_not_change_their_softmax(n, seed, scale):
    torch.manual_seed(seed)
    x, order = torch.randn(3, n) * scale, torch.randperm(n)
    y = exact.softmax(x)
    assert torch.equal(exact.softmax(x[:, order]), y[:, order])


def test_softmax_is_that_of_float64_up_to_its_steps():
    x = torch.rand(64, 197) * 3
    y, reference = exact.softmax(x), x.double().softmax(-1)
    # Half a step of two scores is 4.9e-4 of a probability, half a unit 1.2e-4 of the row's largest.
    bound = 6e-4 * reference + 1.3e-4 * reference.amax(-1, True)
    assert ((y - reference).abs() <= bound).all()
    assert torch.allclose(y.sum(-1), torch.ones(64), atol=1e-5)


def test_what_is_less_than_half_a_unit_is_lost():
    x = torch.tensor([[0.0, *[-9.1] * 196]])
    assert torch.equal(exact.softmax(x), torch.tensor([[1.0, *[0.0] * 196]]))
    assert x.softmax(-1)[0, 0] > 0.978


def test_softmax_leaves_masked_scores_out():
    x = torch.tensor([[1.0, 2.0, float("-inf")]])
    assert exact.softmax(x)[0, 2] == 0
    assert torch.equal(exact.softmax(x)[:, :2], exact.softmax(x[:, :2]))


def test_no_exponential_function_rounds_a_softmax_differently():
    """Sums in units stay exact, and no unit is so near a half that an error of 5 * 2^-24 moves it."""
    s = -np.arange(2**15) / 2048
    assert float(np.float32(EXP_UNITS)) == EXP_UNITS
    assert EXP_UNITS * 3900 < 2**24
    units = np.exp(s) * EXP_UNITS
    assert units[-1] < 0.01
    error = units * 6 * 2.0**-24  # and one rounding of the product
    assert (np.rint(units - error) == np.rint(units + error)).all()
    ours = (torch.tensor(s, dtype=torch.float32).exp() * EXP_UNITS).round()
    assert torch.equal(ours.double(), torch.tensor(np.rint(units)))


def test_scores_are_rounded_to_multiples_of_a_power_of_two():
    x = torch.randn(10_000) * 100
    steps = (x + SCORE_GRID - SCORE_GRID) * 2048
    assert torch.equal(steps, (x.double() * 2048).round().float())


def test_gelu_is_that_of_float64_up_to_its_steps():
    x = torch.cat([torch.linspace(-9, 57, 100_001), torch.tensor([-1e9, 1e9, float("-inf"), float("inf")])])
    y = exact.gelu(x)
    top = (GELU_COUNT - 1 - GELU_ZERO) * GELU_STEP
    reference = F.gelu(x.double().clamp(-8, top))
    assert (y - reference).abs().max() <= GELU_STEP / 2 * 1.13
    on_grid = torch.arange(-GELU_ZERO, GELU_COUNT - GELU_ZERO) * GELU_STEP
    assert torch.equal(exact.gelu(on_grid), F.gelu(on_grid.double()).float())


@pytest.mark.parametrize("value", [2**24 + 2, 2**26 + 12, -(2**25 + 4)])
def test_sums_are_scaled_as_runtimes_scale_them(value):
    left, right, bias = torch.tensor([0.0123]), torch.tensor([0.77, 0.031]), torch.tensor([0.5, -2.0])
    sums = torch.tensor([[value, 3.0]], dtype=torch.float64)
    number, scale = np.float32([value, 3]), np.float32(0.0123) * np.float32([0.77, 0.031])
    assert exact.scaled(sums, left, right, bias).numpy().tolist() == [(number * scale + bias.numpy()).tolist()]


def test_pooling_is_the_mean():
    x = torch.randn(3, 5, 7, 7)
    assert torch.equal(exact.pooled(x), x.double().mean((2, 3), True).float())
