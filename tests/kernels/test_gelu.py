"""GELU joined with quantization: values and gradients of the formulas in float64, up to rounding."""

import math

import pytest
import torch
from test_fused import ESTIMATORS, gradients_in_float64, needs_compiler

from bitwright.grids import code_range
from bitwright.kernels import fused, gelu
from bitwright.kernels.reference import draw_seed

pytestmark = needs_compiler


def quantizer(name, bits, signed, scale, zero, seed=0):
    """The arguments of the operator behind its first; zero: a tensor, or None for that of the codes."""
    codes, rule = code_range(bits, signed), ESTIMATORS[name][0].kernel_rule
    torch.manual_seed(seed)
    drawn = None if rule.rate is None else draw_seed(scale.device)
    constant = float(codes.zero) if zero is None else 0.0
    numbers = (constant, 0, 7, fused.RULES[rule.name], rule.replaced_only)
    return (scale, zero, codes.lo, codes.hi, rule.strength, rule.rate, drawn, *numbers)


def test_values_are_as_close_to_gelu_as_torchs():
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.randn(100_000)])
    # At rate 0 nothing is rounded to codes.
    y = gelu.forward(x, *quantizer("pege scalar 0.0 everywhere", 8, True, torch.tensor([0.1]), None))
    want = torch.nn.functional.gelu(x.double())
    torch.testing.assert_close(y.double(), want, rtol=3e-7, atol=1e-7)
    tail = (x < 0) & (x > -5)
    torch.testing.assert_close(y.double()[tail], want[tail], rtol=1e-5, atol=0)


def test_special_values_are_those_of_torch_in_double_precision():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -3e38, 3e38])
    y = gelu.forward(x, *quantizer("clipped_ste", 4, True, torch.tensor([0.5]), None))
    z = torch.nn.functional.gelu(x.double()).float()
    want = torch.ops.bitwright.fake_quantize(z, *quantizer("clipped_ste", 4, True, torch.tensor([0.5]), None))
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_gradients_are_those_of_the_formulas(name, offset, dtype):
    rng = torch.Generator().manual_seed(1)
    shape, scale = (3, 5, 300), torch.tensor([0.17])
    x = (torch.randn(shape, generator=rng) * 2).to(dtype)
    g = torch.randn(shape, generator=rng).to(dtype)
    zero = torch.tensor([0.3]) if offset else None
    arguments = quantizer(name, 4, True, scale, zero, seed=3)
    # The values themselves as the kernel has them: where a code changes is no matter of rounding.
    unrounded = quantizer("pege scalar 0.0 everywhere", 8, True, torch.tensor([0.17]), None)
    z = gelu.forward(x, *unrounded)
    assert torch.equal(gelu.forward(x, *arguments), torch.ops.bitwright.fake_quantize(z, *arguments))
    zeros = code_range(4, True).zero if zero is None else zero
    dz, dscale, dzero = gradients_in_float64(z, scale, zeros, code_range(4, True), name, g, 3, 0, 7)
    v = x.double().requires_grad_()
    (want,) = torch.autograd.grad(torch.nn.functional.gelu(v), v, dz)
    got = gelu.backward(g, x, *arguments)
    rtol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got[0].double(), want, rtol=rtol, atol=1e-5 if dtype == torch.float32 else 0.02)
    torch.testing.assert_close(got[1].double(), dscale, rtol=rtol, atol=0.01)
    if offset:
        torch.testing.assert_close(got[2].double(), dzero, rtol=rtol, atol=0.01)


def test_threads_do_not_change_a_bit():
    x, g = torch.randn(7, 9999), torch.randn(7, 9999)
    arguments = quantizer("pege scalar 0.375 everywhere", 4, True, torch.tensor([0.1]), None)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([gelu.forward(x, *arguments), *gelu.backward(g, x, *arguments)[:2]])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
