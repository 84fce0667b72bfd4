"""Guides in bfloat16 beside a model in float32."""

import pytest
import torch
import torch.nn.functional as F

from bitwright import KD, BitwrightError, Relational
from bitwright.methods.base import Batch
from bitwright.methods.bwrf import BWRF
from bitwright.methods.precision import casting, guide_dtype
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def dtypes_of_convolutions(module, seen):
    """Note in `seen` the types that the convolutions of `module` put out."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _m, _a, y: seen.add(y.dtype))


def gradients(make, dtype):
    """(losses, gradients, types of the guide's convolutions) of one batch."""
    partner = float_net()
    model, seen = quantized(partner), set()
    dtypes_of_convolutions(partner, seen)
    method = make(model, partner, dtype)
    x, y = data(count=32)
    outputs = model(x)
    assert outputs.dtype == torch.float32
    losses = method.losses(Batch(x, y), outputs)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen


GUIDES = {
    "kd": lambda model, partner, dtype: KD(partner, teacher_dtype=dtype),
    "relational": lambda model, partner, dtype: Relational(model, partner, teacher_dtype=dtype),
    "bwrf": lambda model, partner, dtype: BWRF(model, partner, partner_dtype=dtype),
    "bwrf joint": lambda model, partner, dtype: BWRF(model, partner, joint=True, partner_dtype=dtype),
    "bwrf suffix": lambda model, partner, dtype: BWRF(model, partner, order="suffix", partner_dtype=dtype),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_guide_alone_computes_in_bfloat16(guide):
    exact, exact_grads, plain = gradients(GUIDES[guide], None)
    losses, grads, seen = gradients(GUIDES[guide], "bfloat16")
    assert plain == {torch.float32}
    assert torch.bfloat16 in seen
    assert losses.keys() == exact.keys()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=2e-2)
        assert loss.item() != exact[name].item()
    assert grads.keys() == exact_grads.keys()
    a, b = (torch.cat([g.flatten() for g in each.values()]) for each in (grads, exact_grads))
    assert a.dtype == torch.float32
    assert F.cosine_similarity(a, b, 0) > 0.99


def test_training_resumes_to_the_bit():
    def fresh():
        partner = float_net()
        model = quantized(partner)
        return model, make_step(model, [BWRF(model, partner, partner_dtype="bfloat16")])

    whole, step = fresh()
    run(step, 0, 4)
    assert same_state(whole, resumed(fresh, 2, 4))


@pytest.mark.parametrize("make", [GUIDES["kd"], GUIDES["bwrf"]])
@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, 16])
def test_other_types_are_refused(make, dtype):
    partner = float_net()
    with pytest.raises(BitwrightError, match=r"dtype=.* is not accepted; use bfloat16"):
        make(quantized(partner), partner, dtype)


def test_the_dtype_of_a_name():
    assert guide_dtype("bfloat16", "here") is torch.bfloat16
    assert guide_dtype(None, "here") is None


def test_autocast_around_stays_where_nothing_is_asked_for():
    with torch.autocast("cpu", dtype=torch.bfloat16), casting(torch.device("cpu"), None):
        assert torch.is_autocast_enabled("cpu")
