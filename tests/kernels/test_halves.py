"""Float matrices times small integers in bfloat16: float64's products but for 2^-17 of each float factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import needs_compiler

from bitwright.kernels import halves

multiplies = pytest.mark.skipif(not halves.available(), reason="this processor does not multiply bfloat16 matrices")


@needs_compiler
@pytest.mark.parametrize("steps", [1, 33])
def test_halves_are_the_float(steps):
    x, step = torch.randn(7, 33) * torch.logspace(-20, 20, 7)[:, None], torch.rand(steps) + 0.1
    high, low = halves.split(x, step)
    exact = x.double() * step.double()
    assert high.dtype == low.dtype == torch.bfloat16
    assert bool(((high.double() + low.double() - exact).abs() <= exact.abs() * 2**-16.9).all())


@multiplies
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    transposed=st.booleans(),
    threads=st.integers(1, 2),
)
def test_products(seed, sizes, transposed, threads):
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(seed)
    rows, inner, columns = sizes
    left = torch.randn(*((inner, rows) if transposed else (rows, inner)), generator=rng)
    right = torch.randint(-256, 257, (inner, columns), generator=rng)
    y = halves.multiply(halves.split(left, torch.ones(1)), right.bfloat16(), transposed)
    left = left.double().t() if transposed else left.double()
    # Of every product 2^-17, of every sum one rounding per addition.
    bound = (left.abs() @ right.double().abs()) * (2**-16.9 + inner * 2**-24)
    assert y.dtype == torch.float32
    assert bool(((y.double() - left @ right.double()).abs() <= bound).all())


@multiplies
def test_the_default_type_and_device_do_not_matter():
    parts, right = halves.split(torch.ones(4, 3), torch.ones(1)), torch.ones(3, 5, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = halves.multiply(parts, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.full((4, 5), 3.0, device="cpu"))


@multiplies
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value):
    g = torch.ones(4, 3)
    g[1, 2] = value
    y = halves.multiply(halves.split(g, torch.ones(1)), torch.ones(3, 5, dtype=torch.bfloat16))
    assert y.isfinite().all(1).tolist() == [True, False, True, True]


@multiplies
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("wants", [(True, True, True), (False, True, False), (True, False, True)])
def test_gradients_of_a_linear_layer(steps, wants):
    g, x, w = torch.randn(20, 6), torch.randint(0, 256, (20, 9)).bfloat16(), torch.randint(-128, 128, (6, 9)).bfloat16()
    x_step, w_step = torch.rand(1), torch.rand(steps) + 0.1
    made = halves.linear_gradients(g, x, w, (x_step, w_step), wants)
    values = x.double() * x_step.double(), w.double() * w_step.double()[:, None]
    exact = g.double() @ values[1], g.double().t() @ values[0], g.double().sum(0)
    for got, want, wanted in zip(made, exact, wants, strict=True):
        assert (got is not None) == wanted
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
