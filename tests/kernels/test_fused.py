"""The fused CPU kernels against the reference: values to the last bit, gradients to rounding."""

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bitwright as bw
from bitwright import kernels
from bitwright.estimators import DSQ, EWGS, PEGE, STE, ClippedSTE
from bitwright.grids import code_range
from bitwright.kernels import reference
from bitwright.kernels.reference import draw_seed, random_mask

needs_compiler = pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")

# name: (estimator in training mode, gradient of v for the gradient g of k, error e on [0, 1] and clipped value c)
ESTIMATORS = {
    "ste": (STE(), lambda g, e, c: g),
    "clipped_ste": (ClippedSTE(), lambda g, e, c: g),
    "ewgs": (EWGS(0.25), lambda g, e, c: g + 0.25 * g.abs() * e),
    "dsq": (DSQ(0.25), lambda g, e, c: g * slope(c, 0.25)),
}
for form in ("scalar", "elementwise", "constant"):
    pull = {
        "scalar": lambda g, e, c: g + 0.5 * g.abs().mean() * e,
        "elementwise": lambda g, e, c: g + 0.5 * g.abs() * e,
        "constant": lambda g, e, c, width=None: g + 0.5 * e / width,
    }[form]
    for rate in (0.0, 0.375, 1.0):
        for variant in ("everywhere", "replaced"):
            ESTIMATORS[f"pege {form} {rate} {variant}"] = (PEGE(form, 0.5, variant, rate=rate), pull)


def slope(c, alpha):
    """Derivative of DSQ's staircase, from its definition."""
    steep = math.log(2 / alpha - 1)
    return 0.5 * steep / (1 - alpha) / torch.cosh(steep * (c - c.floor() - 0.5)) ** 2


def gradients_in_float64(x, scale, zero, codes, name, g, seed, axis, count):
    """(dx, dscale, dzero) by the formulas in float64; only which code, and inside or not, is decided in float32."""
    rule = ESTIMATORS[name][1]
    view = [1] * x.ndim
    view[axis] = -1
    s32 = (scale.abs() + 1e-12 if count else scale).view(view)
    z32 = zero.view(view) if isinstance(zero, Tensor) else torch.tensor(zero)
    lo, hi = codes.lo.item(), codes.hi.item()
    v = x.float() / s32 + z32
    inside = (v >= lo) & (v <= hi)
    c = v.clamp(lo, hi).double()
    k = c.round()
    if name.startswith("pege"):
        torch.manual_seed(seed)
        k = torch.where(random_mask(x, ESTIMATORS[name][0].rate, draw_seed(x.device)), k, c)
    s, z, g = s32.double(), z32.double(), g.double()
    e = c - (k if "replaced" in name else c.round())
    width = {"width": hi - lo} if "constant" in name else {}
    gv = torch.where(inside, rule(g * s, e / (hi - lo), c, **width), 0.0)  # gradient of v, in units of codes
    per_scale = lambda t: t.sum_to_size(s.shape) if s.numel() > 1 else t.sum().reshape(s.shape)  # noqa: E731
    dscale = per_scale(g * (k - z) - gv / s * (c - z)).view(-1)
    if count:
        dscale = dscale * scale.sign() / math.sqrt(count * hi)
    return (g if name == "ste" else gv / s), dscale, per_scale(gv - g * s).view(-1)


