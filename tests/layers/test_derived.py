"""Classes of the user's that derive from torch's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.layers import QuantConv2d, QuantLinear, why_not
from bitwright.rules import Rule


class Conv(nn.Conv2d):
    """A convenience: nothing of it computes."""

    def __init__(self, channels, out):
        super().__init__(channels, out, 3, padding=1)

    def area(self):
        return 9


class Scores(nn.Linear):
    """Another, with a name of its own in rules."""


class Hidden(nn.Linear):
    """Its weight is no parameter."""

    def __init__(self):
        super().__init__(4, 4)
        self.raw = nn.Parameter(self.weight.detach().clone())
        del self.weight

    @property
    def weight(self):
        return self.raw.abs()


def net():
    torch.manual_seed(0)
    return nn.Sequential(Conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Scores(4, 2))


def prepared(x):
    return bw.calibrate(bw.prepare(net(), bw.rules("w4a4", ends=None)), [x]).eval()


def test_they_compute_as_the_layers_that_they_derive_from_and_stay_what_they_are():
    x = torch.randn(4, 3, 6, 6)
    model, plain = prepared(x), net()
    plain[0].__class__, plain[5].__class__ = nn.Conv2d, nn.Linear
    bw.calibrate(bw.prepare(plain, bw.rules("w4a4", ends=None)), [x]).eval()
    assert model(x).equal(plain(x))
    for index, kinds in {0: (QuantConv2d, Conv), 5: (QuantLinear, Scores)}.items():
        assert all(isinstance(model[index], kind) for kind in kinds)
    assert model[0].area() == 9
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_they_can_be_copied_and_pickled(again):
    x = torch.randn(4, 3, 6, 6)
    model = prepared(x)
    twin = again(model)
    assert twin(x).equal(model(x))
    assert type(twin[0]) is type(model[0])


def test_rules_know_them_by_the_name_of_their_class():
    model = bw.prepare(net(), [*bw.rules("w4a4", ends=None), Rule(match="type:Scores", weight=None, input=None)])
    assert not isinstance(model[5], QuantLinear)


@pytest.mark.parametrize("target", ["onnx", "packed"])
def test_they_are_deployed(target, tmp_path):
    x = torch.randn(4, 3, 6, 6)
    model = prepared(x)
    bw.snap_biases(model, x)
    bw.export(model, tmp_path / "file", x, target=target)
    found = bw.verify(model, tmp_path / "file", [x])
    assert found.ok, found.first_difference


def test_a_refused_rule_leaves_their_class():
    model = net()
    before = [type(m) for m in model]
    with pytest.raises(bw.BitwrightError):
        bw.prepare(model, [*bw.rules("w4a4"), Rule(match="5", shares="0")])
    assert [type(m) for m in model] == before


def test_others_stay_float():
    model = bw.prepare(nn.ModuleList([nn.Linear(4, 4), Hidden()]), bw.rules("w4a4"))
    assert why_not(model[1]) == "it cannot be quantized: its class is a Linear that computes in a way of its own"
    assert type(model[1]) is Hidden


def test_a_parametrized_bias_stays_as_it_is():
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "bias", nn.Tanh())
    model = bw.prepare(nn.ModuleList([nn.Linear(4, 4), layer]), bw.rules("w4a4"))
    assert not isinstance(model[1], QuantLinear)
    assert "bias is parametrized" in why_not(model[1])
