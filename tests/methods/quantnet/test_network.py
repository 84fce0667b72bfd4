import math

import pytest
import torch

from bitwright.methods.quantnet import MetaNetwork


def network(width=3):
    torch.manual_seed(0)
    phi = MetaNetwork(width, torch.device("cpu"))
    for leaf in phi.leaves():
        leaf.data.add_(0.3 * torch.randn_like(leaf))
    return phi


def test_it_starts_as_the_closed_form():
    phi, u = MetaNetwork(2, torch.device("cpu")), 0.7
    wanted = math.tanh(u + 0.5 * math.tanh(0.5 * u) + 0.5 * math.tanh(8.0 * u))
    assert phi(torch.tensor([u])).item() == pytest.approx(wanted, rel=1e-6)


def test_its_sign_is_that_of_the_weight():
    u = torch.linspace(-3, 3, 301)
    y = network()(u)
    assert torch.equal(y.sign(), u.sign())
    torch.testing.assert_close(y, -network()(-u))
    assert bool((y[1:] >= y[:-1]).all())


def test_values_and_gradients_are_those_of_the_formula_in_one_piece():
    phi = network(5)
    u = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    leaves = [t.detach().double().requires_grad_() for t in phi.leaves()]
    a, v, c = (t.exp() for t in leaves)
    wanted = torch.tanh(a * u + (v * torch.tanh(c * u[..., None])).sum(-1))
    found = phi(u)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    ours = torch.autograd.grad(found.square().sum(), [u, *phi.leaves()])
    theirs = torch.autograd.grad(wanted.square().sum(), [u, *leaves])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_a_state_is_restored_with_its_pending_gradient():
    phi, other = network(), MetaNetwork(3, torch.device("cpu"))
    phi(torch.randn(5)).sum().backward()
    other.load_state_dict(phi.state_dict())
    for one, two in zip(phi.leaves(), other.leaves(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one.grad, two.grad)