def make_tensor(shape, layout, special, dtype, rng):
    """A tensor of `shape` laid out as asked, with ties and clip edges, and NaN, infinities, subnormals if `special`."""
    x = torch.randn(shape, generator=rng) * 2
    flat = x.view(-1)
    third = x.numel() // 3
    flat[:third] = torch.randint(-20, 20, (third,), generator=rng) * 0.125
    if special:
        odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-42, -1e-42, -0.0, 3e38])
        at = torch.randint(0, x.numel(), (len(odd),), generator=rng)
        flat[at] = odd
    x = x.to(dtype)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "strided"]),
    special=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    learned=st.booleans(),
    offset=st.booleans(),
    name=st.sampled_from(sorted(ESTIMATORS)),
)
def test_fuzz(device, seed, shape, layout, special, dtype, bits, signed, axis, learned, offset, name):
    """Every home of the kernels: values equal the reference's to the last bit, gradients the formulas to rounding."""
    rng = torch.Generator().manual_seed(seed)
    axis = None if axis == 1 and len(shape) == 1 else axis
    x = make_tensor(shape, layout, special, dtype, rng)
    channels = 1 if axis is None else shape[axis]
    scale = torch.rand(channels, generator=rng) + 0.05
    scale[0] = 0.25
    if learned:
        scale[-1] *= -1  # an optimizer may have pushed a parameter through zero
    zero = torch.randn(channels, generator=rng) if offset else code_range(bits, signed).zero
    g = torch.randn(shape, generator=rng).to(dtype)
    codes = code_range(bits, signed)
    estimator, axis, count = ESTIMATORS[name][0], axis or 0, 7 if learned else 0

    def run(home, x, scale, zero):
        at = dict(device=device)
        torch.manual_seed(seed)
        return home(x, scale, zero, codes.lo.to(**at), codes.hi.to(**at), estimator.to(**at), axis, count)

    leaves = [t.to(device).requires_grad_() for t in (x.clone(), scale.clone(), zero) if isinstance(t, Tensor)]
    y = run(kernels.fake_quantize, *leaves, *([] if offset else [zero]))
    grads = torch.autograd.grad(y, leaves, g.to(device))
    plain = run(reference.fake_quantize, *(t.detach() for t in leaves), *([] if offset else [zero]))
    torch.testing.assert_close(y.detach(), plain, rtol=0, atol=0, equal_nan=True)
    if special and not (kernels.takes_fused(leaves[0], leaves[1], axis) and kernels.fused_available(device)):
        return  # plain torch multiplies an infinite input by its zero gradient: NaN for the scale
    want = gradients_in_float64(x, scale, zero, codes, name, g, seed, axis, count)
    rtol = 1e-5 if dtype == torch.float32 else 0.01
    for i, (got, right) in enumerate(zip(grads, want[: len(grads)], strict=True)):
        finite = right.isfinite()
        atol = 1e-6 if i == 0 else 255 * rtol / 10 * x.numel() ** 0.5  # sums of terms up to 255
        torch.testing.assert_close(got.cpu().double()[finite], right[finite], rtol=rtol, atol=atol)
        assert not bool((got.cpu().isfinite() & right.isnan()).any())


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"dsq"}))
@pytest.mark.parametrize(("axis", "learned", "offset"), [(None, True, False), (1, True, True), (-1, False, True)])
def test_what_compilers_read_is_the_same_function(name, axis, learned, offset, monkeypatch):
    """The written-out gradients against the formulas, and the values against the reference, to the last bit."""
    monkeypatch.setattr(kernels, "takes_traced", lambda rule: True)
    rng = torch.Generator().manual_seed(3)
    home: Any = kernels.fake_quantize
    for special, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        x = make_tensor((3, 4, 6, 5), "contiguous", special, dtype, rng)
        channels, codes = 1 if axis is None else x.shape[axis], code_range(4, offset)
        scale = torch.rand(channels, generator=rng) + 0.05
        zero = torch.randn(channels, generator=rng) if offset else 0.0
        g = torch.randn(x.shape, generator=rng).to(dtype)
        at, count = axis or 0, 7 if learned else 0
        leaves = [t.requires_grad_() for t in (x, scale, zero) if isinstance(t, Tensor)]
        arguments = (codes.lo, codes.hi, ESTIMATORS[name][0], at, count)
        torch.manual_seed(5)
        y = home(*leaves, *([] if offset else [zero]), *arguments)
        torch.manual_seed(5)
        plain = reference.fake_quantize(x, scale, zero, *arguments)
        torch.testing.assert_close(y, plain, rtol=0, atol=0, equal_nan=True)
        assert type(y.grad_fn).__name__ == "TracedBackward"
        grads = torch.autograd.grad(y, leaves, g)
        detached = [t.detach() if isinstance(t, Tensor) else t for t in (x, scale, zero)]
        want = gradients_in_float64(*detached, codes, name, g, 5, at, count)
        rtol = 1e-5 if dtype == torch.float32 else 0.01
        for i, (got, right) in enumerate(zip(grads, want[: len(grads)], strict=True)):
            finite = right.isfinite()
            atol = 1e-6 if i == 0 else 255 * rtol / 10 * x.numel() ** 0.5
            torch.testing.assert_close(got.double()[finite], right[finite], rtol=rtol, atol=atol)
            assert not bool((got.isfinite() & right.isnan()).any())


@needs_compiler
@pytest.mark.parametrize("name", ["clipped_ste", "pege scalar 0.375 everywhere"])
def test_many_blocks_and_threads_give_the_same_bits(name):
    x, g, codes = torch.randn(3, 70_001), torch.randn(3, 70_001), code_range(4, True)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        leaves = [x.clone().requires_grad_(), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)]
        y = kernels.fake_quantize(*leaves, 0.0, codes.lo, codes.hi, ESTIMATORS[name][0])
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    want = gradients_in_float64(x, leaves[1].detach(), 0.0, codes, name, g, 1, 0, 0)
    for got, right in zip(results[0][1:], want[:2], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-2)


def test_what_is_not_covered_goes_to_the_reference():
    scale = torch.ones(1)
    x = torch.randn(4, 4, 9)
    assert kernels.takes_fused(x, scale)
    assert kernels.takes_fused(x, torch.ones(4), axis=1)
    assert not kernels.takes_fused(x, torch.ones(9), axis=-1)
    assert not kernels.takes_fused(x[:, :2], scale)
    assert not kernels.takes_fused(x.double(), scale)
    assert not kernels.takes_fused(x[:0], scale)
    with kernels.reference_only():
        assert not kernels.takes_fused(x, scale)


def test_an_empty_tensor_stays_one():
    x = torch.empty(0, 3, requires_grad=True)
    y = kernels.fake_quantize(x, torch.ones(1), 0.0, torch.zeros(1), torch.ones(1), ClippedSTE())
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)


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
    x = torch.linspace(-2, 2, 101)
    y = kernels.fake_quantize(
        x, torch.tensor([0.3]), 0.0, torch.tensor([-8.0]), torch.tensor([7.0]), ClippedSTE()
    ).double()
    assert bare.stdout.split() == ["False", str(y.sum().item()), str(y.square().sum().item())]
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
