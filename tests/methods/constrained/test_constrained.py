import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import BWRF, SAQ, BitwrightError, Constrained, Step, quant_layers, quantizers
from bitwright.kernels import reference_only
from bitwright.methods.constrained import soft_cross_entropy
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def built(bits=2, **options):
    model = quantized(float_net(), bits=bits)
    return model, Constrained(model, F.cross_entropy, **options)


class Louder(nn.Module):
    """Rounds, and passes `factor` times the gradient on."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, v, lo, hi):
        return v.clamp(lo, hi).round().detach() + self.factor * (v - v.detach())


def gradients(model, method, batch):
    """Gradients of one step by name, which the optimizer does not get."""
    step = make_step(model, [method])
    kept = {}
    step.optimizer.step = lambda: kept.update(
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    )
    step(*batch)
    return kept, step


def test_soft_cross_entropy_is_its_definition_with_a_gradient_to_both():
    low = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    full = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    p, q = full.softmax(-1), low.softmax(-1)
    expected = -(p * q.log()).sum() / 5
    assert soft_cross_entropy(low, full).item() == pytest.approx(expected.item(), rel=1e-12)
    ours = torch.autograd.grad(soft_cross_entropy(low, full), (low, full))
    for a, b in zip(ours, torch.autograd.grad(expected, (low, full)), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_have_the_gradients_of_the_full_precision_side_written_out():
    model, method = built()
    duals = {}
    for i, (name, constraint) in enumerate(method.constraints.items()):
        constraint.multiplier = (0.5 + i) * constraint.target
        duals[name] = 0.5 + i
    x, y = data()
    # By hand, on copies: what the low-precision network reads and gives, then the terms of a float network.
    low = copy.deepcopy(model)
    seen = {}
    for name, layer in quant_layers(low).items():
        layer.register_forward_hook(lambda m, a, o, n=name: seen.update({n: (a[0].detach(), o.detach())}))
    low_outputs = low(x).detach()
    plain = copy.deepcopy(model)
    for q in quantizers(plain).values():
        q.bypass = True
    outputs = plain(x)
    loss = F.cross_entropy(outputs, y)
    loss = loss - duals["output"] * (outputs.softmax(-1) * low_outputs.log_softmax(-1)).sum(-1).mean()
    for name, layer in quant_layers(plain).items():
        given, put_out = seen[name]
        x_q = quant_layers(low)[name].input_quantizer(given).detach()
        loss = loss + duals[name] * (layer(x_q) - put_out).square().mean()
    loss.backward()
    got, step = gradients(model, method, (x, y))
    weights = [f"{n}.weight" for n in quant_layers(model)]
    for name in weights:
        torch.testing.assert_close(got[name], dict(plain.named_parameters())[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    assert {"task", "constrained_task", "constrained"} == step.result.losses.keys()
    # Scales have no part in the full-precision side; they learn from the low-precision one.
    scales = [n for n in got if n.endswith("grid.scale")]
    assert scales
    assert all(got[n].any() for n in scales)


def test_no_gradient_that_crosses_the_rounding_reaches_a_weight():
    """What the estimator lets through may be anything: the weights' gradients stay."""
    found = []
    for factor in (1.0, 100.0):
        model, method = built()
        for q in quantizers(model).values():
            if q.shape.role == "weight":
                q.estimator = Louder(factor)
        kept, _ = gradients(model, method, data())
        found.append({n: g for n, g in kept.items() if n.removesuffix(".weight") in quant_layers(model)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_others_see_the_low_precision_network_in_either_order():
    states = []
    for order in (1, -1):
        model, method = built(bits=3)
        step = make_step(model, [BWRF(model, float_net()), method][::order])
        run(step, 0, 3)
        assert {"task", "bwrf_branches", "constrained"} <= step.result.losses.keys()
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_norms_keep_the_statistics_of_the_low_precision_pass_and_evaluation_is_untouched():
    model, method = built()
    twin = copy.deepcopy(model)
    step = make_step(model, [method], lr=0.0)
    step(*data())
    twin(data()[0])
    assert same_state(model, twin)
    assert not any(q.bypass for q in quantizers(model).values())
    assert torch.equal(model.eval()(data()[0]), twin.eval()(data()[0]))


def test_duals_move_by_the_rate_times_the_mean_slack_and_stay_above_zero():
    model, method = built(bits=2, eps_layer=0.05, rate=0.5)
    assert method.duals()["output"] == 1.0
    assert method.constraints["output"].target == 0.7
    step = make_step(model, [method], lr=0.0)
    for batch in range(3):
        step(*data(seed=batch))
    means = dict(zip(method.constraints, (method.sums / 3).tolist(), strict=True))
    before, metrics = method.duals(), {}
    step.end_epoch(metrics)
    for name, bound in (("output", 0.7), *((n, 0.05) for n in quant_layers(model))):
        expected = max(before[name] + 0.5 * (means[name] - bound), 0.0)
        assert metrics[f"constrained/dual/{name}"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert method.summary()["slacks"][name] == pytest.approx(means[name] - bound)
    assert metrics["constrained/output"] == pytest.approx(means["output"])
    assert {v == 0.0 for v in method.duals().values()} == {True, False}
    assert method.count == 0


def test_the_most_rounded_layer_has_the_largest_dual():
    model = quantized(float_net(), bits=8)
    quant_layers(model)["layer2.0.conv1"].weight_quantizer.set_bits(2)
    method = Constrained(model, F.cross_entropy, rate=0.1, eps_layer=1e-6)
    step = make_step(model, [method], lr=0.0)
    run(step, 0, 4)
    step.end_epoch({})
    layers = {n: v for n, v in method.duals().items() if n != "output"}
    assert max(layers, key=layers.__getitem__) == "layer2.0.conv1"


@pytest.mark.parametrize("options", [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}], ids=["", "bf16", "micro"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method = built(rate=1.0)
        return model, make_step(model, [method], **options)

    whole, step = fresh()
    run(step, 0, 5)
    assert torch.isfinite(step.result.loss)
    assert same_state(whole, resumed(fresh, stop, 5))


def test_duals_are_resumed():
    model, method = built(rate=1.0)
    step = make_step(model, [method])
    run(step, 0, 2)
    step.end_epoch({})
    run(step, 2, 3)
    _, other = built(rate=1.0)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for each in (method, other):
        each.after_epoch({})
    assert method.duals() == other.duals()
    assert method.summary() == other.summary()
    with pytest.raises(BitwrightError, match="duals of other layers"):
        other.load_state_dict({"constraints": {}})


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_eager_one():
    def double(seed):
        x, y = data(seed)
        return x.double(), y

    states = []
    for compiled in (None, "aot_eager"):
        torch._dynamo.reset()
        model = quantized(float_net(), bits=3).double()
        step = make_step(model, [Constrained(model, F.cross_entropy)], compiled=compiled)
        with reference_only():
            for i in range(4):
                step(*double(i))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", [{"eps_output": 0.0}, {"eps_layer": -1.0}, {"rate": 0.0}])
def test_values_that_are_not_accepted(options):
    ((key, value),) = options.items()
    with pytest.raises(BitwrightError, match=f"{key}={value}"):
        built(**options)


def test_what_needs_a_gradient_to_the_weight_is_refused():
    with pytest.raises(BitwrightError, match=r"constrained: the estimator .ewgs. of conv1.weight_quantizer"):
        Constrained(quantized(float_net(), estimator="ewgs"), F.cross_entropy)
    with pytest.raises(BitwrightError, match="constrained: the grid 'dorefa' of"):
        Constrained(quantized(float_net(), grid="dorefa"), F.cross_entropy)
    with pytest.raises(BitwrightError, match="constrained: no weight of the model is quantized"):
        Constrained(float_net(), F.cross_entropy)
    model, method = built()
    with pytest.raises(BitwrightError, match="saq and constrained both own the backward pass"):
        Step(model, F.cross_entropy, torch.optim.SGD(model.parameters()), [SAQ(model), method])
