import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright import GAQAT, SAQ, Batch, quantizers
from bitwright.methods.two_pass import TwoPass, perturbations
from methods.nets import data, float_net, make_step, quantized


@given(st.integers(0, 2**31), st.floats(0.0, 10.0), st.integers(1, 4))
def test_all_perturbations_together_have_the_length_rho(seed, rho, count):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(3, i + 1, generator=generator, dtype=torch.float64) for i in range(count)]
    moves = perturbations(gradients, rho)
    assert torch.cat([m.flatten() for m in moves]).norm().item() == pytest.approx(rho, rel=1e-9, abs=1e-12)
    assert all((m * g >= 0).all() for m, g in zip(moves, gradients, strict=True))


def test_without_any_gradient_nothing_moves():
    assert torch.equal(perturbations([torch.zeros(3)], 1.0)[0], torch.zeros(3))


def learned(model):
    return [p for q in quantizers(model).values() for p in q.parameters() if p.requires_grad]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_further_gradients_are_those_of_the_plain_loss(accumulate):
    model = quantized(float_net(), bits=3)
    batch = Batch(*data())
    scales = learned(model)
    step = make_step(model, accumulate=accumulate)
    step.batch = batch
    got, rise = TwoPass(model, "test").backward(step, 0.5, scales)
    plain = quantized(float_net(), bits=3)
    own = make_step(plain, accumulate=accumulate)
    own.batch = batch
    own.default_backward()
    for g, p in zip(got, learned(plain), strict=True):
        torch.testing.assert_close(g, p.grad)
    assert rise > 0
    assert torch.equal(step.result.loss, own.result.loss)


@pytest.mark.parametrize("method", [SAQ, GAQAT])
def test_a_part_of_the_network_may_be_frozen_and_thawed_between_steps(method):
    model = quantized(float_net(), bits=3)
    step = make_step(model, [method(model, rho=0.2)])
    backbone = [p for n, p in model.named_parameters() if not n.startswith("fc") and p.requires_grad]
    for p in backbone:
        p.requires_grad_(False)
    before = [p.clone() for p in backbone]
    step(*data())
    assert all(torch.equal(p, q) for p, q in zip(backbone, before, strict=True))
    for p in backbone:
        p.requires_grad_(True)
    step(*data())
    assert not any(torch.equal(p, q) for p, q in zip(backbone, before, strict=True) if p.ndim == 4)
