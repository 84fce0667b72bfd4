"""Float matrices times small integers in bfloat16: float64's products but for 2^-17 of each float factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import needs_compiler

from bitwright.kernels import halves
from bitwright.kernels.halves import Matrices

SIDES = ["left", "right"]

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
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    turned=st.tuples(st.booleans(), st.booleans()),
    split=st.sampled_from(["left", "right", "neither"]),
    threads=st.integers(1, 2),
)
def test_products(seed, count, sizes, turned, split, threads):
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(seed)
    m, k, n = sizes
    shapes = [(k, m) if turned[0] else (m, k), (n, k) if turned[1] else (k, n)]
    factors = [torch.randint(-256, 257, (*count, *shape), generator=rng).float() for shape in shapes]
    if split != "neither":
        at = SIDES.index(split)
        factors[at] = torch.randn(*count, *shapes[at], generator=rng)
    parts = [
        halves.split(t) if name == split else (t.bfloat16(),)
        for name, t in zip(["left", "right"], factors, strict=True)
    ]
    y = halves.multiply(Matrices(parts[0], turned[0]), Matrices(parts[1], turned[1]), 0.5)
    left, right = (t.double().transpose(-2, -1) if t_ else t.double() for t, t_ in zip(factors, turned, strict=True))
    # Of every product 2^-17, of every sum one rounding per addition; sums of integers are exact.
    bound = (left.abs() @ right.abs()) * (2**-16.9 + k * 2**-24) * (split != "neither")
    assert y.dtype == torch.float32
    assert y.shape == (*count, m, n)
    assert bool(((y.double() - left @ right / 2).abs() <= bound).all())


@multiplies
def test_the_default_type_and_device_do_not_matter():
    parts, right = halves.split(torch.ones(4, 3)), torch.ones(3, 5, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = halves.multiply(Matrices(parts), Matrices((right,)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.full((4, 5), 3.0, device="cpu"))


@multiplies
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value):
    g = torch.ones(4, 3)
    g[1, 2] = value
    y = halves.multiply(Matrices(halves.split(g)), Matrices((torch.ones(3, 5, dtype=torch.bfloat16),)))
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


@multiplies
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("wants", [(True, True), (False, True), (True, False)])
def test_gradients_of_a_product(turned, wants):
    g, a = torch.randn(2, 3, 5, 7), torch.randint(-128, 256, (2, 3, 5, 4)).bfloat16()
    b = torch.randint(-128, 128, (2, 3, 7, 4) if turned else (2, 3, 4, 7)).bfloat16()
    made = halves.product_gradients(g, a, b, (0.25, 0.125), turned, wants)
    left, right = (a.double() * 0.25).requires_grad_(), (b.double() * 0.125).requires_grad_()
    exact = torch.autograd.grad(left @ (right.transpose(-2, -1) if turned else right), (left, right), g.double())
    for got, want, wanted in zip(made, exact, wants, strict=True):
        assert (got is not None) == wanted
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
