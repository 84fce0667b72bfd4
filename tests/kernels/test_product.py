"""Linear layers by oneDNN: torch's function up to rounding, once and twice differentiated."""

import pytest
import torch
import torch.nn.functional as F

from bitwright.kernels import product

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    monkeypatch.setattr(product, "slow_mkl", lambda: True)


def operands(shape, bias):
    torch.manual_seed(0)
    x, w = torch.randn(*shape, 96), torch.randn(80, 96)
    return [x, w, torch.randn(80) if bias else None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 40), (2, 3, 17)])
def test_values_and_gradients(shape, bias):
    results = []
    for function, dtype in ((product.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in operands(shape, bias)]
        assert product.takes(*leaves[:2]) == (dtype == torch.float32)
        y = function(*leaves)
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        wanted = [t for t in leaves if t is not None]
        results.append([y, *torch.autograd.grad((y * weights).sum(), wanted)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(64,), (3, 40)])
def test_the_output_may_be_written_to(shape):
    results = []
    for function in (product.linear, F.linear):
        x, w, b = (t.requires_grad_() for t in operands(shape, True))
        y = F.relu_(function(x, w, b))
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, w, b))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_strided_operands():
    x, w, _ = operands((64,), False)
    wide = torch.stack([x, x], 1).requires_grad_()
    y = product.linear(wide[:, 0], w.t().contiguous().t(), None)
    torch.testing.assert_close(y, F.linear(x, w), rtol=1e-5, atol=1e-4)
    (g,) = torch.autograd.grad(y.sum(), wide)
    assert bool((g[:, 1] == 0).all())


def test_second_derivatives():
    results = []
    for function in (product.linear, F.linear):
        x, w, b = (t.requires_grad_() for t in operands((64,), True))
        first = torch.autograd.grad(function(x, w, b).square().sum(), (x, w), create_graph=True)
        results.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, w, b)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_frozen_operands_have_no_gradient():
    x, w, b = operands((64,), True)
    product.linear(x, w.requires_grad_(), b).sum().backward()
    assert w.grad is not None
    assert x.grad is b.grad is None


def test_where_it_is_torchs():
    x, w, _ = (None if t is None else t.requires_grad_() for t in operands((64,), False))
    assert product.takes(x, w)
    assert not product.takes(x[:2], w)
    assert not product.takes(x.bfloat16(), w.bfloat16())
    with torch.no_grad():
        assert not product.takes(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not product.takes(x, w)
    compiled = torch.compile(lambda x: product.linear(x, w, None), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, w))
