"""Layers on integers: exact sums, the float layer's gradients, and the float layer wherever integers do not do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fused import needs_compiler
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitwright as bw
from bitwright.kernels import halves, integer
from bitwright.kernels.integer import float_products
from saved import kept_bytes

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not integer.multiplies_bytes(), reason="this processor does not multiply bytes"),
]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(integer, "SMALLEST", 0)
    monkeypatch.setattr(integer, "FEWEST", 0)
    monkeypatch.setattr(integer, "DENSEST", 0)


def prepared(layer, x, bits="w4a4", **options):
    """`layer` alone, quantized, in training mode."""
    model = bw.prepare(nn.Sequential(layer), bw.rules(bits, ends=None, **options))
    return bw.calibrate(model, [x]).train()


def on_integers(y):
    """Whether one of the two functions made `y`, or what it is a view of."""
    node = y.grad_fn
    node = node.next_functions[0][0] if type(node).__name__ == "ViewBackward0" else node
    return type(node).__name__ in ("ConvolutionBackward", "LinearBackward")


def results(model, x, g=None):
    """Output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x)
    return y, torch.autograd.grad(y, leaves, torch.ones_like(y) if g is None else g)


def exact(layer, x, function):
    """`function(codes of x, codes of the weight)` in float64, times both steps, plus the bias; and its largest part."""
    left, right = layer.input_quantizer.affine(), layer.weight_quantizer.affine(layer.weight)
    numbers = layer.input_quantizer.integer_codes(x) - left.zero.double()
    weights = layer.weight_quantizer.integer_codes(layer.weight) - right.zero.double()
    step = left.scale.double() * right.scale.double()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return function(numbers, weights), step, bias


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    bits=st.sampled_from(["w1a1", "w2a2", "w3a4", "w4a4", "w8a8"]),
    last=st.booleans(),
    threads=st.integers(1, 2),
)
def test_convolutions(seed, channels, size, kernel, stride, padding, bias, bits, last, threads):
    fits = [n + 2 * p >= k for n, k, p in zip(size, kernel, padding, strict=True)]
    assume(all(fits))
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    conv = nn.Conv2d(*channels, kernel, stride, padding, bias=bias)
    x = torch.rand(2, channels[0], *size)
    if last:
        conv, x = conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    model = prepared(conv, x, bits)
    y, grads = results(model, x)
    with float_products():
        wanted, wanted_grads = results(model, x)
    assert on_integers(y) == integer.trusts(x, kernel, stride, padding, (1, 1))
    assert not on_integers(wanted)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=layout) == wanted.is_contiguous(memory_format=layout)
    if not on_integers(y):
        return
    sums, step, added = exact(conv, x, lambda a, b: F.conv2d(a, b, None, stride, padding))
    parts = sums * step.view(-1, 1, 1), torch.as_tensor(added).view(-1, 1, 1)
    assert bool(((y - sum(parts)).abs() <= 2**-22 * (parts[0].abs() + parts[1].abs()) + 1e-30).all())
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * max(float(want.abs().max()), 1.0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    bits=st.sampled_from(["w1a1", "w2a2", "w3a4", "w4a4", "w8a8"]),
    signed=st.booleans(),
    split=st.booleans(),
)
def test_linear_layers(seed, shape, sizes, bias, bits, signed, split):
    torch.manual_seed(seed)
    linear = nn.Linear(*sizes, bias=bias)
    x = torch.randn(*shape, sizes[0]) if signed else torch.rand(*shape, sizes[0])
    model = prepared(linear, x, bits)
    g = torch.randn(*shape, sizes[1])
    with pytest.MonkeyPatch.context() as patch:
        if not split:
            patch.setattr(halves, "available", lambda: False)
        y, grads = results(model, x, g)
    with float_products():
        _, wanted_grads = results(model, x, g)
    assert on_integers(y)
    sums, step, added = exact(linear, x, F.linear)
    parts = sums * step, torch.as_tensor(added)
    assert bool(((y - sum(parts)).abs() <= 2**-22 * (parts[0].abs() + parts[1].abs()) + 1e-30).all())
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(float(want.abs().max()), 1.0))


