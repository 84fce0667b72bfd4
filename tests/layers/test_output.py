"""Output quantizers: a child and a hook, on any module, through copies, pickles, compilers and exporters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.rules import Rule

SPEC = bw.QuantizerSpec(bits=3)


def net() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(block, nn.Identity(), nn.Flatten(), nn.Linear(16, 3))


def prepared() -> nn.Module:
    model = bw.prepare(net(), [*bw.rules("w4a4"), Rule(match=("0.1", "1"), output=SPEC)])
    return bw.calibrate(model, [torch.randn(32, 2, 2, 2)]).eval()


def test_the_output_is_on_the_grid_and_signedness_comes_from_data():
    model, x = prepared(), torch.randn(8, 2, 2, 2)
    norm = model[0][1]
    with torch.no_grad():
        y = norm(model[0][0](x))
        scale = norm.output_quantizer.affine().scale
        float_norm = copy.deepcopy(norm)
        float_norm._forward_hooks.clear()
        expected = (float_norm(model[0][0](x)) / scale).round().clamp(-4, 3) * scale
    assert torch.equal(y, expected)
    signed = {r.name: r.signed for r in bw.describe(model) if "output" in r.name}
    assert signed == {"0.1.output_quantizer": True, "1.output_quantizer": False}
    assert {r.layer for r in bw.describe(model) if "output" in r.name} == {"BatchNorm2d", "Identity"}
    assert bw.coverage(model, x).complete


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(clone):
    model, x = prepared(), torch.randn(8, 2, 2, 2)
    twin = clone(model)
    assert torch.equal(twin(x), model(x))
    before = model(x)
    twin[1].output_quantizer.set_bits(1)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


def test_compilers_and_exporters_see_it():
    model, x = prepared(), torch.randn(8, 2, 2, 2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), model(x))
        for strict in (False, True):
            program = torch.export.export(model, (x,), strict=strict).module()
            assert torch.equal(program(x), model(x))


def test_a_float_checkpoint_loads_with_only_quantizer_keys_missing():
    state = net().state_dict()
    missing, unexpected = prepared().load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("_quantizer." in key for key in missing)
    assert {k.split(".output_quantizer")[0] for k in missing if ".output_quantizer." in k} == {"0.1", "1"}


def test_gradients_reach_its_scale_and_split_parameters_knows_it():
    model = prepared().train()
    model(torch.randn(8, 2, 2, 2)).square().sum().backward()
    scale = model[1].output_quantizer.grid.scale
    assert float(scale.grad.abs()) > 0
    assert any(p is scale for p in bw.split_parameters(model)[1])


def test_what_is_added_in_place_afterwards_keeps_its_gradient():
    """A model may add to the quantized tensor in place; the weight gradient behind must see the sum."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            y += x
            return self.second(y)

    rules = [Rule(match="*", weight=SPEC), Rule(match="first", output=SPEC)]
    x = torch.randn(5, 3)
    model = bw.calibrate(bw.prepare(Net(), rules), [x])
    model(x).sum().backward()
    y = (model.first(x) + x).detach()
    expected = y.sum(0).expand(3, 3)
    inside = model.second.weight_quantizer.affine(model.second.weight)
    steps = model.second.weight / inside.scale[:, None]
    kept = (steps >= inside.lo) & (steps <= inside.hi)
    assert torch.allclose(model.second.weight.grad, torch.where(kept, expected, 0.0), atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(match="0", output=SPEC), "0' is a Sequential; for the layers inside it write '0.\\*'"),
        (Rule(match="9", output=SPEC), "names no module|names no layer"),
        (Rule(match="1", output=bw.QuantizerSpec(bits=8, per_channel=True)), "1: runtimes take one scale"),
        (Rule(match="1", output=bw.QuantizerSpec(bits=8, estimator="x")), "1: estimator: 'x'"),
    ],
)
def test_a_refusal_leaves_no_hook_behind(rule, message):
    model = net()
    keys = list(model.state_dict())
    with pytest.raises(bw.BitwrightError, match=message) as caught:
        bw.prepare(model, [Rule(match="0.1", output=SPEC), *bw.rules("w4a4"), rule])
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())


def test_a_module_with_several_outputs_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(nn.Linear(2, 2), Pair())
    bw.prepare(model, [*bw.rules("w4a4"), Rule(match="1", output=SPEC)])
    with pytest.raises(bw.BitwrightError, match="the output of a Pair is a tuple"):
        bw.calibrate(model, [torch.randn(2, 2)])


def test_none_takes_it_away_again():
    model = bw.prepare(net(), [*bw.rules("w4a4"), Rule(match="1", output=SPEC), Rule(match="1", output=None)])
    assert not any("output" in name for name in bw.quantizers(model))
