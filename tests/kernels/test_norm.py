"""Batch norm joined with addition, relu and quantization: each value the separate operators', gradients to rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import ESTIMATORS, gradients_in_float64, make_tensor, needs_compiler

from bitwright import kernels
from bitwright.grids import code_range
from bitwright.kernels import fused, norm
from bitwright.kernels.reference import draw_seed

pytestmark = needs_compiler


def measured(x, rng):
    """A norm with random gain and bias over `x`."""
    weight, bias = (torch.randn(x.shape[1], generator=rng) for _ in range(2))
    return norm.measure(x, weight, bias, None, 1e-5, 0.1)


def norm_gradients(dv, x, n):
    """(dx, dweight, dbias) of a batch norm for the gradient `dv` of its output, by the formulas in float64."""
    per_channel = lambda t: t.double().view(1, -1, 1, 1)  # noqa: E731
    dims = (0, 2, 3)
    centred = (x.double() - per_channel(n.mean)) * per_channel(n.invstd)
    slope = (dv * centred).mean(dims, keepdim=True)
    dx = (dv - dv.mean(dims, keepdim=True) - centred * slope) * per_channel(n.invstd * n.weight)
    return dx, (dv * centred).sum(dims), dv.sum(dims)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*[st.integers(1, 7)] * 3, st.sampled_from([1, 5, 16, 1500])),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    special=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    offset=st.booleans(),
    added=st.booleans(),
    relu=st.booleans(),
    read=st.sampled_from(["quantized", "values", "both"]),
    name=st.sampled_from(sorted(ESTIMATORS)),
)
def test_fuzz(seed, shape, layout, special, dtype, bits, signed, offset, added, relu, read, name):
    rng = torch.Generator().manual_seed(seed)
    x = make_tensor(shape, layout, False, dtype, rng)
    other = make_tensor(shape, layout, special, dtype, rng) if added else None
    n = measured(x, rng)
    codes, scale = code_range(bits, signed), torch.rand(1, generator=rng) + 0.05
    zero = torch.randn(1, generator=rng) if offset else codes.zero
    rule = ESTIMATORS[name][0].kernel_rule
    torch.manual_seed(seed)
    drawn = None if rule.rate is None else draw_seed(x.device)
    quantizer = (
        *(scale, zero if offset else None, codes.lo, codes.hi, rule.strength, rule.rate, drawn),
        *(0.0 if offset else float(zero), 0, 7, fused.RULES[rule.name], rule.replaced_only),
    )
    z, y = norm.forward(x, n, other, relu, quantizer, True)
    assert z is not None
    # The same step by step.
    v = norm.forward(x, n, None, False, None, True)[0]
    v = v if other is None else v + other
    torch.testing.assert_close(z, v.relu() if relu else v, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, torch.ops.bitwright.fake_quantize(z, *quantizer), rtol=0, atol=0, equal_nan=True)
    alone, again = norm.forward(x, n, other, relu, quantizer, False)
    assert alone is None
    torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)

    gy, gz = (torch.empty_like(x).copy_(torch.randn(shape, generator=rng)) for _ in range(2))
    kept = z if added else None
    quantized = quantizer if read != "values" else None
    given_y, given_z = gy if read != "values" else None, gz if read != "quantized" else None
    got = norm.backward(given_y, given_z, x, kept, n, relu, quantized)
    dv = torch.zeros_like(x, dtype=torch.float64)
    if read != "values":
        dv, dscale, dzero = gradients_in_float64(z, scale, zero, codes, name, gy, seed, 0, 7)
        if torch.isfinite(z).all():
            rtol = 1e-5 if dtype == torch.float32 else 0.01
            atol = 255 * rtol / 10 * x.numel() ** 0.5
            torch.testing.assert_close(got.scale.double(), dscale, rtol=rtol, atol=atol)
            if offset:
                torch.testing.assert_close(got.zeros.double(), dzero, rtol=rtol, atol=atol)
    dv = dv + (gz.double() if given_z is not None else 0.0)
    dv = torch.where(z <= 0, 0.0, dv) if relu else dv
    assert got.other is None or not bool((got.other.isfinite() & dv.isnan()).any())
    if not torch.isfinite(dv).all():
        return
    # bfloat16: the gradient of the norm's output is rounded on the way, as that of separate operators is.
    rtol = 1e-4 if dtype == torch.float32 else 0.03
    if got.other is not None and (relu or read != "values"):
        torch.testing.assert_close(got.other.double(), dv, rtol=rtol, atol=1e-6 if dtype == torch.float32 else 0.03)
    for have, want in zip((got.x, got.weight, got.bias), norm_gradients(dv, x, n), strict=True):
        size = want.abs().max() + (n.invstd * n.weight).abs().max().double() * dv.abs().max()
        atol = float(size) * rtol * x.numel() ** 0.25
        torch.testing.assert_close(have.double(), want, rtol=rtol, atol=atol)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_values_are_those_of_torch(dtype, channels, layout):
    x = (torch.randn(6, channels, 9, 31) * 3 + 1).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(channels), torch.randn(channels)
    ours = torch.randn(channels), torch.rand(channels)
    theirs = [t.double() for t in ours]
    versions = [t._version for t in ours]
    n = norm.measure(x, weight, bias, ours, 1e-3, 0.3)
    # In double precision: torch itself sums some layouts and types in single precision.
    y, mean, invstd = torch.native_batch_norm(*(t.double() for t in (x, weight, bias)), *theirs, True, 0.3, 1e-3)
    torch.testing.assert_close(n.mean, mean.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(n.invstd, invstd.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, tuple(t.float() for t in theirs), rtol=1e-6, atol=1e-6)
    assert all(t._version > before for t, before in zip(ours, versions, strict=True))
    made = norm.forward(x, n, None, False, None, True)[0]
    torch.testing.assert_close(made.double(), y, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=1e-5)


def test_statistics_far_from_zero():
    x = (torch.randn(8, 16, 32, 32, dtype=torch.float64) + 1e4).float().contiguous(memory_format=torch.channels_last)
    n = norm.measure(x, torch.ones(16), torch.zeros(16), None, 0.0, 0.1)
    variance = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(n.invstd.double(), variance.rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 700, 5, 5), (2, norm.WIDEST, 2, 3), (70, 13, 33, 35)])
def test_the_layout_changes_sums_only(shape):
    rng = torch.Generator().manual_seed(0)
    x, other, gy, gz = (torch.randn(shape, generator=rng) for _ in range(4))
    codes = code_range(4, False)
    quantizer = (torch.tensor([0.1]), None, codes.lo, codes.hi, None, None, None, 0.0, 0, 9, 0, False)
    n = measured(x, rng)
    results = []
    for layout in LAYOUTS:
        t = [a.contiguous(memory_format=layout) for a in (x, other, gy, gz)]
        z, y = norm.forward(t[0], n, t[1], True, quantizer, True)
        results.append((z, y, norm.backward(t[2], t[3], t[0], z, n, True, quantizer)))
    (z, y, a), (z_last, y_last, b) = results
    assert torch.equal(z, z_last)
    assert torch.equal(y, y_last)
    assert b.x.stride() == z_last.stride()
    for want, got in zip(a[:5], b[:5], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_a_batch_is_nan_in_its_channel(layout):
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=layout)
    x[0, 1, 2, 3] = torch.nan
    n = measured(x, torch.Generator().manual_seed(0))
    z = norm.forward(x, n, None, True, None, True)[0]
    assert z[:, 1].isnan().all()
    assert z[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout):
    x, gy = (torch.randn(5, 6, 80, 81).contiguous(memory_format=layout) for _ in range(2))
    codes = code_range(4, False)
    quantizer = (torch.tensor([0.1]), None, codes.lo, codes.hi, None, None, None, 0.0, 0, 9, 0, False)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        n = measured(x, torch.Generator().manual_seed(1))
        _, y = norm.forward(x, n, None, True, quantizer, False)
        made = norm.backward(gy, None, x, None, n, True, quantizer)
        results.append([y, *n, made.x, made.weight, made.bias, made.scale])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_gradients_are_taken():
    x = torch.randn(2, 3, 4, 4)
    n = measured(x, torch.Generator().manual_seed(0))
    g = torch.randn(3, 2, 4, 4).transpose(0, 1)
    a, b = (norm.backward(None, t, x, None, n, False, None) for t in (g, g.contiguous()))
    assert torch.equal(a.x, b.x)
    one = norm.backward(None, torch.ones(1).expand(x.shape), x, None, n, False, None)
    torch.testing.assert_close(one.x, torch.zeros_like(x), rtol=0, atol=1e-5)
    assert kernels.fused_available()
