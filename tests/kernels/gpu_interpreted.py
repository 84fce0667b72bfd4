"""The Triton kernels in Triton's interpreter, on the CPU. Run by `test_gpu.py` with TRITON_INTERPRET=1 in the
environment, which must be there before triton is imported.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import ESTIMATORS, gradients_in_float64, make_tensor
from torch import Tensor

from bitwright.grids import code_range
from bitwright.kernels import fused, gpu, reference

# The interpreter computes with numpy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    special=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    learned=st.booleans(),
    offset=st.booleans(),
    name=st.sampled_from(sorted(ESTIMATORS)),
)
def test_fuzz(seed, shape, layout, special, dtype, bits, signed, axis, learned, offset, name):
    """Values equal the reference's to the last bit, gradients the formulas in float64 to rounding."""
    rng = torch.Generator().manual_seed(seed)
    axis = None if axis is not None and (len(shape) <= axis or layout == "channels_last") else axis
    x = make_tensor(shape, layout, special, dtype, rng)
    channels = 1 if axis is None else shape[axis]
    scale = torch.rand(channels, generator=rng) + 0.05
    scale[0] = 0.25
    if learned:
        scale[-1] *= -1
    zero = torch.randn(channels, generator=rng) if offset else code_range(bits, signed).zero
    g = torch.randn(shape, generator=rng).to(dtype)
    codes, axis, count = code_range(bits, signed), axis or 0, 7 if learned else 0
    rule = ESTIMATORS[name][0].kernel_rule
    torch.manual_seed(seed)
    draw = None if rule.rate is None else reference.draw_seed(x.device)
    zeros, constant = (zero, 0.0) if isinstance(zero, Tensor) else (None, zero)
    arguments = (scale, zeros, codes.lo, codes.hi, rule.strength, rule.rate, draw)
    numbers = (constant, axis, count, fused.RULES[rule.name], rule.replaced_only)
    y = gpu.forward(x, *arguments, *numbers)
    grads = gpu.backward(g, x, *arguments, *numbers)
    torch.manual_seed(seed)
    plain = reference.fake_quantize(x, scale, zero, codes.lo, codes.hi, ESTIMATORS[name][0], axis, count)
    # The interpreter cuts bfloat16 off where GPUs round it (`test_gpu.py` looks at their code).
    last_bit = 2.0**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y, plain.detach(), rtol=last_bit, atol=0, equal_nan=True)
    assert y.stride() == x.stride()
    want = gradients_in_float64(x, scale, zero, codes, name, g, seed, axis, count)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}[dtype]
    for i, (got, right) in enumerate(zip(grads, want, strict=True)):
        if got is None:
            assert zeros is None
            continue
        finite = right.isfinite()
        atol = 1e-6 if i == 0 else 255 * rtol / 10 * x.numel() ** 0.5
        torch.testing.assert_close(got.double()[finite], right[finite], rtol=rtol, atol=atol)
        assert not bool((got.isfinite() & right.isnan()).any())


@pytest.mark.parametrize(("shape", "axis"), [((4_200,), 0), ((2, 3, 2_200), 1), ((20, 9), 0)])
def test_several_programs_a_row(shape, axis, monkeypatch):
    """Rows longer than a block, and more parts than one pass over them takes."""
    monkeypatch.setattr(gpu, "LARGEST_BLOCK", 64)
    monkeypatch.setattr(gpu, "PARTS_A_PASS", 64)
    x, g, codes = torch.randn(shape), torch.randn(shape), code_range(4, True)
    channels = 1 if len(shape) == 1 else shape[axis]
    scale, zeros = torch.rand(channels) + 0.1, torch.randn(channels)
    arguments = (scale, zeros, codes.lo, codes.hi, None, None, None, 0.0, axis, 11, 0, False)
    grads = gpu.backward(g, x, *arguments)
    want = gradients_in_float64(x, scale, zeros, codes, "clipped_ste", g, 0, axis, 11)
    for got, right in zip(grads, want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_the_self_check_sees_a_wrong_gradient(monkeypatch):
    assert gpu.self_check(torch.device("cpu")) is None
    right = gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda g, *arguments: right(2 * g, *arguments))
    assert gpu.self_check(torch.device("cpu")) == "its Triton kernels give other numbers"
