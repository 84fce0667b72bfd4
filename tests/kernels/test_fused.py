"""The fused CPU kernels against the reference: values to the last bit, gradients to rounding."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bitwright as bw
from bitwright import kernels
from bitwright.estimators import EWGS, STE, ClippedSTE
from bitwright.grids import code_range
from bitwright.kernels import reference

needs_compiler = pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")
ESTIMATORS = {"ste": STE(), "clipped_ste": ClippedSTE(), "ewgs": EWGS(0.3)}


def both(x: Tensor, scale: Tensor, bits: int, signed: bool, name: str, g: Tensor):
    """(y, dx, dscale) of the fused kernel, and of the float64 reference for the gradients."""
    codes = code_range(bits, signed)
    x1, s1 = x.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
    assert kernels.takes_fused(x1, s1, codes.zero, ESTIMATORS[name])
    y = kernels.fake_quantize(x1, s1, codes.zero, codes.lo, codes.hi, ESTIMATORS[name])
    dx, ds = torch.autograd.grad(y, [x1, s1], g)
    plain = reference.fake_quantize(x, scale, codes.zero, codes.lo, codes.hi, ESTIMATORS[name])
    # The same float32 decisions (which code, inside or not) followed in float64: v is computed in float32.
    v = x / scale + codes.zero
    inside = (v >= codes.lo) & (v <= codes.hi)
    c = v.clamp(codes.lo, codes.hi).double()
    k, gd = c.round(), g.double()
    gk = gd + 0.3 / (codes.hi - codes.lo) * gd.abs() * (c - k) if name == "ewgs" else gd
    gv = gk * inside
    dscale = (gd * (k - codes.zero) - gv * (c - codes.zero)).reshape(scale.numel(), -1).sum(1)
    return (y, dx, ds), (plain, gd if name == "ste" else gv, dscale)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    per_channel=st.booleans(),
    channels_last=st.booleans(),
    name=st.sampled_from(sorted(ESTIMATORS)),
)
def test_equals_reference(seed, shape, bits, signed, per_channel, channels_last, name):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) * 2
    x.view(-1)[: x.numel() // 3] = torch.randint(-20, 20, (x.numel() // 3,), generator=rng) * 0.125  # ties, edges
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = shape[0] if per_channel else 1
    scale = torch.rand(channels, generator=rng) + 0.05
    scale[0] = 0.25
    scale = scale.view(-1, *[1] * (x.ndim - 1)) if per_channel else scale
    got, want = both(x, scale, bits, signed, name, torch.randn(shape, generator=rng))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2].double().view(-1), want[2], rtol=1e-5, atol=1e-4)


@needs_compiler
def test_many_blocks_and_threads_sum_to_the_same_scale_gradient():
    x, g = torch.randn(3, 70_001), torch.randn(3, 70_001)
    scale = torch.tensor([0.1])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both(x, scale, 4, True, "clipped_ste", g)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_bfloat16_equals_reference_rounded_once():
    x = torch.randn(4, 8, 5, 5).bfloat16()
    codes, scale = code_range(4, True), torch.tensor([0.2])
    fused = kernels.fake_quantize(x, scale, 0.0, codes.lo, codes.hi, ClippedSTE())
    plain = reference.fake_quantize(x, scale, 0.0, codes.lo, codes.hi, ClippedSTE())
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, plain)


@needs_compiler
def test_special_values_as_in_the_reference():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, -0.0, 0.5, 1.5, 2.5, -0.5])
    codes, scale = code_range(4, True), torch.ones(1)
    fused = kernels.fake_quantize(x, scale, 0.0, codes.lo, codes.hi, ClippedSTE())
    plain = reference.fake_quantize(x, scale, 0.0, codes.lo, codes.hi, ClippedSTE())
    torch.testing.assert_close(fused, plain, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_covered_goes_to_the_reference():
    scale = torch.ones(1)
    x = torch.randn(4, 4)
    assert kernels.takes_fused(x, scale, 0.0, ClippedSTE())
    assert not kernels.takes_fused(x.t()[:, :2], scale, 0.0, ClippedSTE())
    assert not kernels.takes_fused(x.double(), scale, 0.0, ClippedSTE())
    assert not kernels.takes_fused(x[:0], scale, 0.0, ClippedSTE())
    assert not kernels.takes_fused(x, torch.ones(1, 4), 0.0, ClippedSTE())
    with kernels.reference_only():
        assert not kernels.takes_fused(x, scale, 0.0, ClippedSTE())


def test_reference_only_gives_second_derivatives():
    x, scale = torch.randn(5, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    codes = code_range(4, True)
    with kernels.reference_only():
        y = kernels.fake_quantize(x, scale, 0.0, codes.lo, codes.hi, ClippedSTE())
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


def test_without_a_compiler_the_numbers_are_the_same(tmp_path):
    script = (
        "import torch, bitwright.kernels as k\n"
        "from bitwright.estimators import ClippedSTE\n"
        "x = torch.linspace(-2, 2, 101)\n"
        "y = k.fake_quantize(x, torch.tensor([0.3]), 0.0, torch.tensor([-8.]), torch.tensor([7.]), ClippedSTE())\n"
        "print(k.fused_available(), y.double().sum().item(), y.double().square().sum().item())\n"
    )
    here = {**os.environ, "BITWRIGHT_CACHE": str(tmp_path), "CC": "no-such-compiler"}
    bare = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=here, check=True)
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert bare.stdout.split()[0] == "False"
    assert bare.stdout.split()[1:] == full.stdout.split()[1:]
    assert "fused kernels are off" in bare.stderr
    assert bare.stderr.count("fused kernels are off") == 1


@needs_compiler
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_layers_save_no_quantized_copy_and_get_the_same_gradients(kind):
    torch.manual_seed(0)
    body = torch.nn.Conv2d(6, 6, 3, padding=1) if kind == "conv" else torch.nn.Linear(6, 6)
    net = torch.nn.Sequential(torch.nn.ReLU(), body)
    x = torch.randn(3, 6, 8, 6)
    bw.prepare(net, [bw.Rule(match="*", weight={"bits": 3}, input={"bits": 3, "learn": True})])
    bw.calibrate(net, [x])

    def gradients_and_saved():
        stored: set[int] = set()

        def pack(t):
            stored.add(t.untyped_storage().data_ptr())
            return t

        inputs = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(inputs)
        own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
        big = {p for p in stored - own}
        out.square().sum().backward()
        grads = [p.grad.clone() for p in net.parameters()] + [inputs.grad]
        net.zero_grad()
        return grads, len(big)

    with kernels.reference_only():
        plain, many = gradients_and_saved()
    lean, few = gradients_and_saved()
    assert few < many
    for a, b in zip(lean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # An exact recomputation: with the mechanism off, the gradients are the same to the last bit.
    real = kernels.sources.remember
    try:
        kernels.remember = lambda y, source: y
        stored, more = gradients_and_saved()
    finally:
        kernels.remember = real
    assert more > few
    assert all(torch.equal(a, b) for a, b in zip(lean, stored, strict=True))
