"""Eager quantizers dispatch few operators: a count, whatever the machine."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright import QuantizerSpec, kernels
from bitwright.grids import Shape
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
