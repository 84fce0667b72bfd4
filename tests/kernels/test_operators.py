"""Eager quantizers dispatch few operators: a count, whatever the machine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitwright as bw
from bitwright import QuantizerSpec, kernels
from bitwright.grids import Shape, code_range
from bitwright.kernels import fused
from bitwright.quantizer import Quantizer


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")
@pytest.mark.parametrize("estimator", ["clipped_ste", "ste", "ewgs", "dsq", "pege"])
@pytest.mark.parametrize("channels", [1, 6])
def test_a_learned_scale_costs_one_operator_forward_and_one_backward(estimator, channels):
    shape = Shape("weight", channels=channels, numel=6 * 50)
    quantizer = Quantizer(QuantizerSpec(bits=4, estimator=estimator), shape)
    quantizer.calibrated.fill_(True)
    quantizer.refresh()
    w = torch.randn(6, 50, requires_grad=True)
    with Names() as forward:
        y = quantizer(w)
    g = torch.ones_like(y)
    with Names() as backward:
        torch.autograd.grad(y, [w, quantizer.grid.scale], g)
    random = ["aten::randint"] if estimator == "pege" else []  # the seed of its mask
    assert forward.seen == [*random, "bitwright::fake_quantize"]
    assert [n for n in backward.seen if n != "aten::detach"] == ["bitwright::fake_quantize_backward"]


@pytest.mark.skipif(not kernels.fused_available(), reason="no C compiler on this machine")
def test_the_way_past_the_dispatcher_is_the_same_function():
    x, scale = torch.randn(5, 7, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    codes = code_range(4, True)
    arguments = (x, scale, None, codes.lo, codes.hi, None, None, None, 0.0, 0, 9, 0, False)
    direct, dispatched = fused.quantize(*arguments), torch.ops.bitwright.fake_quantize(*arguments)
    assert torch.equal(direct, dispatched)
    g = torch.randn(5, 7)
    for a, b in zip(*(torch.autograd.grad(y, (x, scale), g) for y in (direct, dispatched)), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(fused.quantize(*arguments), direct)
    first = torch.autograd.grad(fused.quantize(*arguments), x, g.requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_transforms_of_torch_func_see_plain_torch():
    """The gradient of each sample by vmap; their mean is that of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), x)
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, x, y)
    F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(each[name].mean(0), p.grad, rtol=1e-4, atol=1e-6, msg=name)