class Net(nn.Module):
    """Norms, relu, GELU, a residual sum; an image, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.wide, self.gelu, self.head = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.norm_b(self.b(self.norm_a(self.a(x)).relu()))
        return self.head(self.gelu(self.wide((y + x).relu().mean((2, 3)))))


def trained_by(model, steps, seed=0):
    """The losses of some steps."""
    torch.manual_seed(seed)
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,))
    step = bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    return [float(step(x, y).loss) for _ in range(steps)]


def make_net(bits="w8a8", **options):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    return bw.calibrate(bw.prepare(Net(), bw.rules(bits, **options)), [x]).train()


def test_a_network_trains_as_on_floats():
    model = make_net()
    other = copy.deepcopy(model)
    losses = trained_by(model, 12)
    with float_products():
        wanted = trained_by(other, 12)
    assert losses != wanted  # rounding
    torch.testing.assert_close(losses, wanted, rtol=2e-2, atol=0)
    assert losses[-1] < losses[0]


def test_what_is_kept_for_the_backward_pass():
    model, x = make_net(), torch.rand(16, 3, 12, 12)
    bytes_kept = kept_bytes(model, x)
    with float_products():
        assert bytes_kept == kept_bytes(model, x)


def test_threads_change_nothing():
    losses = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        losses.append(float(make_net()(torch.ones(4, 3, 12, 12)).detach().double().sum()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_nan_reaches_the_output(kind):
    layer, x = (nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8)) if kind == "conv" else (nn.Linear(6, 4), torch.randn(3, 6))
    model = prepared(layer, x)
    x.view(-1)[3] = float("nan")
    y, grads = results(model, x)
    assert on_integers(y)
    assert bool(y.isnan().all())
    assert not bool(grads[1].isfinite().all())  # the weight's


def test_the_output_may_be_written_to():
    for layer, x in ((nn.Conv2d(3, 4, 3), torch.rand(2, 3, 8, 8)), (nn.Linear(6, 4), torch.randn(2, 3, 6))):
        y = prepared(layer, x)(x)
        assert on_integers(y)
        F.relu_(y).sum().backward()


def test_several_readers_and_several_backward_passes():
    x = torch.randn(2, 6, requires_grad=True)
    model = prepared(nn.Linear(6, 4), x.detach())
    y = model(x)
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.square().sum(), x)[0]
    assert torch.equal(first, second)


WITHOUT = {
    "evaluation": (nn.Conv2d(3, 4, 3), lambda m, x: m.eval()(x)),
    "padding by reflection": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), lambda m, x: m(x)),
    "padding by name": (nn.Conv2d(3, 4, 3, padding="same"), lambda m, x: m(x)),
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), lambda m, x: m(x)),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), lambda m, x: m(x)),
    "a checkpoint": (nn.Conv2d(3, 4, 3), lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=False)),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_where_the_layer_is_a_float_one(name):
    layer, run = WITHOUT[name]
    x = torch.rand(2, layer.in_channels, 8, 8)
    y = run(prepared(copy.deepcopy(layer), x), x)
    assert y.grad_fn is not None
    assert not on_integers(y)


def test_a_wrong_convolution_is_said_and_left_out(monkeypatch, caplog):
    x, calls = torch.rand(2, 3, 8, 8), []
    model = prepared(nn.Conv2d(3, 4, 3), x)
    with float_products():
        wanted = model(x)
    right = integer.integer_convolution

    def wrong(*arguments):
        calls.append(arguments)
        return right(*arguments).clone().index_fill_(2, torch.tensor(1), 7.0)

    monkeypatch.setattr(integer, "_judgements", {})
    monkeypatch.setattr(integer, "integer_convolution", wrong)
    for _ in range(3):
        torch.testing.assert_close(model(x), wanted)
    assert len(calls) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert "integer convolution is wrong for inputs (2, 3, 8, 8), weights (4, 3, 3, 3)" in said


def test_a_nan_is_no_judgement(monkeypatch, caplog):
    monkeypatch.setattr(integer, "_judgements", {})
    x = torch.rand(2, 3, 8, 8)
    model = prepared(nn.Conv2d(3, 4, 3), x)
    assert bool(model(x * float("nan")).isnan().all())
    assert not integer._judgements
    model(x)
    assert list(integer._judgements.values()) == [True]
    assert not caplog.records


def test_convolutions_of_signed_codes_are_float():
    x = torch.randn(2, 3, 8, 8)
    assert not on_integers(prepared(nn.Conv2d(3, 4, 3), x)(x))
    assert on_integers(prepared(nn.Linear(8, 4), x)(x))


def test_autocast_computes_in_its_type():
    x = torch.rand(2, 3, 8, 8)
    model = prepared(nn.Conv2d(3, 4, 3), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert not on_integers(y)


def test_weights_whose_codes_do_not_fit():
    x = torch.rand(2, 3, 8, 8)
    for bits, found in (("w7a8", True), ("w8a8", False)):
        model = prepared(nn.Conv2d(3, 4, 3), x, bits, grid="dorefa")
        assert on_integers(model(x)) == found


def test_somebody_who_listens_to_the_quantizer():
    x = torch.rand(2, 3, 8, 8)
    model = prepared(nn.Conv2d(3, 4, 3), x)
    seen = []
    model[0].input_quantizer.register_forward_hook(lambda module, args, y: seen.append(y.clone()) or y * 2)
    y = model(x)
    assert not on_integers(y)
    with float_products():
        assert torch.equal(y, model(x))
    assert torch.equal(*seen)


def test_small_layers_stay_float(monkeypatch):
    monkeypatch.undo()
    x = torch.rand(2, 3, 8, 8)
    assert not on_integers(prepared(nn.Conv2d(3, 4, 3), x)(x))
    x = torch.rand(16, 32, 16, 16)
    assert on_integers(prepared(nn.Conv2d(32, 32, 3), x)(x))
    x = torch.rand(64, 96, 16, 16)
    assert not on_integers(prepared(nn.Conv2d(96, 24, 1), x)(x))  # contiguous, and few multiplications an element
    assert on_integers(prepared(nn.Conv2d(96, 24, 1), x)(x.contiguous(memory_format=torch.channels_last)))
    x = torch.rand(200, 512)
    assert not on_integers(prepared(nn.Linear(512, 512), x)(x))  # few rows, and weights to pack
    x = torch.rand(600, 512)
    assert on_integers(prepared(nn.Linear(512, 512), x)(x))
