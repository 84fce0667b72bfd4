"""Deferred GELU in models: whatever reads it, values and gradients are those of torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright import kernels
from bitwright.kernels.deferred import Deferred
from bitwright.layers import QuantGELU
from saved import kept_bytes

pytestmark = pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")

# name: what a network makes of (itself, t = GELU's output, x = a tensor before it)
READERS = {
    "quantizer": lambda net, t, x: net.a(t),
    "two quantizers": lambda net, t, x: net.a(t) + net.b(t),
    "quantizer, then residual": lambda net, t, x: net.a(t) + t,
    "residual, then quantizer": lambda net, t, x: t * 2 + net.a(t),
    "sum": lambda net, t, x: net.a(t + x),
    "sum in place": lambda net, t, x: net.a(t.add_(x)),
    "relu": lambda net, t, x: net.a(F.relu(t)),
    "relu in place": lambda net, t, x: net.a(F.relu_(t)),
    "dropout that is off": lambda net, t, x: net.a(F.dropout(t, 0.0, True)),
    "view": lambda net, t, x: net.a(t.flatten(1).view(t.shape)),
    "in place afterwards": lambda net, t, x: net.a(t.mul_(2)),
    "nobody": lambda net, t, x: net.a(x) + 0 * t,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.GELU()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reader = "two quantizers"

    def forward(self, x):
        first = self.first(x)
        return READERS[self.reader](self, self.act(first), first)


def twins(reader):
    """A prepared network in training, and its copy with torch's GELU."""
    torch.manual_seed(0)
    x = torch.randn(4, 7, 6)
    net = bw.calibrate(bw.prepare(Net(), bw.rules("w4a4", ends=None)), [x]).train()
    net.reader = reader
    plain = copy.deepcopy(net)
    plain.act.__class__ = nn.GELU
    return net, plain, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gets_what_torch_gives(reader, dtype):
    net, plain, x = twins(reader)
    assert isinstance(net.act(net.first(x)), Deferred)
    results = []
    for which in (net, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = which(x)
        y.float().square().sum().backward()
        results.append((y.detach(), *(p.grad for p in which.parameters())))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            atol = tolerance * float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("reader", READERS)
def test_without_gradients_too(reader):
    net, plain, x = twins(reader)
    with torch.no_grad():
        assert isinstance(net.act(net.first(x)), Deferred)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)


def test_hooks_on_the_tensor_see_its_whole_gradient():
    net, plain, x = twins("quantizer")

    def gradient(net):
        t = net.act(net.first(x))
        t.retain_grad()
        (net.a(t) + t).square().sum().backward()
        return t.grad

    torch.testing.assert_close(gradient(net), gradient(plain), rtol=1e-4, atol=1e-3)


def test_a_change_in_place_before_the_reading_is_refused():
    net, _, x = twins("quantizer")
    first = net.first(x)
    t = net.act(first)
    first.mul_(2)
    with pytest.raises(bw.BitwrightError, match="changed in place"):
        net.a(t)


def test_only_exact_gelu_in_eager_training_defers():
    net, _, x = twins("quantizer")
    first = net.first(x)
    assert type(net.act(first.detach())) is torch.Tensor
    assert type(net.act(first[..., ::2])) is torch.Tensor
    with kernels.reference_only():
        assert type(net.act(first)) is torch.Tensor
    with torch.inference_mode():
        assert type(net.act(net.first(x))) is torch.Tensor
    net.act.approximate = "tanh"
    assert torch.equal(net.act(first), F.gelu(first, approximate="tanh"))
    net.act.approximate = "none"
    assert type(net.eval().act(first)) is torch.Tensor
    assert type(torch.compile(net.train(), backend="eager", fullgraph=True)(x)) is torch.Tensor


def test_what_waits_is_not_kept():
    net, plain, x = twins("quantizer")

    assert kept_bytes(plain, x) - kept_bytes(net, x) >= 4 * 7 * 8 * 4
    assert type(net.act) is QuantGELU
    assert isinstance(copy.deepcopy(net).act, nn.GELU)
