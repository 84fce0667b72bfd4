import copy

import pytest
import torch
import torch.nn.functional as F

from bitwright import quantizers
from bitwright.batches import inputs_of
from bitwright.methods.allocation import sensitivities
from bitwright.methods.allocation.sensitivity import divergence
from methods.nets import data, float_net, quantized, same_state


def test_the_divergence_is_its_definition():
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = a.softmax(-1), b.softmax(-1)
    assert divergence(a, b).item() == pytest.approx((q * (q.log() - p.log())).sum(-1).mean().item())
    assert divergence(a, a).item() == 0.0


def test_one_place_at_a_time_is_quantized_and_nothing_stays():
    model = quantized(float_net(), bits=8).eval()
    x, _ = data(count=16)
    before = copy.deepcopy(model)
    every = quantizers(model)
    places = [[q] for q in every.values()]
    found = sensitivities(model, inputs_of(x, "test"), places, [2, 8])
    assert same_state(model, before)
    assert found.shape == (len(every), 2)
    assert (found[:, 0] > found[:, 1]).all()
    # The same by hand, for the weight of one layer: a float network with that weight replaced.
    name = "layer1.0.conv1"
    layer = dict(before.named_modules())[name]
    layer.weight_quantizer.set_bits(2)
    plain = float_net()
    reference = plain(x)
    with torch.no_grad():
        dict(plain.named_modules())[name].weight.copy_(layer.weight_quantizer(layer.weight))
    p, q = F.log_softmax(plain(x), -1), F.log_softmax(reference, -1)
    expected = (q.exp() * (q - p)).sum(-1).mean().item()
    row = list(every).index(f"{name}.weight_quantizer")
    assert found[row, 0].item() == pytest.approx(expected, rel=1e-3)


def test_a_failing_pass_leaves_no_quantizer_bypassed():
    model = quantized(float_net(), bits=8).eval()
    with pytest.raises(RuntimeError):
        sensitivities(model, inputs_of(torch.zeros(2, 7, 8, 8), "test"), [[q] for q in quantizers(model).values()], [2])
    assert not any(q.bypass for q in quantizers(model).values())
