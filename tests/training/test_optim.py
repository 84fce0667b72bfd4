import math

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.training.ema import Ema
from bitwright.training.optim import lr_factor, make_optimizer, parameter_groups, set_lr
from bitwright.training.recipe import OptimizerSection


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    bw.prepare(net, bw.rules("w4a4"))
    return bw.calibrate(net, [torch.rand(8, 1, 4, 4)])


def test_grid_parameters_have_their_own_rate_and_no_decay(model):
    options = OptimizerSection(lr=0.1, weight_decay=0.5, quantizer_lr=0.01)
    weights, grid = parameter_groups(model, options)
    expected_weights, expected_grid = bw.split_parameters(model)
    assert {id(p) for p in weights["params"]} == {id(p) for p in expected_weights}
    assert {id(p) for p in grid["params"]} == {id(p) for p in expected_grid}
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.5)
    assert (grid["lr"], grid["weight_decay"]) == (0.01, 0.0)


def test_grid_rate_is_the_common_one_by_default(model):
    assert [g["lr"] for g in parameter_groups(model, OptimizerSection(lr=0.1))] == [0.1, 0.1]


def test_norms_and_biases_can_be_spared_the_decay(model):
    decayed, spared, _ = parameter_groups(model, OptimizerSection(weight_decay=0.5, decay_norms=False))
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(bw.split_parameters(model)[0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_trainable_parameter_is_in_exactly_one_group(model, name):
    optimizer = make_optimizer(model, OptimizerSection(name=name, decay_norms=False))
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_momentum_zero_is_plain_gradient_descent(model):
    optimizer = make_optimizer(model, OptimizerSection(momentum=0.0))
    assert not any(g["nesterov"] for g in optimizer.param_groups)


def test_learning_rate_is_a_pure_function_of_the_step():
    cosine = [lr_factor(s, total=100, warmup=10, kind="cosine") for s in range(100)]
    assert cosine[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert lr_factor(75, total=100, warmup=50, kind="linear") == pytest.approx(0.5)
    assert lr_factor(99, total=100, warmup=0, kind="constant") == 1.0
    assert lr_factor(100, total=100, warmup=0, kind="cosine") == pytest.approx(0.0)


def test_set_lr_scales_every_group_from_its_top(model):
    optimizer = make_optimizer(model, OptimizerSection(lr=0.1, quantizer_lr=0.02))
    for factor in (0.5, 0.25):
        set_lr(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.02 * factor])


def test_average_follows_its_recurrence_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    ema = Ema(model, decay=0.9)
    expected = model.weight.detach().double().clone()
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.tensor([0.1, 0.2, 0.3]))
            model.running_mean.add_(1)
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_average_restores_its_state(model):
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    other = Ema(model, decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    for name, value in ema.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
