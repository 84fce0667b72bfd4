"""The lean copy is the same function, with fewer norms, whatever the network does with its convolutions."""

import copy

import pytest
import torch
from torch import nn

from bitwright.methods.lean import AddInPlace, ReLUInPlace, lean_copy
from methods.nets import data, float_net


def logits(model, x):
    with torch.no_grad():
        return [model(x)]


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def trained(net):
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval().double()


class Twice(nn.Module):
    """A convolution whose output is normalised, and used without the norm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Shared(nn.Module):
    """One convolution before two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.a(self.conv(x)) - self.b(self.conv(x.flip(-1)))


def preactivated():
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=True), nn.ReLU(), nn.BatchNorm2d(4))


@pytest.mark.parametrize(("build", "left"), [(float_net, 0), (Twice, 1), (Shared, 2), (preactivated, 2)])
def test_norms_are_folded_where_that_changes_nothing(build, left):
    net, x = trained(build()), data()[0].double()
    before = copy.deepcopy(net.state_dict())
    lean = lean_copy(net, x, logits)
    assert norms(lean) == left
    torch.testing.assert_close(lean(x), net(x), rtol=1e-9, atol=1e-11)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not {p.data_ptr() for p in lean.parameters()} & {p.data_ptr() for p in net.parameters()}
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(m(v).square().sum(), v)[0] for m, v in zip((lean, net), inputs, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)
    assert not any(p.requires_grad for p in lean.parameters())


def test_an_output_that_must_stay_is_looked_at():
    net, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), data()[0].double()
    lean = lean_copy(net, x, lambda model, x: [model[0](x), model(x)])
    assert norms(lean) == 1


def test_a_wrapped_network_stays_what_its_owner_made_it():
    net = torch.compile(float_net(), backend="eager")
    assert lean_copy(net, data()[0], logits) is net


class Late(nn.Module):
    """Relu of a convolution's output, which is used again: `read` says how."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.relu, self.read = nn.Conv2d(3, 5, 3), nn.ReLU(), read

    def forward(self, x):
        return self.read(self.conv(x), self.relu)


def written_over(model):
    return sum(type(m) in (ReLUInPlace, AddInPlace) for m in model.modules())


def test_relu_and_sums_behind_convolutions_write_over_their_input():
    net, x = trained(float_net()), data()[0].double()
    lean = lean_copy(net, x, logits)
    assert written_over(lean) == 10  # the stem's relu; two relus and a sum in each of three blocks
    seen = []
    handle = lean.layer1[0].relu1.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    kept = x.clone()
    lean(x)
    handle.remove()
    assert seen[0][0].data_ptr() == seen[0][1].data_ptr()
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda y, relu: relu(y), 1),
        (lambda y, relu: relu(y) + y, 0),  # another value
        (lambda y, relu: y * y + relu(y), 0),  # no gradient: the product needs what was there
        (lambda y, relu: relu(y * 1), 0),  # not the convolution's output itself
        (lambda y, relu: relu(relu(y)), 0),
    ],
)
def test_nothing_is_written_over_that_is_read_again(read, count):
    net, x = Late(read).eval().double(), data()[0].double()
    lean = lean_copy(net, x, logits)
    assert written_over(lean) == count
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(m(v).square().sum(), v)[0] for m, v in zip((lean, net), inputs, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_a_sum_that_needs_more_room_is_written_elsewhere():
    a, b = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 4, 4)
    assert torch.equal(AddInPlace()(a, b), a + b)
    wide = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(AddInPlace()(b, wide), b + wide)


def test_the_gradient_of_relu_takes_the_layout_of_its_values():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ReLUInPlace()(x * 1.0)
    seen = []
    y.register_hook(lambda g: seen.append(g))
    g = torch.randn(2, 3, 4, 4)
    y.backward(g)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.grad, g * (x > 0))
