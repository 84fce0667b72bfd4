"""Deferred batch norms in models: whatever reads them, values and gradients are those of torch's batch norm."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitwright as bw
from bitwright import kernels
from bitwright.kernels.deferred import Deferred
from bitwright.layers.waiting import QuantBatchNorm2d
from saved import kept_bytes

pytestmark = pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")


class Swish(torch.autograd.Function):
    """A function of somebody else's, which takes its argument without torch's dispatch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


def relu_(x):
    F.relu_(x)
    return x


def add_to(x, y):
    x += y
    return x


# name: what a network makes of (itself, n = a batch norm's output, m = another's, x = a tensor before them)
READERS = {
    "quantizer": lambda net, n, m, x: net.a(n),
    "relu, quantizer": lambda net, n, m, x: net.a(F.relu(n)),
    "relu in place, quantizer": lambda net, n, m, x: net.a(relu_(n)),
    "method relu, quantizer": lambda net, n, m, x: net.a(n.relu()),
    "two quantizers": lambda net, n, m, x: net.a(n) + net.b(n),
    "three quantizers of relu": lambda net, n, m, x: (lambda r: net.a(r) + net.b(r) + net.a(r))(F.relu(n)),
    "norm and its relu": lambda net, n, m, x: net.a(F.relu(n)) + net.b(n),
    "sum": lambda net, n, m, x: net.a(n + x),
    "sum the other way": lambda net, n, m, x: net.a(x + n),
    "sum in place": lambda net, n, m, x: net.a(add_to(n, x)),
    "sum, relu, residual": lambda net, n, m, x: (lambda r: net.b(net.a(r) + r))(F.relu(n + x)),
    "sum, relu in place, residual": lambda net, n, m, x: (lambda r: net.a(r) + r)(relu_(add_to(n, x))),
    "sum of two norms": lambda net, n, m, x: (lambda r: net.a(r) + r)(F.relu(n + m)),
    "sum of a norm with itself": lambda net, n, m, x: net.a(n + n),
    "difference": lambda net, n, m, x: net.a(n - x),
    "weighted sum": lambda net, n, m, x: net.a(torch.add(n, x, alpha=2)),
    "broadcast sum": lambda net, n, m, x: net.a(n + x.mean((2, 3), keepdim=True)),
    "number": lambda net, n, m, x: net.a(n + 1.0),
    "residual, then quantizer": lambda net, n, m, x: (lambda r: r * 2 + net.a(r))(F.relu(n)),
    "quantizer, then residual": lambda net, n, m, x: (lambda r: (net.a(r), r * 2))(F.relu(n)),
    "pooling": lambda net, n, m, x: net.a(F.max_pool2d(F.relu(n), 3, 1, 1)),
    "relu of a sum alone": lambda net, n, m, x: F.relu(n + x),
    "relu6": lambda net, n, m, x: net.a(F.relu6(n)),
    "own function": lambda net, n, m, x: net.a(Swish.apply(n)),
    "view": lambda net, n, m, x: net.a(F.relu(n).flatten(1).view(n.shape)),
    "slice and cat": lambda net, n, m, x: net.a(torch.cat([n[:, :2], m[:, 2:]], 1)),
    "in place afterwards": lambda net, n, m, x: net.a(n.mul_(2).add_(1)),
    "split": lambda net, n, m, x: net.a(torch.cat(n.chunk(2, 1)[::-1], 1)),
    "nobody": lambda net, n, m, x: net.a(x) + 0 * m,
}


class Net(nn.Module):
    def __init__(self, reader):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.3)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.reader = reader

    def forward(self, x):
        first = self.first(x)
        made = READERS[self.reader](self, self.norm(first), self.other(self.second(x)), first)
        return sum(made) if isinstance(made, tuple) else made


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def twins(reader, seed=0, layout=torch.contiguous_format):
    """A prepared network in training, and its copy with torch's batch norms."""
    torch.manual_seed(seed)
    x = torch.randn(5, 3, 9, 9).contiguous(memory_format=layout)
    net = bw.prepare(Net("three quantizers of relu" if "relu" in reader else "two quantizers"), bw.rules("w4a4"))
    bw.calibrate(net, [x]).train().reader = reader
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if type(module) is QuantBatchNorm2d:
            module.__class__ = nn.BatchNorm2d
    return net, plain, x


