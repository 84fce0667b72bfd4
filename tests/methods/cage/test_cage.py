import copy

import pytest
import torch
from torch import nn

from bitwright import BitwrightError, QuantizerSpec, Rule, calibrate, prepare, quant_layers
from bitwright.methods.cage import CAGE, strength_at
from methods.nets import float_net, make_step, quantized, run, same_state


def distances(model):
    """w - Q(w) of every quantized weight, from codes and scales."""
    found = {}
    for name, layer in quant_layers(model).items():
        quantizer = layer.weight_quantizer
        scale = quantizer.affine().scale.view(-1, *[1] * (layer.weight.ndim - 1))
        found[f"{name}.weight"] = layer.weight.detach() - quantizer.integer_codes(layer.weight) * scale
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"), [("ramp", [0.0] * 8 + [0.5, 1.0]), ("constant", [0.0] * 8 + [1.0] * 2)]
)
def test_the_published_schedule_of_ten_steps(schedule, expected):
    assert [strength_at(i / 10, schedule, 0.8) for i in range(1, 11)] == pytest.approx(expected)


def test_a_step_is_the_optimizers_and_then_the_pull():
    plain, pulled = (quantized(float_net(), bits=3) for _ in range(2))
    steps = [
        make_step(plain, lr=0.05),
        make_step(pulled, [CAGE(pulled, 10, lam=4.0, silence=0.0, schedule="constant")], lr=0.05),
    ]
    for step in steps:
        run(step, 0, 1)
    moves = distances(plain)
    assert any(d.abs().max() > 0 for d in moves.values())
    state = plain.state_dict()
    for name, distance in moves.items():
        state[name] = state[name] - 0.05 * 4.0 * distance
    for name, value in pulled.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-8, msg=name)


def test_the_pull_reaches_the_grid_and_weights_beyond_it_go_to_its_bound():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=2, per_channel=False))])
    calibrate(net, [torch.randn(4, 4)])
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-9.0, -0.4, 0.3, 9.0]]))
        net[0].weight_quantizer.grid.scale.fill_(0.5)
    method = CAGE(net, 1, lam=2.0, silence=0.0, schedule="constant")
    step = make_step(net, [method], lr=0.5)
    step.loss_fn = lambda outputs, y: 0.0 * outputs.sum()
    step(torch.randn(2, 4), torch.zeros(2))
    assert net[0].weight.flatten().tolist() == [-1.0, -0.5, 0.5, 0.5]
    metrics = {}
    method.after_epoch(metrics)
    assert metrics == {"cage/distance": 0.0}


def test_each_group_of_the_optimizer_pulls_at_its_own_rate():
    model = quantized(float_net(), bits=3)
    method = CAGE(model, 10, lam=1.0, silence=0.0, schedule="constant")
    step = make_step(model, [method])
    first, *others = [layer.weight for layer in quant_layers(model).values()]
    groups = [{"params": [first], "lr": 0.0}, {"params": others[:1], "lr": 0.1}]  # the rest is not trained
    step.optimizer = torch.optim.SGD(groups, lr=0.0)
    step.loss_fn = lambda outputs, y: 0.0 * outputs.sum()
    before, gaps = [p.detach().clone() for p in (first, *others)], list(distances(model).values())
    run(step, 0, 1)
    assert torch.equal(first, before[0])
    torch.testing.assert_close(others[0].detach(), before[1] - 0.1 * gaps[1])
    assert all(torch.equal(p, b) for p, b in zip(others[1:], before[2:], strict=True))


def test_without_strength_and_while_silent_training_is_plain_to_the_last_bit():
    models = [quantized(float_net(), bits=3) for _ in range(3)]
    methods = [[], [CAGE(models[1], 10, lam=0.0, silence=0.0)], [CAGE(models[2], 10, lam=10.0, silence=0.5)]]
    for model, each in zip(models, methods, strict=True):
        run(make_step(model, each), 0, 4)
    assert same_state(models[0], models[1])
    assert same_state(models[0], models[2])


def test_the_target_is_the_whole_grid_whatever_pege_mixes():
    model = quantized(float_net(), bits=3, estimator="pege")
    method = CAGE(model, 1, silence=0.0)
    torch.manual_seed(0)
    for (weight, quantizer), gap in zip(method.weights, distances(model).values(), strict=True):
        quantizer.estimator.rate.fill_(0.5)
        torch.testing.assert_close(method.distance(weight, quantizer).detach(), gap)


def test_a_tied_weight_is_pulled_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=3))])
    calibrate(net, [torch.randn(4, 4)])
    assert len(CAGE(net, 10).weights) == 1


def test_it_remembers_its_place_in_the_schedule():
    model = quantized(float_net(), bits=3)
    method = CAGE(model, 10)
    run(make_step(model, [method]), 0, 3)
    other = CAGE(copy.deepcopy(model), 10)
    other.load_state_dict(method.state_dict())
    assert other.steps == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": -1.0}, "lam=-1.0"),
        ({"silence": 1.0}, "silence=1.0"),
        ({"schedule": "steps"}, "ramp or constant"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        CAGE(quantized(float_net()), 10, **options)


@pytest.mark.parametrize("grid", ["dorefa", "sat"])
def test_a_transformed_weight_has_no_grid_to_go_to(grid):
    with pytest.raises(BitwrightError, match=r"cage: the grid .* transformed weight"):
        CAGE(quantized(float_net(), grid=grid), 10)


def test_a_weight_made_of_others_and_a_float_model_are_refused():
    model = quantized(float_net())
    torch.nn.utils.parametrizations.weight_norm(model.fc)
    with pytest.raises(BitwrightError, match="cage: the weight of fc is computed"):
        CAGE(model, 10)
    with pytest.raises(BitwrightError, match="no weight of the model is quantized"):
        CAGE(float_net(), 10)