def step(net, x, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = net(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gets_what_torch_gives(reader, dtype, layout):
    net, plain, x = twins(reader, layout=layout)
    waiting = net.norm(net.first(x))
    assert isinstance(waiting, Deferred)
    assert waiting.is_contiguous(memory_format=layout)
    net.load_state_dict(plain.state_dict())
    got, want = step(net, x, dtype), step(plain, x, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got, want, **tolerance)
    for (name, a), (_, b) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            # A bias before a norm has no gradient but what rounding leaves.
            rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (0.05, 0.2)
            atol += rtol * float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", READERS)
def test_without_gradients_too(reader, layout):
    net, plain, x = twins(reader, layout=layout)
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert isinstance(net.norm(net.first(x)), Deferred)
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reader", [r for r in READERS if r != "relu of a sum alone"])
def test_what_was_made_without_gradients_is_a_constant(reader):
    net, plain, x = twins(reader)
    for which in (net, plain):
        with torch.no_grad():
            first = which.first(x)
            n, m = which.norm(first), which.other(which.second(x))
        made = READERS[reader](which, n, m, first)
        (sum(made) if isinstance(made, tuple) else made).square().sum().backward()
    for (name, a), (_, b) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_relu_in_place_without_gradients_leaves_no_trace_in_what_had_them():
    net, plain, x = twins("relu, quantizer")

    def gradient(net):
        n = net.norm(net.first(x))
        with torch.no_grad():
            F.relu_(n)
            quantized = net.a(n)
        n.square().sum().backward()
        return quantized, n.detach(), net.first.weight.grad

    for got, want in zip(gradient(net), gradient(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["norm", "relu", "sum"])
def test_hooks_on_the_tensor_see_its_whole_gradient(place):
    net, plain, x = twins("quantizer")

    def gradient(net):
        seen = []
        n = net.norm(net.first(x))
        n = {"norm": n, "relu": F.relu(n), "sum": n + x[:, :1, 1:-1, 1:-1].expand(n.shape).contiguous()}[place]
        n.retain_grad()
        n.register_hook(seen.append)
        (net.a(n) * 3 + n).square().sum().backward()
        torch.testing.assert_close(seen[0], n.grad)
        return n.grad

    torch.testing.assert_close(gradient(net), gradient(plain), rtol=1e-4, atol=1e-3)


def test_forward_hooks_that_keep_the_output_get_its_values_and_gradient():
    net, plain, x = twins("relu, quantizer")

    def loss(net):
        kept = []
        handle = net.norm.register_forward_hook(lambda m, a, out: kept.append(out))
        y = net(x)
        handle.remove()
        (y.sum() + kept[0].square().mean()).backward()
        assert kept[0].detach().numpy().shape == kept[0].shape
        return kept[0].detach(), net.first.weight.grad

    for got, want in zip(loss(net), loss(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_full_backward_hooks_of_modules_run():
    net, plain, x = twins("relu, quantizer")
    seen = {}
    for which in (net, plain):
        which.norm.register_full_backward_hook(lambda m, i, o: seen.__setitem__(type(m), (i[0], o[0])))
        which(x).sum().backward()
    for got, want in zip(seen[QuantBatchNorm2d], seen[nn.BatchNorm2d], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_change_in_place_before_the_reading_is_refused():
    net, _, x = twins("quantizer")
    first = net.first(x)
    n = net.norm(first)
    first.mul_(2)
    with pytest.raises(bw.BitwrightError, match="changed in place"):
        net.a(n)
    first = net.first(x)
    n = net.norm(first) + x[:, :1, 1:-1, 1:-1].expand(5, 4, 7, 7).contiguous()
    r = F.relu(n)
    out = (r * 2).sum()
    r.mul_(-1)
    with pytest.raises((bw.BitwrightError, RuntimeError), match=r"in place|inplace"):
        out.backward()


def test_only_eager_training_defers():
    net, _, x = twins("quantizer")
    first = net.first(x)
    assert type(net.norm(first)) is Deferred
    assert type(net.norm(first.detach())) is torch.Tensor
    assert type(net.norm(first.transpose(2, 3))) is torch.Tensor
    with torch.inference_mode():
        assert type(net.norm(net.first(x))) is torch.Tensor
    with kernels.reference_only():
        assert type(net.norm(first)) is torch.Tensor
    net.eval()
    assert type(net.norm(first)) is torch.Tensor
    seen = torch.compile(net.train(), backend="eager", fullgraph=True)(x)
    assert type(seen) is torch.Tensor


class Checkpointed(nn.Module):
    """Three parts, those at `places` as gradient checkpoints; norms stand on either side of their borders."""

    def __init__(self, net, places, reentrant):
        super().__init__()
        self.parts = nn.ModuleList(
            [nn.Sequential(net.first, net.norm), nn.Sequential(nn.ReLU(), net.a, net.other), net.b]
        )
        self.places, self.reentrant = places, reentrant

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = checkpoint(part, x, use_reentrant=self.reentrant) if i in self.places else part(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradient_checkpoints_change_nothing(places, reentrant):
    net, _, x = twins("quantizer")
    plain = copy.deepcopy(net)
    x.requires_grad_()
    (Checkpointed(plain, (), reentrant)(x)).square().sum().backward()
    (Checkpointed(net, places, reentrant)(x)).square().sum().backward()
    for (name, a), (_, b) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: n + m)


def test_gradient_checkpoints_keep_their_input_alone():
    net, _, x = twins("quantizer")
    x.requires_grad_()
    inside = []
    net.a.register_forward_pre_hook(lambda m, args: inside.append(weakref.ref(args[0])))
    y = checkpoint(net, x, use_reentrant=False)
    assert y.requires_grad
    assert inside[0]() is None


def test_what_waits_keeps_no_memory():
    net, plain, x = twins("relu, quantizer")

    activation = 5 * 4 * 7 * 7 * 4
    assert kept_bytes(plain, x) - kept_bytes(net, x) >= activation


def test_copies_and_pickles_stay_and_state_is_torchs():
    net, plain, x = twins("relu, quantizer")
    assert list(net.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin.norm) is QuantBatchNorm2d
        assert torch.equal(twin(x), net(x))
    assert isinstance(net.norm, nn.BatchNorm2d)


def test_without_running_statistics_or_gain_it_is_torchs():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for options in ({"track_running_stats": False}, {"affine": False}, {"momentum": None}):
        plain = nn.BatchNorm2d(3, **options)
        ours = copy.deepcopy(plain)
        ours.__class__ = QuantBatchNorm2d
        torch.testing.assert_close(ours(x).detach(), plain(x).detach(), rtol=1e-5, atol=1e-6)
        for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)
